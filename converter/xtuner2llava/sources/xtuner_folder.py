"""`iter_N_xtuner/`, what `xtuner convert pth_to_hf` writes for LLaVA.

The LLM lies at top level or in `llm/`, or as `llm_adapter/`; `visual_encoder/` or
`visual_encoder_adapter/`, and `projector/` beside it; a part that was frozen is absent
(InternLM/xtuner `xtuner/model/llava.py`, `to_xtuner_llava`). Users put the base models beside their
adapters, so that XTuner's chat and VLMEvalKit find everything in one folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, OutputError, UnsupportedError
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER, Artifact
from xtuner2llava.sources.lora_settings import LoraSettings
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.json_file import read_json
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.storage.weights import (
    find_weights,
    open_weights,
    quantised,
    unread_weights,
)
from xtuner2llava.tensors.lazy import LazyTensor

_CONFIG = "xtuner_config.py"
_ADAPTER = "adapter_config.json"
_MAX_CONFIG_BYTES = 4 << 20
_LOADABLE = (".safetensors", ".bin", ".index.json")
_INCOMPLETE = "Is the download complete?"
# The folders of an XTuner folder, by what they hold.
ADAPTERS = {LLM: f"{LLM}_adapter", VISUAL_ENCODER: f"{VISUAL_ENCODER}_adapter"}
PART_FOLDERS = frozenset({PROJECTOR, LLM, VISUAL_ENCODER, *ADAPTERS.values()})


def check_no_part(checkpoint: Path, out: Path) -> None:
    """Raises `OutputError` where a folder `out` would be read as a part of `checkpoint`."""
    home, out_path = (Path(os.path.realpath(path)) for path in (checkpoint, out))
    if out_path.parent == home and out_path.name in PART_FOLDERS:
        raise OutputError(
            f"would be read as a part of the checkpoint {home.name}",
            where=str(out),
            advice="Choose another OUT.",
        )


def is_xtuner_folder(path: Path) -> bool:
    """Whether `path` looks like one: a projector in a folder of its own is in all of them."""
    return (path / PROJECTOR).is_dir()


def open_xtuner_folder(path: Path) -> Artifact:
    """The XTuner folder `path`; headers only are read.

    Raises `CheckpointError` for a folder without its weights, and for an LLM that is there twice.
    """
    parts = {part: path / part for part in (PROJECTOR, VISUAL_ENCODER, LLM)}
    folders = {part: home for part, home in parts.items() if home.is_dir()}
    if _has_llm_at_top(path):
        folders[LLM] = path
    homes = {part: path / name for part, name in ADAPTERS.items() if (path / name).is_dir()}
    files: list[Fingerprint] = []
    unread: list[str] = []

    def tensors_in(home: Path, *stems: str) -> Mapping[str, LazyTensor]:
        found = _find_weights(home, *stems)
        opened = open_weights(found, sampled=True)
        codes = quantised(opened.tensors)
        if codes is not None:
            raise UnsupportedError(codes, where=str(found))
        prefix = "" if home == path else f"{home.name}/"
        files.extend(replace(file, name=prefix + file.name) for file in opened.files)
        unread.extend(prefix + name for name in unread_weights(home, found, opened.files))
        return opened.tensors

    weights = {part: tensors_in(home, "model", "pytorch_model") for part, home in folders.items()}
    adapters = {part: tensors_in(home, "adapter_model") for part, home in homes.items()}
    if folders.get(LLM) != path:
        unread += unread_weights(path, None, ())
    unread += [f"{entry.name}/" for entry in sorted(path.iterdir()) if _is_left(entry)]
    note = (
        f"{path.name} also holds {', '.join(unread)}, not read: where weights are there twice, "
        "safetensors go before .bin, and one file before shards, as in transformers."
    )
    config = path / _CONFIG
    return Artifact(
        path,
        "XTuner folder",
        weights,
        tuple(files),
        adapters,
        settings={
            part: LoraSettings.from_mapping(read_json(file), str(file))
            for part, home in homes.items()
            if (file := home / _ADAPTER).is_file()
        },
        config=(read_small(config, _MAX_CONFIG_BYTES).decode("utf-8-sig", "replace"), str(config))
        if config.is_file()
        else None,
        folders=folders,
        notes=(note,) if unread else (),
    )


def _has_llm_at_top(path: Path) -> bool:
    """Whether the LLM is at top level; raises `CheckpointError` where that is not clear."""
    at_top, loose, where = find_weights(path), _loose(path), str(path)
    if (path / LLM).is_dir():
        if at_top is None:
            return False
        raise UnsupportedError(
            f"holds two LLMs: {at_top.name} at top level, and the one in {LLM}/",
            where=where,
            advice="Move the one that is not meant out of the folder.",
        )
    adapters = [name for name in loose if name.startswith("adapter_model")]
    if at_top is None and adapters:
        raise UnsupportedError(
            f"holds {adapters[0]} at top level, and nothing says of which part",
            where=where,
            advice=f"An adapter of the LLM, with its {_ADAPTER}, belongs in {ADAPTERS[LLM]}/.",
        )
    if at_top is not None or loose:
        return True
    config = path / "config.json"
    expected = config.is_file() and not (path / ADAPTERS[LLM]).is_dir()
    if expected and "architectures" in read_json(config):
        what = "has the config.json of an LLM, and no weights of it"
        raise CorruptFileError(what, where=where, advice=_INCOMPLETE)
    return False


def _find_weights(home: Path, *stems: str) -> Path:
    """The weights in one of the folders, which must have some."""
    found, loose = find_weights(home, stems), _loose(home)
    if found is None:
        what = (
            f"has {loose[0]}, but not the index that names it" if loose else "has no weights in it"
        )
        names = f"{stems[0]}.safetensors, {stems[-1]}.bin or their index"
        advice = f"Expected {names}. {_INCOMPLETE}"
        raise CorruptFileError(what, where=str(home), advice=advice)
    return found


def _loose(folder: Path) -> list[str]:
    """Weight files that could be loaded if they had the right name or an index."""
    return [name for name in unread_weights(folder, None, ()) if name.endswith(_LOADABLE)]


def _is_left(entry: Path) -> bool:
    """Whether `entry` is a folder that holds weights, and not one of those that XTuner writes."""
    if entry.name in PART_FOLDERS or not entry.is_dir():
        return False
    return (entry / _ADAPTER).is_file() or bool(unread_weights(entry, None, ()))
