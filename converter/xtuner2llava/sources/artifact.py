"""An artifact of XTuner: what one path holds, without base models, in any layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xtuner2llava.errors import Fault, UnsupportedError, raise_faults
from xtuner2llava.sources.adapter import is_adapted
from xtuner2llava.sources.lora_settings import LoraSettings
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.pickle_reader import Value, as_dict
from xtuner2llava.storage.weights import quantised
from xtuner2llava.tensors.lazy import LazyTensor

LLM = "llm"
VISUAL_ENCODER = "visual_encoder"
PROJECTOR = "projector"
# The attributes of XTuner's LLaVAModel, which prefix the keys of its state dict
# (InternLM/xtuner `xtuner/model/llava.py`).
PARTS = (LLM, VISUAL_ENCODER, PROJECTOR)
_OF_PROJECTOR = re.compile(r"model\.\d+\.(weight|bias)")
_EXPECTED = (
    "Expected are llm.*, visual_encoder.* and projector.*, as XTuner's LLaVAModel writes them."
)
_UNQUANTISED = (
    "Codes are not the weights that became them. Of a QLoRA training, give the file that XTuner "
    "wrote: it holds the adapter alone, which is merged onto the unquantised base."
)
# What such an input is, and what to give instead.
PROJECTOR_ALONE = (
    "the projector alone, which is one part of what XTuner's training made",
    "Give the iter_N_xtuner folder that it belongs to, or XTuner's iter_N.pth.",
)
ADAPTER_ALONE = (
    "a LoRA adapter alone, without the projector that belongs to it",
    "Give the iter_N_xtuner folder that it lies in, or XTuner's iter_N.pth.",
)


@dataclass(frozen=True, slots=True)
class Artifact:
    """The tensors of each part that was trained, and what else the artifact holds.

    A part that was frozen is absent from `weights`; one that was trained as LoRA is in `adapters`,
    with `settings` where an `adapter_config.json` lies beside it. One in both is an adapter beside
    the weights under it. `config` is the XTuner config's text and its place; `folders` are those
    with a part's own `config.json`, tokenizer or image processor.
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


def artifact_of_state(
    tensors: Mapping[str, LazyTensor],
    path: Path,
    layout: str,
    files: tuple[Fingerprint, ...],
    *,
    meta: Value = None,
    meta_file: Path | None = None,
    notes: tuple[str, ...] = (),
) -> Artifact:
    """The artifact whose tensors are LLaVAModel's state dict, as in every layout but one.

    `meta`, which lies in `meta_file`, is what mmengine saves beside it: the config as text, and the
    iteration. Raises `UnsupportedError`, which says what the tensors are, where they are not those.
    """
    text, iteration = as_dict(meta).get("cfg"), as_dict(meta).get("iter")
    config = (text, f"{meta_file} (meta.cfg)") if isinstance(text, str) else None
    parts: dict[str, dict[str, LazyTensor]] = {}
    others: list[str] = []
    for name, tensor in tensors.items():
        part, dot, rest = name.partition(".")
        if dot and part in PARTS:
            parts.setdefault(part, {})[rest] = tensor
        else:
            others.append(name)
    # With bias="all", XTuner saves every bias, those of frozen parts and of the tower too
    # (`get_peft_model_state_dict` in xtuner/model/utils.py): such a part is not a whole model.
    adapters = {
        part: found
        for part, found in parts.items()
        if is_adapted(found) or (part != PROJECTOR and all(name.endswith("bias") for name in found))
    }
    faults = [
        Fault(f"{path}, {part}", what, _UNQUANTISED)
        for part, found in parts.items()
        if (what := quantised(found)) is not None
    ]
    if PROJECTOR in adapters:
        what = "its projector is under an adapter, which XTuner's LLaVAModel never is"
        faults.append(Fault(str(path), what))
    elif PROJECTOR not in parts:
        faults.append(Fault(str(path), *_without_projector(config, list(parts), others)))
    elif others:
        what = f"{len(others)} tensors belong to no part of LLaVA, such as '{others[0]}'"
        faults.append(Fault(str(path), what, _EXPECTED))
    raise_faults(UnsupportedError, faults)
    return Artifact(
        path,
        layout,
        {part: found for part, found in parts.items() if part not in adapters},
        files,
        adapters,
        config=config,
        iteration=iteration if isinstance(iteration, int) else None,
        notes=notes,
    )


def _without_projector(
    config: tuple[str, str] | None, parts: list[str], others: list[str]
) -> tuple[str, str]:
    """What tensors without a projector are, and what to give instead."""
    if config is not None and "SupervisedFinetune" in config[0]:
        what = "a checkpoint of SupervisedFinetune: text only, no projector"
        advice = "Only LLaVA trainings can become LLaVA; use `xtuner convert pth_to_hf` for this."
    elif parts:
        what = f"has tensors of {' and '.join(parts)}, but none of the projector"
        advice = "XTuner's LLaVAModel always saves `projector.*`; is this the right file?"
    elif others and all(_OF_PROJECTOR.fullmatch(name) for name in others):
        what, advice = PROJECTOR_ALONE
    elif is_adapted(others):
        what, advice = ADAPTER_ALONE
    else:
        seen = ", ".join(others[:3]) or "no tensors at all"
        what = f"not a LLaVA checkpoint of XTuner: no projector.*, but {seen}"
        advice = "Give XTuner's iter_N.pth, its DeepSpeed directory, or an iter_N_xtuner folder."
    return what, advice
