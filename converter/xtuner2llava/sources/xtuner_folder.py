"""`iter_N_xtuner/`, what `xtuner convert pth_to_hf` writes for LLaVA.

The LLM lies at top level or in `llm/`, or as `llm_adapter/`; `visual_encoder/` or
`visual_encoder_adapter/`, and `projector/` beside it; a part that was frozen is absent
(InternLM/xtuner `xtuner/model/llava.py`, `to_xtuner_llava`).
"""

from __future__ import annotations

from pathlib import Path

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.sources.adapter import LoraSettings
from xtuner2llava.sources.contents import LLM, PROJECTOR, VISUAL_ENCODER, Contents
from xtuner2llava.sources.json_file import read_json
from xtuner2llava.sources.small_file import read_small
from xtuner2llava.sources.weights import Fingerprint, find_weights, open_weights
from xtuner2llava.tensors import LazyTensor

_CONFIG = "xtuner_config.py"
_MAX_CONFIG_BYTES = 4 << 20


def is_xtuner_folder(path: Path) -> bool:
    """Whether `path` looks like one: a projector in a folder of its own is in all of them."""
    return (path / PROJECTOR).is_dir()


def open_xtuner_folder(path: Path) -> Contents:
    """The contents of an XTuner folder; headers only are read."""
    homes = {PROJECTOR: path / PROJECTOR, VISUAL_ENCODER: path / VISUAL_ENCODER}
    homes[LLM] = path / LLM if (path / LLM).is_dir() else path
    weights: dict[str, dict[str, LazyTensor]] = {}
    folders: dict[str, Path] = {}
    files: list[Fingerprint] = []
    for part, home in homes.items():
        found = find_weights(home)
        if found is None:
            if part == PROJECTOR:
                raise CorruptFileError(
                    "has no weights in it", where=str(home), advice="Is the download complete?"
                )
            continue
        opened = open_weights(found)
        weights[part] = dict(opened.tensors)
        folders[part] = home
        prefix = "" if home == path else f"{home.name}/"
        files.extend(Fingerprint(prefix + f.name, f.size, f.digest) for f in opened.files)
    adapters: dict[str, dict[str, LazyTensor]] = {}
    settings: dict[str, LoraSettings] = {}
    for part in (LLM, VISUAL_ENCODER):
        home = path / f"{part}_adapter"
        if not home.is_dir():
            continue
        found = find_weights(home, ("adapter_model", "adapter_model"))
        if found is None:
            raise CorruptFileError(
                "has no adapter_model.safetensors or .bin",
                where=str(home),
                advice="Is the download complete?",
            )
        opened = open_weights(found)
        adapters[part] = dict(opened.tensors)
        files.extend(Fingerprint(f"{home.name}/{f.name}", f.size, f.digest) for f in opened.files)
        config = home / "adapter_config.json"
        if config.is_file():
            settings[part] = LoraSettings.from_mapping(read_json(config), str(config))
    return Contents(
        path=path,
        layout="XTuner folder",
        weights=weights,
        adapters=adapters,
        settings=settings,
        files=tuple(files),
        config=_config_text(path / _CONFIG),
        folders=folders,
    )


def _config_text(path: Path) -> tuple[str, str] | None:
    if not path.is_file():
        return None
    return read_small(path, _MAX_CONFIG_BYTES).decode("utf-8", "replace"), str(path)
