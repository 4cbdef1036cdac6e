"""`iter_N_xtuner/`, what `xtuner convert pth_to_hf` writes for LLaVA.

The LLM lies at top level or in `llm/`, or as `llm_adapter/`; `visual_encoder/` or
`visual_encoder_adapter/`, and `projector/` beside it; a part that was frozen is absent
(InternLM/xtuner `xtuner/model/llava.py`, `to_xtuner_llava`). Users put the base models beside their
adapters, so that XTuner's chat and VLMEvalKit find everything in one folder.
"""

from __future__ import annotations

import os
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
from xtuner2llava.tensors import LazyTensor

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
    return _Folder(path).artifact()


class _Folder:
    """The work of `open_xtuner_folder`, with what it collects on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[Fingerprint] = []
        self._unread: list[str] = []

    def artifact(self) -> Artifact:
        path = self._path
        homes = {part: path / part for part in (PROJECTOR, VISUAL_ENCODER, LLM)}
        folders = {part: home for part, home in homes.items() if home.is_dir()}
        if self._has_llm_at_top(has_folder=LLM in folders):
            folders[LLM] = path
        weights = {part: self._weights(home) for part, home in folders.items()}
        adapters: dict[str, dict[str, LazyTensor]] = {}
        settings: dict[str, LoraSettings] = {}
        for part, name in ADAPTERS.items():
            home = path / name
            if home.is_dir():
                adapters[part] = self._weights(home, ("adapter_model", "adapter_model"))
                if (home / _ADAPTER).is_file():
                    values = read_json(home / _ADAPTER)
                    settings[part] = LoraSettings.from_mapping(values, str(home / _ADAPTER))
        if folders.get(LLM) != path:
            self._unread += unread_weights(path, None, ())
        self._unread += [f"{entry.name}/" for entry in sorted(path.iterdir()) if _is_left(entry)]
        notes = (
            f"{path.name} also holds {', '.join(self._unread)}, not read: where weights are there "
            "twice, safetensors go before .bin, and one file before shards, as in transformers.",
        )
        return Artifact(
            path=path,
            layout="XTuner folder",
            weights=weights,
            adapters=adapters,
            settings=settings,
            files=tuple(self._files),
            config=_config_text(path / _CONFIG),
            folders=folders,
            notes=notes if self._unread else (),
        )

    def _has_llm_at_top(self, *, has_folder: bool) -> bool:
        """Whether the LLM is at top level; raises `CheckpointError` where that is not clear."""
        path, at_top, loose = self._path, find_weights(self._path), _loose(self._path)
        if has_folder and at_top is not None:
            raise UnsupportedError(
                f"holds two LLMs: {at_top.name} at top level, and the one in {LLM}/",
                where=str(path),
                advice="Move the one that is not meant out of the folder.",
            )
        adapters = [name for name in loose if name.startswith("adapter_model")]
        if not has_folder and at_top is None and adapters:
            raise UnsupportedError(
                f"holds {adapters[0]} at top level, and nothing says of which part",
                where=str(path),
                advice=f"An adapter of the LLM, with its {_ADAPTER}, belongs in {ADAPTERS[LLM]}/.",
            )
        if not has_folder and (at_top is not None or loose):
            return True
        config = path / "config.json"
        expected = not has_folder and not (path / ADAPTERS[LLM]).is_dir() and config.is_file()
        if expected and "architectures" in read_json(config):
            what = "has the config.json of an LLM, and no weights of it"
            raise CorruptFileError(what, where=str(path), advice=_INCOMPLETE)
        return False

    def _weights(
        self, home: Path, stems: tuple[str, str] = ("model", "pytorch_model")
    ) -> dict[str, LazyTensor]:
        """All tensors of one of the folders, which must have some."""
        found = find_weights(home, stems)
        if found is None:
            loose = _loose(home)
            what = "has no weights in it"
            if loose:
                what = f"has {loose[0]}, but not the index that names it"
            names = f"{stems[0]}.safetensors, {stems[-1]}.bin or their index"
            advice = f"Expected {names}. {_INCOMPLETE}"
            raise CorruptFileError(what, where=str(home), advice=advice)
        opened = open_weights(found)
        codes = quantised(opened.tensors)
        if codes is not None:
            raise UnsupportedError(codes, where=str(found))
        prefix = "" if home == self._path else f"{home.name}/"
        self._files += [replace(file, name=prefix + file.name) for file in opened.files]
        self._unread += [prefix + name for name in unread_weights(home, found, opened.files)]
        return dict(opened.tensors)


def _loose(folder: Path) -> list[str]:
    """Weight files that could be loaded if they had the right name or an index."""
    return [name for name in unread_weights(folder, None, ()) if name.endswith(_LOADABLE)]


def _is_left(entry: Path) -> bool:
    """Whether `entry` is a folder that holds weights, and not one of those that XTuner writes."""
    if entry.name in PART_FOLDERS or not entry.is_dir():
        return False
    return (entry / _ADAPTER).is_file() or bool(unread_weights(entry, None, ()))


def _config_text(path: Path) -> tuple[str, str] | None:
    if not path.is_file():
        return None
    return read_small(path, _MAX_CONFIG_BYTES).decode("utf-8", "replace"), str(path)
