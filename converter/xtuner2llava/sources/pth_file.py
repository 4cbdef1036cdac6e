"""`iter_N.pth` as one file, written by mmengine's CheckpointHook.

Top level: `meta` (with the resolved config as text under `cfg`), `state_dict`, `message_hub` and
more (open-mmlab/mmengine `mmengine/runner/runner.py`, `save_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.sources.contents import PROJECTOR, Contents, split_state
from xtuner2llava.sources.pickle_data import Value
from xtuner2llava.sources.torch_file import TorchFile
from xtuner2llava.sources.weights import Fingerprint, tensor_references


def open_pth_file(path: Path) -> Contents:
    """The contents of a `.pth` file; no tensor is read.

    Raises `CheckpointError` and says what the file is where it is no LLaVA checkpoint of XTuner.
    """
    opened = TorchFile(path)
    value = opened.value
    state_dict = value
    if isinstance(value, dict) and "state_dict" in value:
        state_dict = value["state_dict"]
    elif isinstance(value, dict) and "optimizer_state_dict" in value:
        raise UnsupportedError(
            "one rank's optimizer states of a DeepSpeed checkpoint",
            where=str(path),
            advice="Give the directory that it lies in.",
        )
    meta = value.get("meta") if isinstance(value, dict) else None
    state = split_state(opened.tensors(tensor_references(state_dict, str(path))))
    if PROJECTOR not in state.weights:
        raise _without_projector(path, meta, [*state.weights, *state.adapters], state.others)
    if state.others:
        raise UnsupportedError(
            f"{len(state.others)} tensors belong to no part of LLaVA, such as '{state.others[0]}'",
            where=str(path),
            advice="Expected are llm.*, visual_encoder.* and projector.*, as XTuner's LLaVAModel "
            "writes them.",
        )
    return Contents(
        path=path,
        layout="iter .pth file",
        weights=state.weights,
        adapters=state.adapters,
        files=(Fingerprint(path.name, opened.file.size, opened.digest),),
        config=config_text(meta, path),
        iteration=iteration(meta),
    )


def config_text(meta: Value, path: Path) -> tuple[str, str] | None:
    """The XTuner config that mmengine keeps in a checkpoint's `meta`, and where it stands."""
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return (text, f"{path} (meta.cfg)") if isinstance(text, str) else None


def iteration(meta: Value) -> int | None:
    found = meta.get("iter") if isinstance(meta, dict) else None
    return found if isinstance(found, int) else None


def _without_projector(
    path: Path, meta: Value, parts: Sequence[str], others: Sequence[str]
) -> UnsupportedError:
    text = config_text(meta, path)
    if text and "SupervisedFinetune" in text[0]:
        what = "a checkpoint of SupervisedFinetune: text only, no projector"
        advice = "Only LLaVA trainings can become LLaVA; use `xtuner convert pth_to_hf` for this."
    elif parts:
        what = f"has tensors of {' and '.join(parts)}, but none of the projector"
        advice = "XTuner's LLaVAModel always saves `projector.*`; is this the right file?"
    else:
        seen = ", ".join(others[:3]) or "no tensors at all"
        what = f"no LLaVA checkpoint of XTuner: no projector.*, but {seen}"
        advice = "Give XTuner's iter_N.pth, its DeepSpeed directory, or an iter_N_xtuner folder."
    return UnsupportedError(what, where=str(path), advice=advice)
