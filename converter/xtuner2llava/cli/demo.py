"""A tiny checkpoint as XTuner leaves it, with a Qwen2 LLM, converted before your eyes.

The models are random and a few hundred kilobytes; their files are of the real formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import OutputError

if TYPE_CHECKING:
    import torch

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOWER = "openai/clip-demo"
_LLM: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
# What mmengine writes as a run's resolved config; only what a conversion reads.
_CONFIG = """\
llava_dataset = dict(
    pad_image_to_square=True,
    template_map_fn=dict(
        template='xtuner.utils.PROMPT_TEMPLATE.qwen_chat',
        type='xtuner.dataset.map_fns.template_map_fn_factory'),
    type='xtuner.dataset.LLaVADataset')
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(
        pretrained_model_name_or_path={llm!r},
        trust_remote_code=True,
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path={tower!r},
        type='transformers.CLIPVisionModel.from_pretrained'))
train_dataloader = dict(dataset=llava_dataset)
"""
_NEXT = """\
With your own checkpoint, iter_N.pth or iter_N_xtuner/ of XTuner:
  xtuner2llava inspect CHECKPOINT      what it is, and what it can become
  xtuner2llava convert CHECKPOINT OUT --for PROGRAM
                                       llava, llava-next, transformers, ...
Give --llm and --vision if its base models are not where the training had them."""


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The input of a conversion: a `.pth` and the base models that it was trained from."""

    checkpoint: Path
    llm: Path
    vision: Path


def make_demo_files(folder: Path) -> DemoFiles:
    """Makes base models and `iter_2.pth` in `folder`, which must not exist or be empty.

    A folder where it made them before is taken as it is.
    """
    files = DemoFiles(folder / "iter_2.pth", folder / "base-qwen2", folder / "base-clip")
    # The checkpoint is written last.
    if files.checkpoint.is_file() and files.llm.is_dir() and files.vision.is_dir():
        return files
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            "exists and is not empty", where=str(folder), advice="Give another folder."
        )
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    for path in (files.llm, files.vision):
        path.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = Qwen2ForCausalLM(Qwen2Config(**_LLM))
        tower = CLIPVisionModel(CLIPVisionConfig(**_VISION))
        projector = torch.nn.Sequential(
            torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)
        )
    _write_tokenizer(files.llm)
    _write_config(
        files.llm,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "torch_dtype": "float16",
            **_LLM,
        },
    )
    _write_tower(files.vision, tower.state_dict())
    state = {f"llm.{name}": tensor for name, tensor in llm.state_dict().items()}
    state |= {f"projector.model.{name}": t for name, t in projector.state_dict().items()}
    config = _CONFIG.format(llm=str(files.llm), tower=str(files.vision))
    torch.save({"meta": {"iter": 2, "cfg": config}, "state_dict": state}, files.checkpoint)
    return files


def run_demo(folder: Path, say: Callable[[str], None]) -> None:
    """Makes the files, plans and converts them, and says what was done."""
    from xtuner2llava.api import convert, plan
    from xtuner2llava.cli.rendering import render_plan, render_report, tree

    files = make_demo_files(folder)
    say(f"A tiny LLaVA as XTuner leaves it:\n\n{tree(folder)}\n")
    out = folder / "llava-qwen2-demo"
    say(f"$ xtuner2llava plan {files.checkpoint} --vision-tower-name {_TOWER}\n")
    say(render_plan(plan(files.checkpoint, vision_tower_name=_TOWER)))
    say(f"\n$ xtuner2llava convert {files.checkpoint} {out} \\\n    --vision-tower-name {_TOWER}\n")
    report = convert(files.checkpoint, out, vision_tower_name=_TOWER)
    say(render_report(report))
    say(f"\n{tree(out)}\n\n{_NEXT}")


def _write_config(folder: Path, values: dict[str, object]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _write_tower(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    named = {n if n.startswith("vision_model.") else f"vision_model.{n}": t
             for n, t in tensors.items() if not n.endswith("position_ids")}  # fmt: skip
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(
        folder, {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **_VISION}
    )
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of Qwen2's kind: 256 bytes and three special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    decoder = {
        str(len(vocab) + index): {
            "content": token,
            **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
            "special": True,
        }
        for index, token in enumerate(_SPECIAL)
    }
    config = {
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    files = {"vocab.json": vocab, "tokenizer_config.json": config}
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
