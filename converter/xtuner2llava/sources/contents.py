"""What an artefact of XTuner holds by itself, whatever its layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xtuner2llava.sources.adapter import LoraSettings, is_adapted
from xtuner2llava.sources.weights import Fingerprint
from xtuner2llava.tensors import LazyTensor

LLM = "llm"
VISUAL_ENCODER = "visual_encoder"
PROJECTOR = "projector"
# The attributes of XTuner's LLaVAModel, which prefix the keys of its state dict
# (InternLM/xtuner `xtuner/model/llava.py`).
PARTS = (LLM, VISUAL_ENCODER, PROJECTOR)


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of each part that was trained, and what else stands in the artefact.

    A part that was frozen is absent from `weights`; one that was trained as LoRA stands in
    `adapters`, with `settings` where an `adapter_config.json` lies beside it. `config` is the
    XTuner config's text and where it stands; `folders` are those with a part's own `config.json`,
    tokenizer or image processor.
    """

    path: Path
    layout: str
    weights: Mapping[str, Mapping[str, LazyTensor]]
    files: tuple[Fingerprint, ...]
    adapters: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    settings: Mapping[str, LoraSettings] = field(default_factory=dict)
    config: tuple[str, str] | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    iteration: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SplitState:
    """A state dict of LLaVAModel, apart: full weights and adapters by part, and all others."""

    weights: Mapping[str, Mapping[str, LazyTensor]]
    adapters: Mapping[str, Mapping[str, LazyTensor]]
    others: tuple[str, ...]


def split_state(tensors: Mapping[str, LazyTensor]) -> SplitState:
    """The tensors of LLaVAModel's state dict by part, without the part's prefix."""
    parts: dict[str, dict[str, LazyTensor]] = {}
    others: list[str] = []
    for name, tensor in tensors.items():
        part, dot, rest = name.partition(".")
        if dot and part in PARTS:
            parts.setdefault(part, {})[rest] = tensor
        else:
            others.append(name)
    # With bias="all", XTuner saves every bias, those of frozen parts and of the tower too
    # (`get_peft_model_state_dict` in xtuner/model/utils.py): such a part is no whole model.
    adapters = {
        part: found
        for part, found in parts.items()
        if is_adapted(found) or (part != PROJECTOR and all(name.endswith("bias") for name in found))
    }
    weights = {part: found for part, found in parts.items() if part not in adapters}
    return SplitState(weights, adapters, tuple(others))
