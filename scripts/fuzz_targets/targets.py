"""What is attacked: a function of bytes for each kind of file; only `ConversionError` may leave it.

Every target writes the input as the files that a user could be given, in a folder of its own, and
does with them what the command line would. Messages are checked too: they must be of a length that
can be read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fuzz_targets import models, mutation
from fuzz_targets.inputs import dump, load, write_folder, zip_bytes
from xtuner2llava import convert, inspect, plan
from xtuner2llava.cli.rendering import render_inspection, render_plan
from xtuner2llava.errors import ConversionError
from xtuner2llava.inspection.inspection import inspect_checkpoint
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.options import InspectOptions, SourceOptions
from xtuner2llava.sources.adapter import LoraSettings
from xtuner2llava.sources.checkpoint import open_checkpoint, open_training
from xtuner2llava.sources.model_config import in_437_vocabulary, read_model_config
from xtuner2llava.storage.json_file import parse_json
from xtuner2llava.storage.pickle_reader import read_pickle
from xtuner2llava.storage.safetensors_file import SafetensorsFile
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import open_weights, tensor_references
from xtuner2llava.tokenizers.conversion import prepare_tokenizer
from xtuner2llava.tokenizers.tokenizer import read_tokenizer
from xtuner2llava.training_config.config import TrainingConfig

# The shipped mappings do not change: parsing them for each input would be most of the work.
_SHIPPED = Catalogue.shipped()
Catalogue.shipped = staticmethod(lambda: _SHIPPED)  # type: ignore[method-assign,assignment]

_LONGEST_MESSAGE = 200_000
_LARGEST_CONVERSION = 1 << 20


@dataclass(frozen=True)
class Target:
    """`run(data, folder)` reads an input in `folder`, which is empty; `seeds()` are good inputs."""

    run: Callable[[bytes, Path], None]
    mutate: mutation.Mutator
    seeds: Callable[[], Iterator[bytes]]


def attack(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the input was accepted; anything but a `ConversionError` is raised."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        target.run(data, folder)
    except ConversionError as error:
        text = str(error)
        assert error.faults and text, "an error that says nothing"  # noqa: S101
        assert len(text) < _LONGEST_MESSAGE, f"a message of {len(text)} characters"  # noqa: S101
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


# Single files


def _pickle(data: bytes, folder: Path) -> None:
    read_pickle(data, "x.pth (data.pkl)")


def _pickle_seeds() -> Iterator[bytes]:
    import zipfile
    from io import BytesIO

    from fuzz_targets.inputs import torch_bytes

    values = [
        models.pth_files("llama")["iter_2.pth"],
        models.zero_files("llama", 3)["iter_2.pth/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        {"a": {"$tensor": ["bfloat16", [2, 3], [1, 2], 1, "7"]}, "b": [1, 2.5, "c", None, True]},
    ]
    for value in values:
        with zipfile.ZipFile(BytesIO(torch_bytes(value))) as archive:
            yield archive.read("iter_1/data.pkl")


def _zip(data: bytes, folder: Path) -> None:
    path = folder / "iter_2.pth"
    path.write_bytes(data)
    opened = TorchFile(path)
    tensors = opened.tensors(tensor_references(opened.value, str(path)))
    _read_some(tensors.values())


def _zip_seeds() -> Iterator[bytes]:
    from fuzz_targets.inputs import torch_bytes

    yield torch_bytes({"a": {"$tensor": ["float32", [2, 3]]}, "b": {"$tensor": ["float16", [4]]}})
    yield zip_bytes(b"\x80\x02}.", {"0": 5, "1": 0})


def _safetensors(data: bytes, folder: Path) -> None:
    write_folder(folder, {"model.safetensors": load(data) or data.decode("latin-1")})
    _read_some(SafetensorsFile(folder / "model.safetensors").tensors.values())


def _safetensors_seeds() -> Iterator[bytes]:
    yield dump(models.header({"a": (2, 3), "b": (), "c": (0, 4)}))
    yield dump(models.header(models.projector_shapes()) | {"$length": 100, "$data": 7})


def _index(data: bytes, folder: Path) -> None:
    write_folder(folder, load(data) or {"model.safetensors.index.json": data.decode("latin-1")})
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            open_weights(folder / name)


def _index_seeds() -> Iterator[bytes]:
    files = models.folder_files("llama", sharded=True)
    home = "iter_2_xtuner/model"
    yield dump({n.split("/")[1]: c for n, c in files.items() if n.startswith(home)})
    names = {"a": "pytorch_model-00001-of-00001.bin"}
    yield dump(
        {
            "pytorch_model.bin.index.json": {"weight_map": names},
            names["a"]: models.state("", {"a": (2, 2)}),
        }
    )


def _read_some(tensors: Any) -> None:
    """The first rows of a few small tensors: what a conversion would read."""
    for tensor in islice(tensors, 4):
        if tensor.nbytes < _LARGEST_CONVERSION and tensor.rows:
            tensor.read(0, 1)


# Texts


def _mapping(data: bytes, folder: Path) -> None:
    path = folder / "mine.yaml"
    path.write_bytes(data)
    Catalogue.shipped().check(path)
    family = Catalogue.shipped().with_family_file(path)
    for kind, config in models.LLM_CONFIGS.items():
        names = models.llm_shapes(kind)
        try:
            family.translate_config(config, Catalogue.shipped().formats["llava"])
            family.limits(config)
            family.apply(config, models.fills(names))
        except ConversionError:
            continue


def _mapping_seeds() -> Iterator[bytes]:
    catalogue = Catalogue.shipped()
    for name in (
        *catalogue.families,
        *catalogue.formats,
        "llama",
        "qwen2_moe",
        "clip_vision_model",
    ):
        yield catalogue.text_of(name).encode()


_MAPPING_WORDS = (
    *(
        "schema",
        "family",
        "format",
        "class",
        "becomes",
        "match",
        "dims",
        "tensors",
        "config",
        "keep",
    ),
    *("rename", "move", "to", "into", "split", "sizes", "dim", "concat", "deinterleave", "groups"),
    *(
        "slots",
        "transpose",
        "normalize",
        "resize",
        "rows",
        "lossy",
        "fill",
        "shape",
        "value",
        "drop",
    ),
    *(
        "because",
        "for",
        "from",
        "rules",
        "if",
        "extends",
        "derive",
        "set",
        "require",
        "that",
        "say",
    ),
    *(
        "exact_up_to",
        "transformers",
        ">=4.38, <5.4",
        "when",
        "caveats",
        "tokenizer",
        "generation",
        "chat",
        "default",
        "architectures",
        "[]",
        "{}",
    ),
    *("null", "true", "*a", "&a", "!!python/object:os.system", "<<", "---", "...", "? x", "|", ">"),
    *(
        "{i}",
        "{i}{i}",
        "**",
        "hidden_size * 10 ** 9",
        "9" * 30,
        "1/0",
        "1 // 0",
        "1 % 0",
        "-1",
        "~",
    ),
    *(
        "(" * 60,
        "not " * 60,
        "a" * 600,
        "x.y.z.w",
        "max(1, 2)",
        "len(architectures)",
        "is_float(1)",
    ),
    *(
        "hidden_size // 0",
        "1e308 * 10",
        "__import__('os')",
        "(lambda: 1)()",
        "[i for i in x]",
        "'x'",
    ),
    *("num_hidden_layers * 1000000", "{hidden_size}", "{vision.name}", "{", "}", "\t", "\ufeff"),
)


def _training_config(data: bytes, folder: Path) -> None:
    path = folder / "config.py"
    path.write_bytes(data)
    try:
        training_config = TrainingConfig.from_file(path)
    except ConversionError:
        open_training(path)
        raise
    for name in dir(type(training_config)):
        if not name.startswith("_") and isinstance(getattr(type(training_config), name), property):
            try:
                getattr(training_config, name)
            except ConversionError:
                continue
    found = inspect_checkpoint(open_training(path), InspectOptions())
    _printed(render_inspection(found, path.name))
    _printed(json.dumps(found.to_dict(), ensure_ascii=False))


def _training_config_seeds() -> Iterator[bytes]:
    yield models.XTUNER_CONFIG.encode()
    yield _RECIPE.encode()


_RECIPE = """\
from xtuner.dataset import LLaVADataset
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE
from peft import LoraConfig
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, BitsAndBytesConfig
llm_name = 'no-such-owner/no-such-llm'
prompt_template = PROMPT_TEMPLATE.qwen_chat
max_length = int(2048 - (336 // 14)**2)
sizes = dict(a=1, b=[1, 2, 3], c=(4,))
sizes.update(d=f'{max_length:>8}')
if max_length > 10:
    batch = 4 if sizes['a'] else 5
model = dict(
    type=LLaVAModel, freeze_llm=True, freeze_visual_encoder=True, pretrained_pth=None,
    max_position_embeddings=4096, visual_select_layer=-2,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_name,
             trust_remote_code=True, torch_dtype=torch.float16,
             quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)),
    llm_lora=dict(type=LoraConfig, r=512, lora_alpha=256, lora_dropout=0.05, bias='none'),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained,
                        pretrained_model_name_or_path='openai/clip'),
    visual_encoder_lora=dict(type=LoraConfig, r=64, lora_alpha=16))
llava_dataset = dict(type=LLaVADataset, pad_image_to_square=True, max_length=max_length)
train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[llava_dataset]))
custom_hooks = [dict(type='EvaluateChatHook', system='', stop_words=['<|im_end|>'],
                     prompt_template=prompt_template, generation_kwargs=dict(bos_token_id=1))]
"""
_TRAINING_CONFIG_WORDS = (
    *("model", "llm", "llm_lora", "dict", "type", "eval('1')", "exec('1')", "__import__('os')"),
    *(
        "lambda: 0",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        "**sizes",
        "*sizes",
        "f'{x:>99}'",
        "f'{x!r}'",
        "x",
    ),
    *("10**10**10", "'a'*10**9", "[0]*10**9", "1<<10**9", "-1", "1e999", "1/0", "0**-1", "~5"),
    *(
        "while True: pass",
        "for x in y: z",
        "if x:",
        "else:",
        "def f(): pass",
        "class A: pass",
        "del",
    ),
    *(
        "import os",
        "from x import *",
        "from .x import y",
        "with read_base():",
        "_base_ = 'x'",
        "try:",
    ),
    *(
        "x = x",
        "x += x",
        "x[x] = x",
        "x.update(x)",
        "x.append(x)",
        "lambda",
        "await x",
        "yield",
        ":=",
    ),
    *(
        "None",
        "True",
        "torch.float16",
        "'linear'",
        "b'x'",
        "...",
        "1j",
        "not",
        "is",
        "in",
        "global x",
    ),
    *("(" * 90, "[" * 90, "-" * 300, "a." * 200, "\x00", "\t", "\\", "'''", "match x:", "case _:"),
    *(
        "sizes.get('a')",
        "len(sizes)",
        "int('9' * 5000)",
        "round(1, 10**9)",
        "print()",
        "str(sizes)",
    ),
)


# Tokenizers


def _tokenizer(data: bytes, folder: Path) -> None:
    write_folder(folder, load(data) or {"tokenizer.json": data.decode("latin-1")})
    tokenizer = read_tokenizer(folder)
    for source, special in (
        (None, {}),
        ("tokenizer.model", {"<image>": 99}),
        ("qwen.tiktoken", {"<|endoftext|>": 256}),
    ):
        try:
            made = prepare_tokenizer(tokenizer, source, special, eos="</s>", pad="<pad>").tokenizer
            made = made.with_special_token("bos_token", next(iter(made.ids), None))
            made = made.with_tokens(["<image>", "<pad>"])
            for make in made.made.values():
                make()
        except ConversionError:
            continue


def _tokenizer_seeds() -> Iterator[bytes]:
    base = models.base_files("llama", weights=False)
    yield dump({n.split("/")[1]: c for n, c in base.items() if n.startswith("llm/")})
    lists = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    yield dump({"tokenizer.json": lists, "tokenizer_config.json": {"tokenizer_class": "X"}})
    yield dump({"vocab.json": {"a": 0, "b": 1, "ab": 2}, "merges.txt": "#version: 0.2\na b\n"})
    yield dump({"tokenizer.model": _sentencepiece_text(), "added_tokens.json": {"<x>": 9}})
    yield dump(
        {
            "qwen.tiktoken": _TIKTOKEN.decode(),
            "tokenizer_config.json": {
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            },
        }
    )


def _sentencepiece(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(data)
    _tokenizer(dump({"tokenizer.model": "base64:" + _base64(data)}), folder)


def _sentencepiece_seeds() -> Iterator[bytes]:
    yield _SENTENCEPIECE


def _tiktoken(data: bytes, folder: Path) -> None:
    (folder / "qwen.tiktoken").write_bytes(data)
    special = {"<|endoftext|>": 256 + 2}
    tokenizer = read_tokenizer(folder)
    made = prepare_tokenizer(tokenizer, "qwen.tiktoken", special, eos="<|endoftext|>").tokenizer
    for make in made.made.values():
        make()


def _tiktoken_seeds() -> Iterator[bytes]:
    yield _TIKTOKEN


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def _sentencepiece_text() -> str:
    return "base64:" + _base64(_SENTENCEPIECE)


def _piece(text: str, score: float, kind: int) -> bytes:
    import struct

    data = text.encode()
    inner = b"\x0a" + bytes([len(data)]) + data + b"\x15" + struct.pack("<f", score)
    inner += b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(inner)]) + inner


_SENTENCEPIECE = b"".join(
    [
        _piece("<unk>", 0, 2),
        _piece("<s>", 0, 3),
        _piece("</s>", 0, 3),
        _piece("<0x41>", 0, 6),
        _piece("\u2581", -1, 1),
        _piece("a", -2, 1),
        _piece("b", -3, 1),
        _piece("ab", -0.5, 1),
        _piece("<user>", 0, 4),
        b"\x12\x05\x18\x02\x98\x02\x01",  # trainer: BPE, byte_fallback
        b"\x1a\x04\x18\x01\x20\x00",  # normalizer: a dummy prefix, spaces kept
    ]
)
_TIKTOKEN = b"".join(
    f"{_base64(token)} {rank}\n".encode()
    for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b"ab", b"abc"])
)


# Configs and whole checkpoints


def _config(data: bytes, folder: Path) -> None:
    values = parse_json(data, "config.json")
    in_437_vocabulary(values)
    write_folder(folder, {"config.json": values})
    config = read_model_config(folder).values
    with suppress(ConversionError):
        LoraSettings.from_mapping(values, "adapter_config.json").scale("q_proj", 2)
    catalogue = Catalogue.shipped()
    for names in (None, models.llm_shapes("llama"), models.llm_shapes("internlm2")):
        try:
            family = catalogue.detect(config, names)
            for format_ in catalogue.formats.values():
                family.translate_config(config, format_)
            family.limits(config)
            family.apply(config, models.fills(names or {}))
        except ConversionError:
            continue


def _config_seeds() -> Iterator[bytes]:
    for config in models.LLM_CONFIGS.values():
        yield dump(config)
    rope = {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}
    llama = models.LLM_CONFIGS["llama"]
    yield dump({**llama, "dtype": "bfloat16", "rope_parameters": rope, "head_dim": 4})
    yield dump({"r": 2, "lora_alpha": 4, "peft_type": "LORA", "bias": "none", "alpha_pattern": {}})


def _checkpoint(data: bytes, folder: Path) -> None:
    """Inspects, plans and, where there is a plan, converts whatever checkpoint is in the input."""
    files = load(data)
    write_folder(folder, files if files is not None else {"iter_2.pth": data.decode("latin-1")})
    checkpoint = next(
        (folder / name for name in ("iter_2.pth", "iter_2_xtuner") if (folder / name).exists()),
        folder,
    )
    bases: dict[str, Any] = {"llm": folder / "llm", "vision": folder / "vision"}
    found = inspect(checkpoint, **bases)
    _printed(render_inspection(found, str(checkpoint)))
    _printed(json.dumps(found.to_dict(), ensure_ascii=False))
    with suppress(ConversionError):
        open_checkpoint(str(checkpoint), SourceOptions(weights="module"))
    planned = plan(checkpoint, **bases, dtype="keep", vision_tower_name="openai/x")
    _printed(render_plan(planned))
    _printed(json.dumps(planned.to_dict(), ensure_ascii=False))
    if planned.nbytes < _LARGEST_CONVERSION:
        out = folder / "out-llava"
        convert(checkpoint, out, **bases, dtype="keep", vision_tower_name="openai/x", jobs=1)
        # What was written must be readable.
        total = sum(len(SafetensorsFile(path).tensors) for path in out.glob("*.safetensors"))
        assert total == len(planned.tensors)  # noqa: S101


def _printed(text: str) -> None:
    assert text and len(text) < 10 * _LONGEST_MESSAGE  # noqa: S101


def _pth_seeds() -> Iterator[bytes]:
    for kind in models.LLM_CONFIGS:
        yield dump(models.pth_files(kind))
    yield dump(models.pth_files("llama", lora=True))


def _folder_seeds() -> Iterator[bytes]:
    yield dump(models.folder_files("qwen2"))
    yield dump(models.folder_files("llama", sharded=True))
    yield dump(models.folder_files("phi3", lora=True))


def _zero_seeds() -> Iterator[bytes]:
    yield dump(models.zero_files("llama", 2))
    yield dump(models.zero_files("qwen2", 3))


TARGETS: dict[str, Target] = {
    "pickle": Target(_pickle, mutation.mutate_pickle, _pickle_seeds),
    "zip": Target(_zip, mutation.mutate_zip, _zip_seeds),
    "safetensors": Target(_safetensors, mutation.mutate_json, _safetensors_seeds),
    "index": Target(_index, mutation.mutate_json, _index_seeds),
    "mapping": Target(_mapping, mutation.mutate_lines(_MAPPING_WORDS), _mapping_seeds),
    "training_config": Target(
        _training_config, mutation.mutate_lines(_TRAINING_CONFIG_WORDS), _training_config_seeds
    ),
    "tokenizer": Target(_tokenizer, mutation.mutate_json, _tokenizer_seeds),
    "sentencepiece": Target(_sentencepiece, mutation.mutate_protobuf, _sentencepiece_seeds),
    "tiktoken": Target(
        _tiktoken, mutation.mutate_lines(("YQ== 1", "==", "9" * 12)), _tiktoken_seeds
    ),
    "config": Target(_config, mutation.mutate_json, _config_seeds),
    "pth": Target(_checkpoint, mutation.mutate_json, _pth_seeds),
    "folder": Target(_checkpoint, mutation.mutate_json, _folder_seeds),
    "zero": Target(_checkpoint, mutation.mutate_json, _zero_seeds),
}
