"""Inputs that are not checkpoints: what they are, and what to give instead."""

from __future__ import annotations

from pathlib import Path

from xtuner2llava.errors import UnsupportedError, UsageError
from xtuner2llava.sources.artifact import ADAPTER_ALONE, PROJECTOR_ALONE
from xtuner2llava.sources.xtuner_folder import PART_FOLDERS, is_xtuner_folder
from xtuner2llava.storage.json_file import read_json, text
from xtuner2llava.storage.small_file import read_small

# Multimodal models of XTuner's v1 trainer, which saves them whole (xtuner/v1/model/compose).
_V1_MODELS = ("internvl", "intern_s1", "interns1", "qwen3_vl", "qwen3_5", "qwen2_5_vl")
_EXPECTED = "Expected iter_N.pth, a DeepSpeed directory, or an iter_N_xtuner folder."
_CHECKPOINTS = ("iter_", "epoch_")
_LAST = "last_checkpoint"
_MAX_LAST_BYTES = 4096


def not_there(reference: str, path: Path) -> UsageError:
    """The error that nothing is at `path`, with the checkpoints that lie near it."""
    expected = (
        "Expected an iter_N.pth file or directory, an iter_N_xtuner folder, or a Hub repo id."
    )
    try:
        where = next(above for above in path.absolute().parents if above.is_dir())
        inner = sorted(name for name in _names(where) if name.startswith(_CHECKPOINTS))
        advice = f"Looked for it in {where}"
        advice += f", which holds {', '.join(inner[:4])}." if inner else f". {expected}"
    except (OSError, ValueError):
        advice = expected
    return UsageError("no such file or folder", where=reference, advice=advice)


def unlike_a_checkpoint(path: Path) -> UnsupportedError | None:
    """The error for a file whose name shows that it is not a checkpoint."""
    if path.name == _LAST:
        named = read_small(path, _MAX_LAST_BYTES).decode("utf-8", "replace").strip()
        beside = path.parent / Path(named).name
        found = next((p for p in (Path(named), beside) if p.exists()), Path(named))
        return UnsupportedError(
            f"the file in which mmengine notes the newest checkpoint, '{named[:200]}'",
            where=str(path),
            advice=f"Give that: {str(found)[:200]}",
        )
    if path.suffix == ".py":
        return UnsupportedError(
            "a Python file, such as an XTuner config, not a checkpoint",
            where=str(path),
            advice="`inspect` says what a training with it will become; to convert, give "
            "iter_N.pth, and the config with --xtuner-config.",
        )
    return None


def xtuner_folder_of(path: Path) -> Path | None:
    """The XTuner folder that the folder `path` is, or is a part of."""
    if is_xtuner_folder(path):
        return path
    parent = path.absolute().parent
    return parent if path.name in PART_FOLDERS and is_xtuner_folder(parent) else None


def unknown_folder(path: Path) -> UnsupportedError:
    """The error for a folder without a checkpoint, by the files in it."""
    names = _names(path)
    whole = xtuner_folder_of(path)
    if whole is not None:
        what = f"the {path.name}/ of the XTuner folder {whole.name}, one part of what was trained"
        advice = f"Give the whole folder: {whole}"
    elif any(name.endswith(".distcp") for name in {*names, *_names(path / "weights")}):
        what = "a distributed checkpoint (DCP), which XTuner's v1 trainer writes, and not for LLaVA"
        advice = "LLaVA is trained by XTuner 0.1 and 0.2: expected iter_N.pth or iter_N_xtuner."
    elif "adapter_config.json" in names:
        what, advice = ADAPTER_ALONE
    elif "config.json" in names:
        what, advice = _model_folder(path)
    else:
        what = "an empty folder" if not names else "not a checkpoint that XTuner writes"
        inner = sorted(name for name in names if name.startswith(_CHECKPOINTS))
        advice = f"It holds {', '.join(inner[:4])}: give one of these." if inner else _EXPECTED
    return UnsupportedError(what, where=str(path), advice=advice)


def _model_folder(path: Path) -> tuple[str, str]:
    kind = text(read_json(path / "config.json"), "model_type") or "unknown"
    if kind == "projector":
        return PROJECTOR_ALONE
    what = f"a Hugging Face model folder (model_type {kind[:40]!r}) without XTuner's projector/"
    if "llava" in kind.lower():
        return what, "It is LLaVA already: give what XTuner wrote."
    if kind.lower().startswith(_V1_MODELS):
        advice = "XTuner's v1 trainer writes such folders; a model of its own kind, not LLaVA."
        return what, advice
    return what, "Give it as --llm or --vision, and XTuner's checkpoint as CHECKPOINT."


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
