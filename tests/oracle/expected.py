"""The trained model under the names of a format, in the precision that it is known in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from oracle.plain import plain_llm
from oracle.reading import Tensors, part_of, read_checkpoint, read_model

_PEFT = "base_model.model."
_HF = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.": "vision_tower.",
}


def expected(
    checkpoint: Path,
    llm: Path,
    vision: Path,
    alphas: Mapping[str, float],
    *,
    hf: bool = False,
    masters: bool = True,
) -> Tensors:
    """All tensors of the folder by name: as stored, or float64 where they are merged.

    `alphas` are those of the LoRA factors of `llm` and `visual_encoder`.
    """
    trained = read_checkpoint(checkpoint, masters=masters)
    tower = _trained_part("visual_encoder", part_of(trained, "visual_encoder"), vision, alphas)
    names = {f"model.vision_tower.vision_tower.{n}": t for n, t in tower.items()}
    for name, tensor in part_of(trained, "projector").items():
        names[f"model.mm_projector.{name.removeprefix('model.')}"] = tensor
    config = json.loads((llm / "config.json").read_text())
    model = _trained_part("llm", part_of(trained, "llm"), llm, alphas)
    names |= plain_llm(model, config)
    return {_in_hf(name): t for name, t in names.items()} if hf else names


def _trained_part(part: str, own: Tensors, folder: Path, alphas: Mapping[str, float]) -> Tensors:
    """A part's own tensors if they are all of it; else its base's, with an adapter merged."""
    adapter = {n.removeprefix(_PEFT): t for n, t in own.items() if ".lora_" in n}
    full = {n: t for n, t in own.items() if ".lora_" not in n}
    weights = full or read_model(folder)
    for name in [name for name in adapter if ".lora_A." in name]:
        module = name.partition(".lora_A.")[0]
        down, up = adapter[name].double(), adapter[name.replace(".lora_A.", ".lora_B.")].double()
        scale = alphas[part] / down.shape[0]
        weight = weights[f"{module}.weight"].double()
        weights[f"{module}.weight"] = weight + scale * (up @ down)
    if part == "llm":
        return weights
    # The base may be a whole CLIP model; a buffer of positions is not a weight.
    return {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith("vision_model.") and not name.endswith("position_ids")
    }


def _in_hf(name: str) -> str:
    for prefix, instead in _HF.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return f"language_model.{name}"


def faults(folder: Path, wanted: Mapping[str, torch.Tensor], dtype: str) -> list[str]:
    """What of the converted `folder` is not `wanted` in `dtype`, or as stored with "keep"."""
    found = read_model(folder)
    tied = [name for name in wanted if name.endswith("lm_head.weight") and name not in found]
    said = [f"{name} is missing" for name in wanted if name not in found and name not in tied]
    said += [f"{name} is unexpected" for name in found if name not in wanted]
    for name, tensor in wanted.items():
        there = found.get(name)
        if name in tied:
            there = found[name.replace("lm_head", "model.embed_tokens")]
        if there is not None:
            text = _fault(there, tensor, dtype)
            said += [f"{name} {text}"] if text else []
    return said


def _fault(found: torch.Tensor, exact: torch.Tensor, dtype: str) -> str | None:
    wanted = exact.dtype if dtype == "keep" else getattr(torch, dtype)
    rows = exact.shape[0] if exact.shape else 0
    if found.shape[1:] == exact.shape[1:] and rows >= 384 and len(found) > rows:
        # Rows that `hf` adds for its tokens are the mean of the trained ones.
        mean = exact.double().mean(0)
        if not torch.allclose(found[rows:].double(), mean, rtol=2**-7, atol=1e-4):
            return "has added rows that are not the mean of the others"
        found = found[:rows]
    if found.shape != exact.shape:
        return f"has shape {list(found.shape)}, expected {list(exact.shape)}"
    if exact.dtype != torch.float64:
        same = found.dtype == wanted and torch.equal(found, exact.to(wanted))
        return None if same else f"is not what was stored, in {wanted}"
    if dtype != "keep" and found.dtype != wanted:
        return f"is {found.dtype}, expected {wanted}"
    unit = unit_in_the_last_place(exact, found.dtype)
    error = ((found.double() - exact).abs() / unit).max()
    return None if error <= 0.5 + 2**-20 else f"is {float(error):.3g} units from what it must be"


def unit_in_the_last_place(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at float64 `values`."""
    digits, smallest = {
        torch.float16: (11, 2.0**-24),
        torch.bfloat16: (8, 2.0**-133),
        torch.float32: (24, 2.0**-149),
    }[dtype]
    _, exponent = torch.frexp(values.abs())
    unit = torch.ldexp(torch.ones_like(values), exponent - digits)
    return torch.where(values == 0, smallest, unit).clamp_min(smallest)
