"""A tiny checkpoint as XTuner leaves it, with a Qwen2 LLM, converted before your eyes.

The models are random and a few hundred kilobytes; their files are of the real formats.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import OutputError
from xtuner2llava.tokenizers.tokenizer import AddedToken, json_file

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
_ASK = """\
Ask it where the name of its vision tower is a folder, which LLaVA needs too; it answers noise:
  cd {folder} && xtuner2llava try {out} PICTURE"""


def run_demo(folder: Path, say: Callable[[str], None]) -> None:
    """Makes the files, plans and converts them, and says what was done."""
    from xtuner2llava.api import convert, plan
    from xtuner2llava.cli.rendering import render_plan, render_report, tree

    checkpoint, out = make_checkpoint(folder), folder / "llava-qwen2-demo"
    say(f"A tiny LLaVA as XTuner leaves it:\n\n{tree(folder)}\n")
    say(f"$ xtuner2llava plan {checkpoint} --vision-tower-name {_TOWER}\n")
    say(render_plan(plan(checkpoint, vision_tower_name=_TOWER)))
    say(f"\n$ xtuner2llava convert {checkpoint} {out} \\\n    --vision-tower-name {_TOWER}\n")
    say(render_report(convert(checkpoint, out, vision_tower_name=_TOWER)))
    say(f"\n{tree(out)}\n\n{_ASK.format(folder=folder, out=out.name)}\n\n{_NEXT}")


def make_checkpoint(folder: Path) -> Path:
    """Makes `iter_2.pth` and its base models in `folder`, which must not exist or be empty.

    A folder where it made them before is taken as it is.
    """
    checkpoint, llm, vision = (folder / n for n in ("iter_2.pth", "base-qwen2", "base-clip"))
    # The checkpoint is written last.
    if checkpoint.is_file() and llm.is_dir() and vision.is_dir():
        return checkpoint
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            "exists and is not empty", where=str(folder), advice="Give another folder."
        )
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = _prefixed("llm.", Qwen2ForCausalLM(Qwen2Config(**_LLM)))
        tower = CLIPVisionModel(CLIPVisionConfig(**_VISION)).state_dict()
        projector = torch.nn.Sequential(
            torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)
        )
    state |= _prefixed("projector.model.", projector)
    tower = {f"vision_model.{name.removeprefix('vision_model.')}": tensor
             for name, tensor in tower.items() if not name.endswith("position_ids")}  # fmt: skip
    llm_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        **_LLM,
    }
    _write(llm, {"config.json": dict(sorted(llm_config.items())), **_tokenizer()})
    (llm / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tower_config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 32},
    }
    sorted_config = dict(sorted({**tower_config, **_VISION}.items()))
    _write(vision, {"config.json": sorted_config, "preprocessor_config.json": preprocessor})
    save_file(tower, vision / "model.safetensors", metadata={"format": "pt"})
    link = folder / _TOWER
    link.parent.mkdir()
    link.symlink_to(Path("..") / vision.name)
    config = _CONFIG.format(llm=str(llm), tower=str(vision))
    torch.save({"meta": {"iter": 2, "cfg": config}, "state_dict": state}, checkpoint)
    return checkpoint


def _prefixed(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def _tokenizer() -> dict[str, dict[str, Any]]:
    """A byte-level tokenizer of Qwen2's kind: 256 bytes and three special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    special = [AddedToken(text, index) for index, text in enumerate(_SPECIAL, len(vocab))]
    config = {
        "added_tokens_decoder": {str(token.id): token.in_config for token in special},
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    return {"vocab.json": vocab, "tokenizer_config.json": config}


def _write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(json_file(content, indent=2))
