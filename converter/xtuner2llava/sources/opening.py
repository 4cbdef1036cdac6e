"""`open_artifact`: recognizes what a path or Hub repo id is; opens it, or says what to give.

`iter_N.pth` as one file is written by mmengine's CheckpointHook. Its top level has `meta` (with the
resolved config as text under `cfg`), `state_dict`, `message_hub` and more (open-mmlab/mmengine
`mmengine/runner/runner.py`, `save_checkpoint`).
"""

from __future__ import annotations

import re
from pathlib import Path

from xtuner2llava.errors import UnsupportedError, UsageError
from xtuner2llava.hub.download import fetch_checkpoint, is_reference, local_path
from xtuner2llava.sources.artifact import (
    ADAPTER_ALONE,
    PROJECTOR,
    PROJECTOR_ALONE,
    Artifact,
    artifact_of_state,
)
from xtuner2llava.sources.xtuner_folder import PART_FOLDERS, is_xtuner_folder, open_xtuner_folder
from xtuner2llava.sources.zero_directory import MASTER, open_zero_directory, zero_directory
from xtuner2llava.storage.json_file import read_json, text
from xtuner2llava.storage.pickle_reader import TensorReference, as_dict
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import (
    find_weights,
    open_weights,
    tensor_references,
    unread_weights,
    weight_names,
)

_WEIGHTS = (".safetensors", ".bin", ".index.json")
_SHARD = re.compile(r"-\d+-of-\d+\.(?=(?:safetensors|bin)$)")
# What mmengine's `save_checkpoint` writes; the tensors of an optimizer are not weights.
_TOP_LEVEL = ("meta", "state_dict", "message_hub", "optimizer", "param_schedulers")
# Multimodal models of XTuner's v1 trainer, which saves them whole (xtuner/v1/model/compose).
_V1_MODELS = ("internvl", "intern_s1", "interns1", "qwen3_vl", "qwen3_5", "qwen2_5_vl")
_CHECKPOINTS = ("iter_", "epoch_")
_MAX_LAST_BYTES = 4096


def open_artifact(reference: str, weights: str = MASTER) -> Artifact:
    """The artifact at `reference`, recognized by its content rather than its name.

    No tensor is read. Raises `CheckpointError`, which says what it is, where it is not a LLaVA
    checkpoint of XTuner.
    """
    path = local_path(reference)
    directory = zero_directory(path)
    if directory is not None:
        return open_zero_directory(directory, weights)
    if not path.exists() and is_reference(reference):
        path = fetch_checkpoint(reference)
    if path.is_dir():
        if is_xtuner_folder(path):
            return open_xtuner_folder(path)
        found = find_weights(path)
        if found and any(name.startswith(f"{PROJECTOR}.") for name in weight_names(found)):
            return _open_state(found)
        raise _another_folder(path)
    if not path.is_file():
        raise _not_there(reference, path)
    index = path.with_name(_SHARD.sub(".", path.name) + ".index.json")
    if (other := _another_file(path, index)) is not None:
        raise UnsupportedError(other[0], where=str(path), advice=other[1])
    if _SHARD.search(path.name):
        return _open_state(index)
    is_state = path.name.endswith((".safetensors", ".index.json"))
    return _open_state(path) if is_state else _open_pth(path)


def _open_pth(path: Path) -> Artifact:
    opened = TorchFile(path)
    top = as_dict(opened.value)
    if "optimizer_state_dict" in top and "state_dict" not in top:
        raise UnsupportedError(
            "one rank's optimizer states of a DeepSpeed checkpoint",
            where=str(path),
            advice="Give the directory that it lies in.",
        )
    # mmengine's EMAHook saves `ema_state_dict`.
    unread = [
        repr(key)
        for key, entry in top.items()
        if "state_dict" in top
        and key not in _TOP_LEVEL
        and any(isinstance(one, TensorReference) for one in (entry, *as_dict(entry).values()))
    ]
    note = (
        f"{path.name} also holds tensors under {', '.join(unread)}, which are not read: XTuner "
        "loads 'state_dict'."
    )
    return artifact_of_state(
        opened.tensors(tensor_references(top.get("state_dict", opened.value), str(path))),
        path,
        "iter .pth file",
        (opened.fingerprint,),
        meta=top.get("meta"),
        meta_file=path,
        notes=(note,) if unread else (),
    )


def _open_state(path: Path) -> Artifact:
    """LLaVAModel's state dict in a weight file or in the shards that an index names.

    DeepSpeed's `zero_to_fp32.py` writes such folders, with shards of 5 GB.
    """
    opened = open_weights(path, sampled=True)
    unread = unread_weights(path.parent, path, opened.files)
    return artifact_of_state(
        opened.tensors,
        path,
        "state dict, as zero_to_fp32.py writes",
        opened.files,
        notes=(f"Beside {path.name} lies {', '.join(unread)}, not read.",) if unread else (),
    )


def _xtuner_folder_of(path: Path) -> Path | None:
    """The XTuner folder that the folder `path` is, or is a part of."""
    if is_xtuner_folder(path):
        return path
    parent = path.absolute().parent
    return parent if path.name in PART_FOLDERS and is_xtuner_folder(parent) else None


def _not_there(reference: str, path: Path) -> UsageError:
    """The error that nothing is at `path`, with the checkpoints that lie near it."""
    advice = "Expected an iter_N.pth file or directory, an iter_N_xtuner folder, or a Hub repo id."
    try:
        where = next(above for above in path.absolute().parents if above.is_dir())
        inner = _checkpoints(_names(where))
        advice = f"Looked for it in {where}" + (
            f", which holds {inner}." if inner else f". {advice}"
        )
    except (OSError, ValueError):
        pass
    what = "is not a plain file" if path.exists() else "no such file or folder"
    return UsageError(what, where=reference, advice=advice)


def _another_file(path: Path, index: Path) -> tuple[str, str] | None:
    """What a file is that is not a whole checkpoint, and what to give instead.

    `index` is where the index lies if the file is a shard.
    """
    if path.name == "last_checkpoint":
        named = read_small(path, _MAX_LAST_BYTES).decode("utf-8", "replace").strip()
        beside = path.parent / Path(named).name
        there = next((p for p in (Path(named), beside) if p.exists()), Path(named))
        what = f"the file in which mmengine notes the newest checkpoint, '{named[:200]}'"
        return what, f"Give that: {str(there)[:200]}"
    if path.suffix == ".py":
        return (
            "a Python file, such as an XTuner config, not a checkpoint",
            "`inspect` says what a training with it will become; to convert, give iter_N.pth, and "
            "the config with --xtuner-config.",
        )
    whole = _xtuner_folder_of(path.parent)
    if whole is not None and path.name.endswith(_WEIGHTS):
        return f"one part of the XTuner folder {whole.name}", f"Give the whole folder: {whole}"
    if _SHARD.search(path.name) and not index.is_file():
        return (
            "one shard of several, and the index that names them all is not beside it",
            "Give the folder with all shards and their index.",
        )
    return None


def _another_folder(path: Path) -> UnsupportedError:
    """The error for a folder without a checkpoint, by the files in it."""
    names = _names(path)
    if (whole := _xtuner_folder_of(path)) is not None:
        what = f"the {path.name}/ of the XTuner folder {whole.name}, one part of what was trained"
        advice = f"Give the whole folder: {whole}"
    elif any(name.endswith(".distcp") for name in names | _names(path / "weights")):
        what = "a distributed checkpoint (DCP), which XTuner's v1 trainer writes, and not for LLaVA"
        advice = "LLaVA is trained by XTuner 0.1 and 0.2: expected iter_N.pth or iter_N_xtuner."
    elif "adapter_config.json" in names:
        what, advice = ADAPTER_ALONE
    elif "config.json" in names:
        what, advice = _model_folder(path)
    else:
        what = "an empty folder" if not names else "not a checkpoint that XTuner writes"
        advice = "Expected iter_N.pth, a DeepSpeed directory, or an iter_N_xtuner folder."
        if inner := _checkpoints(names):
            advice = f"It holds {inner}: give one of these."
    return UnsupportedError(what, where=str(path), advice=advice)


def _model_folder(path: Path) -> tuple[str, str]:
    kind = text(read_json(path / "config.json"), "model_type") or "unknown"
    if kind == "projector":
        return PROJECTOR_ALONE
    advice = "Give it as --llm or --vision, and XTuner's checkpoint as CHECKPOINT."
    if "llava" in kind.lower():
        advice = "It is LLaVA already: give what XTuner wrote."
    elif kind.lower().startswith(_V1_MODELS):
        advice = "XTuner's v1 trainer writes such folders; a model of its own kind, not LLaVA."
    what = f"a Hugging Face model folder (model_type {kind[:40]!r}) without XTuner's projector/"
    return what, advice


def _checkpoints(names: set[str]) -> str:
    return ", ".join(sorted(name for name in names if name.startswith(_CHECKPOINTS))[:4])


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
