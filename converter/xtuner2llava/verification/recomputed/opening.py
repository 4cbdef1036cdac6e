"""The trained model from its checkpoint and base models, read without the converter's sources.

Shared with the conversion: how an XTuner config is read as data (`recipe/`), and how a Hub repo id
becomes a folder (`sources/hub.py`). What lies where in a checkpoint, which tensors belong to which
part, what a frozen or adapted part is made of: all that is written down here again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner2llava.errors import ConversionError, UnsupportedError, UsageError
from xtuner2llava.options import SourceOptions
from xtuner2llava.recipe import Recipe
from xtuner2llava.sources.hub import fetch_checkpoint, fetch_model, is_reference
from xtuner2llava.sources.json_file import Json, read_json
from xtuner2llava.verification.layout import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.verification.recomputed.adapter import LoraScale, is_adapter, with_adapter
from xtuner2llava.verification.recomputed.files import (
    FileTensor,
    TorchFiles,
    open_safetensors,
    state_dict,
)
from xtuner2llava.verification.recomputed.trained import Trained
from xtuner2llava.verification.recomputed.weight import Weight, of_file
from xtuner2llava.verification.recomputed.zero import is_zero_directory, open_zero

_PARTS = (LLM, VISUAL_ENCODER, PROJECTOR)
_FLAGS = {LLM: "--llm", VISUAL_ENCODER: "--vision"}


@dataclass(frozen=True, slots=True)
class Artefact:
    """What a checkpoint holds: tensors by part, the folders that parts have, the config's text."""

    path: Path
    tensors: Mapping[str, Mapping[str, FileTensor]]
    folders: Mapping[str, Path] = field(default_factory=dict)
    scales: Mapping[str, LoraScale] = field(default_factory=dict)
    config: tuple[str, str] | None = None


def open_trained(checkpoint: str, options: SourceOptions) -> Trained:
    """The model that `checkpoint` and its base models make; reads headers only.

    Raises `ConversionError` where something is missing or cannot be read.
    """
    with TorchFiles() as files:
        return _Opening(options, files).trained(checkpoint)


class _Opening:
    """The work of `open_trained`."""

    def __init__(self, options: SourceOptions, files: TorchFiles) -> None:
        self._options, self._files = options, files
        self._opened: dict[tuple[str, str], Artefact] = {}

    def trained(self, checkpoint: str) -> Trained:
        artefact = self._open(checkpoint, self._options.weights)
        recipe: Recipe | None = None
        if self._options.xtuner_config is not None:
            recipe = Recipe.from_file(Path(self._options.xtuner_config))
        elif artefact.config is not None:
            recipe = Recipe.from_text(*artefact.config)
        weights: dict[str, Mapping[str, Weight]] = {}
        folders: dict[str, Path] = {}
        for part in (LLM, VISUAL_ENCODER):
            weights[part], folders[part] = self._part(part, artefact, recipe)
        projector = artefact.tensors.get(PROJECTOR)
        if not projector:
            raise UnsupportedError("has no projector", where=str(artefact.path))
        weights[PROJECTOR] = {n: of_file(t) for n, t in projector.items()}
        return Trained(weights, folders, frozenset(artefact.tensors), recipe)

    def _part(
        self, part: str, artefact: Artefact, recipe: Recipe | None
    ) -> tuple[Mapping[str, Weight], Path]:
        """The weights of the LLM or the tower, and the folder of its config."""
        llm = part == LLM
        given = self._options.llm if llm else self._options.vision
        own = artefact.tensors.get(part)
        full = own if own and not is_adapter(own) else None
        if full is not None and part in artefact.folders and given is None:
            return _of_part(part, full), artefact.folders[part]
        recorded = None if recipe is None else recipe.llm_path if llm else recipe.vision_path
        folder = _base_folder(part, None if given is None else str(given), recorded)
        if full is not None:
            return _of_part(part, full), folder
        base = self._before(part, folder, recipe)
        if own:
            scale = artefact.scales.get(part) or _recorded_scale(part, recipe)
            alpha = self._options.lora_alpha if llm else self._options.vision_lora_alpha
            if alpha is not None:
                scale = LoraScale(alpha, scale.use_rslora, scale.fan_in_fan_out)
            base = with_adapter(base, own, scale)
        return base, folder

    def _before(self, part: str, folder: Path, recipe: Recipe | None) -> dict[str, Weight]:
        """What the part was before the run: of `pretrained_pth` if that trained it, or the base."""
        started = None if recipe is None else recipe.pretrained_pth
        if started is not None and Path(started).expanduser().exists():
            try:
                earlier = self._open(started, "master").tensors.get(part)
            except ConversionError:
                earlier = None
            if earlier and not is_adapter(earlier):
                return _of_part(part, earlier)
        found = self._weights_of(folder)
        if not found:
            raise UnsupportedError(f"has no weights, and {part} needs them", where=str(folder))
        return _of_part(part, found)

    def _open(self, reference: str, weights: str) -> Artefact:
        key = reference, weights
        if key not in self._opened:
            self._opened[key] = self._artefact(reference, weights)
        return self._opened[key]

    def _artefact(self, reference: str, weights: str) -> Artefact:
        path = Path(reference).expanduser()
        if path.is_file() and is_zero_directory(path.parent):
            path = path.parent
        if is_zero_directory(path):
            masters = weights == "master" and any(path.glob("*_optim_states.pt"))
            return _by_part(path, *open_zero(path, self._files, masters=masters))
        if path.is_file():
            value = self._files.open(path)
            values: dict[str, Any] = value if isinstance(value, dict) else {}
            meta = values.get("meta")
            found = state_dict(values.get("state_dict", values), str(path))
            return _by_part(path, found, meta if isinstance(meta, dict) else {})
        if not path.exists() and is_reference(reference):
            path = fetch_checkpoint(reference)
        if (path / "latest").is_file() and not (path / PROJECTOR).is_dir():
            tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
            if is_zero_directory(path / tag):
                return self._artefact(str(path / tag), weights)
        if not (path / PROJECTOR).is_dir():
            raise UsageError("is no checkpoint of XTuner", where=reference)
        return self._xtuner_folder(path)

    def _xtuner_folder(self, path: Path) -> Artefact:
        homes = {PROJECTOR: path / PROJECTOR, VISUAL_ENCODER: path / VISUAL_ENCODER}
        homes[LLM] = path / LLM if (path / LLM).is_dir() else path
        parts: dict[str, Mapping[str, FileTensor]] = {}
        folders: dict[str, Path] = {}
        scales: dict[str, LoraScale] = {}
        for part, home in homes.items():
            found = self._weights_of(home)
            if found:
                parts[part], folders[part] = found, home
        for part in (LLM, VISUAL_ENCODER):
            home = path / f"{part}_adapter"
            found = self._weights_of(home, "adapter_model", "adapter_model")
            if found:
                parts[part] = found
                folders.pop(part, None)
                scales[part] = _scale(read_json(home / "adapter_config.json"))
        config = path / "xtuner_config.py"
        text = (config.read_text(encoding="utf-8"), str(config)) if config.is_file() else None
        return Artefact(path, parts, folders, scales, text)

    def _weights_of(
        self, folder: Path, safe_stem: str = "model", torch_stem: str = "pytorch_model"
    ) -> dict[str, FileTensor]:
        """All tensors of a model folder, safetensors before `.bin`; empty if there are none."""
        tensors: dict[str, FileTensor] = {}
        for stem, suffix in ((safe_stem, "safetensors"), (torch_stem, "bin")):
            for file in _weight_files(folder, f"{stem}.{suffix}"):
                if suffix == "safetensors":
                    tensors |= open_safetensors(file)
                else:
                    tensors |= state_dict(self._files.open(file), str(file))
            if tensors:
                break
        return tensors


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The file `name` of `folder`, or those that its index names."""
    whole, index = folder / name, folder / f"{name}.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else ()
    return [folder / Path(shard).name for shard in sorted(shards)]


def _of_part(part: str, tensors: Mapping[str, FileTensor]) -> dict[str, Weight]:
    """The weights of a part: of a whole CLIP model those of the tower.

    Older ones carry a buffer of positions, which is no weight.
    """
    return {
        name: of_file(tensor)
        for name, tensor in tensors.items()
        if part == LLM or (name.startswith("vision_model.") and not name.endswith("position_ids"))
    }


def _base_folder(part: str, given: str | None, recorded: str | None) -> Path:
    reference = given or recorded
    if reference is None:
        raise UsageError(f"nothing names the base of {part}", where=_FLAGS[part])
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if is_reference(reference):
        return fetch_model(reference, weights=True)
    raise UsageError(f"'{reference}' is no folder here", where=_FLAGS[part])


def _by_part(path: Path, tensors: Mapping[str, FileTensor], meta: Mapping[str, Any]) -> Artefact:
    parts: dict[str, dict[str, FileTensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in _PARTS or not rest:
            raise UnsupportedError(f"'{name}' belongs to no part of LLaVA", where=str(path))
        parts.setdefault(part, {})[rest] = tensor
    projector = parts.get(PROJECTOR, {})
    if any(not name.startswith("model.") for name in projector):
        raise UnsupportedError("its projector is no Sequential `model`", where=str(path))
    text = meta.get("cfg")
    config = (text, f"{path} (meta.cfg)") if isinstance(text, str) else None
    return Artefact(path, parts, config=config)


def _recorded_scale(part: str, recipe: Recipe | None) -> LoraScale:
    """What the XTuner config says of a LoRA; without one, nothing is known."""
    lora = None
    if recipe is not None:
        lora = recipe.llm_lora if part == LLM else recipe.visual_encoder_lora
    if lora is None:
        return LoraScale(None)
    return LoraScale(lora.lora_alpha, lora.use_rslora, lora.fan_in_fan_out, lora.alpha_pattern)


def _scale(values: Mapping[str, Json]) -> LoraScale:
    """What PEFT's `adapter_config.json` says."""
    alpha, pattern = values.get("lora_alpha"), values.get("alpha_pattern")
    alphas = pattern.items() if isinstance(pattern, dict) else ()
    return LoraScale(
        float(alpha) if isinstance(alpha, int | float) else None,
        values.get("use_rslora") is True,
        values.get("fan_in_fan_out") is True,
        {key: float(value) for key, value in alphas if isinstance(value, int | float)},
    )
