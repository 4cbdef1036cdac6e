"""`open_artifact`: recognizes the layout of a path or Hub repo id, and opens it."""

from __future__ import annotations

import re
from pathlib import Path

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.hub.download import fetch_checkpoint, is_reference, local_path
from xtuner2llava.sources.artifact import PROJECTOR, Artifact, artifact_of_state
from xtuner2llava.sources.other_inputs import (
    not_there,
    unknown_folder,
    unlike_a_checkpoint,
    xtuner_folder_of,
)
from xtuner2llava.sources.pth_file import open_pth_file
from xtuner2llava.sources.xtuner_folder import is_xtuner_folder, open_xtuner_folder
from xtuner2llava.sources.zero_directory import MASTER, open_zero_directory, zero_directory
from xtuner2llava.storage.weights import (
    find_weights,
    open_weights,
    unread_weights,
    weight_names,
)

_SHARD = re.compile(r"-\d+-of-\d+\.")


def open_artifact(reference: str, weights: str = MASTER) -> Artifact:
    """The artifact at `reference`, recognized by its content rather than its name."""
    path = local_path(reference)
    directory = zero_directory(path)
    if directory is not None:
        return open_zero_directory(directory, weights)
    # XTuner's models are all of an owner; a word alone is a path that was mistyped.
    if not path.exists() and "/" in reference and is_reference(reference):
        path = fetch_checkpoint(reference)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise not_there(reference, path)
    if path.name.endswith((".safetensors", ".bin", ".index.json")):
        return _open_weight_file(path)
    refused = unlike_a_checkpoint(path)
    if refused is not None:
        raise refused
    return open_pth_file(path)


def _open_folder(path: Path) -> Artifact:
    if is_xtuner_folder(path):
        return open_xtuner_folder(path)
    found = find_weights(path)
    if found is not None and any(name.startswith(f"{PROJECTOR}.") for name in weight_names(found)):
        return _open_state(found)
    raise unknown_folder(path)


def _open_weight_file(path: Path) -> Artifact:
    """A file of weights by itself: all of LLaVAModel's state dict, or a part of something else."""
    belongs_to = xtuner_folder_of(path.parent)
    if belongs_to is not None:
        raise UnsupportedError(
            f"one part of the XTuner folder {belongs_to.name}",
            where=str(path),
            advice=f"Give the whole folder: {belongs_to}",
        )
    if path.name.endswith(".index.json"):
        return _open_state(path)
    if _SHARD.search(path.name):
        index = path.with_name(_SHARD.sub(".", path.name) + ".index.json")
        if not index.is_file():
            raise UnsupportedError(
                "one shard of several, and the index that names them all is not beside it",
                where=str(path),
                advice="Give the folder with all shards and their index.",
            )
        return _open_state(index)
    return open_pth_file(path) if path.suffix == ".bin" else _open_state(path)


def _open_state(path: Path) -> Artifact:
    """LLaVAModel's state dict in a weight file or in the shards that an index names.

    DeepSpeed's `zero_to_fp32.py` writes such folders, with shards of 5 GB.
    """
    opened = open_weights(path)
    unread = unread_weights(path.parent, path, opened.files)
    return artifact_of_state(
        opened.tensors,
        path,
        "state dict, as zero_to_fp32.py writes",
        opened.files,
        notes=(f"Beside {path.name} lies {', '.join(unread)}, not read.",) if unread else (),
    )
