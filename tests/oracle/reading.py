"""Checkpoints of XTuner as dictionaries of tensors, under the names of its LLaVAModel."""

from __future__ import annotations

import json
import math
import pickle
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
PARTS = ("llm", "visual_encoder", "projector")


class _Inert:
    """Stands for classes of mmengine and DeepSpeed, none of which holds a weight."""

    def __init__(self, *arguments: object, **named: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return other in self.arguments  # an enum of DeepSpeed is its value

    def __hash__(self) -> int:
        return 0


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = ("torch", "collections", "_codecs", "builtins")
        return super().find_class(module, name) if module.startswith(known) else _Inert


def load_torch(path: Path) -> Any:
    """The value of a file of `torch.save`, on the CPU."""
    module = types.SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="oracle")
    return torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)


def read_checkpoint(path: Path, *, masters: bool = True) -> Tensors:
    """All tensors of a `.pth`, a DeepSpeed directory or an `iter_N_xtuner` folder."""
    if path.is_file():
        value = load_torch(path)
        return dict(value["state_dict"])
    if list(path.glob("*_model_states.pt")):
        return _zero(path, masters)
    found: Tensors = {}
    for part, places in {
        "llm": (path, path / "llm_adapter"),
        "visual_encoder": (path / "visual_encoder", path / "visual_encoder_adapter"),
        "projector": (path / "projector",),
    }.items():
        for place in places:
            found |= {f"{part}.{name}": tensor for name, tensor in read_model(place).items()}
    return found


def read_model(folder: Path) -> Tensors:
    """All tensors of a model's or an adapter's folder; none if it holds no weights."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        found |= load_torch(path)
    return found


def read_alphas(checkpoint: Path) -> dict[str, float]:
    """The LoRA alpha of each adapter of an `iter_N_xtuner` folder, by part."""
    found = {}
    for part in PARTS:
        path = checkpoint / f"{part}_adapter/adapter_config.json"
        if path.is_file():
            found[part] = float(json.loads(path.read_text())["lora_alpha"])
    return found


def _zero(path: Path, masters: bool) -> Tensors:
    """After deepspeedai/DeepSpeed `deepspeed/utils/zero_to_fp32.py`, all of it in memory."""
    models = [load_torch(file) for file in _by_rank(path, "model")]
    module = {name: t for name, t in models[0]["module"].items() if isinstance(t, torch.Tensor)}
    if not masters:
        return module
    ranks = [load_torch(file)["optimizer_state_dict"] for file in _by_rank(path, "optim")]
    groups = [dict(group) for group in models[0]["param_shapes"]]
    frozen = dict(models[0].get("frozen_param_shapes") or {})
    pieces = [model.get("frozen_param_fragments") or {} for model in models]
    found = {name: module[name] for name in models[0].get("buffer_names", ()) if name in module}
    if ranks[0]["zero_stage"] == 3:
        flats = [torch.cat([group.flatten() for group in r["fp32_flat_groups"]]) for r in ranks]
        place = 0
        for name, shape in ((n, s) for group in groups for n, s in group.items()):
            part = math.ceil(math.prod(shape) / len(ranks))
            found[name] = _joined([flat[place : place + part] for flat in flats], shape)
            place += part
        for name, shape in frozen.items():
            found[name] = _joined([piece[name].flatten() for piece in pieces], shape)
    else:
        for number, group in enumerate(groups):
            flat = torch.cat([r["single_partition_of_fp32_groups"][number] for r in ranks])
            place = 0
            for name, shape in group.items():
                found[name] = _joined([flat[place:]], shape)
                place += math.prod(shape)
        found |= {name: pieces[0][name] for name in frozen}
    for name, original in dict(models[0].get("shared_params") or {}).items():
        found[name] = found[original]
    return found


def _joined(parts: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    return torch.cat(list(parts))[: math.prod(shape)].reshape(tuple(shape))


def _by_rank(path: Path, kind: str) -> list[Path]:
    """The files of a kind in the order of ranks, of which there are fewer than ten here."""
    return sorted(path.glob(f"*{kind}_states.pt"))


def part_of(tensors: Mapping[str, torch.Tensor], part: str) -> Tensors:
    """The tensors of a part, without its prefix."""
    return {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
