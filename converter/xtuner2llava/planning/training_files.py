"""Files that the XTuner config loads beside the models: the image processor of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, PlanError, raise_faults
from xtuner2llava.hub.download import fetch_model, is_reference, local_path
from xtuner2llava.planning.config import json_bytes
from xtuner2llava.planning.findings import Findings
from xtuner2llava.planning.image_processor import (
    PREPROCESSOR,
    PROCESSOR,
    find_image_processor,
    loadable_image_processor,
    read_image_processor,
)
from xtuner2llava.planning.published_towers import PROCESSOR_KEYS, PUBLISHED, clip_processor
from xtuner2llava.sources import Checkpoint
from xtuner2llava.sources.artifact import VISUAL_ENCODER
from xtuner2llava.storage.json_file import Json, integer
from xtuner2llava.tokenizers import MadeFile
from xtuner2llava.training_config import Loaded, TrainingConfig, Value, shown

# Auto classes take the class that the file names.
_AUTO = ("AutoImageProcessor", "AutoProcessor", "AutoFeatureExtractor")
_CLIP = (
    *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    *("CLIPFeatureExtractor", "CLIPProcessor"),
)


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """How images were prepared in training: `values` are those of a preprocessor_config.json.

    `path` is the file that says exactly this; None where the file has to be made.
    """

    values: Mapping[str, Json]
    path: Path | None

    @property
    def made(self) -> Mapping[str, MadeFile]:
        """The file by its name, where it is not copied."""
        return {} if self.path is not None else {PREPROCESSOR: lambda: json_bytes(self.values)}


def image_processor_of(checkpoint: Checkpoint, findings: Findings) -> ImageProcessor | None:
    """The training's image processor; None without a tower.

    That is the file beside the tower, or the one that the XTuner config names in its place, with
    the config's own arguments. An XTuner folder with a trained tower has it as it was used
    (InternLM/xtuner `xtuner/model/llava.py`, `to_xtuner_llava`). Raises `PlanError` for one that
    CLIPImageProcessor is not, or whose arguments cannot be read.
    """
    tower, training_config = checkpoint.visual_encoder, checkpoint.training_config
    if tower.folder is None:
        return None
    own = find_image_processor(tower.folder)
    if training_config is None or tower.folder == checkpoint.artifact.folders.get(VISUAL_ENCODER):
        return _fitting(ImageProcessor(read_image_processor(own), own), checkpoint, findings)
    loaded = training_config.data.image_processor
    values, path = _elsewhere(loaded, training_config, own, findings) or (
        read_image_processor(own),
        own,
    )
    named: Json = loaded.type
    if named in _AUTO:
        saved = values.get("image_processor_type") or values.get("feature_extractor_type")
        named = saved or named
    if named not in (None, *_CLIP):
        raise PlanError(
            f"the training prepared images with {named}, and LLaVA does with CLIPImageProcessor",
            where=f"{training_config.where}, image_processor",
            advice="A model with another image processor cannot be converted exactly.",
        )
    changes = _changes(loaded.arguments, training_config.where, findings)
    if all(clip_processor(values).get(key) == value for key, value in changes.items()):
        return _fitting(ImageProcessor(values, path), checkpoint, findings)
    listed = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    findings.note(f"{PREPROCESSOR} has the arguments of the XTuner config: {listed}.")
    return _fitting(ImageProcessor({**values, **changes}, None), checkpoint, findings)


def _fitting(
    processor: ImageProcessor, checkpoint: Checkpoint, findings: Findings
) -> ImageProcessor:
    """`processor` as every transformers loads it.

    Raises `PlanError` where it makes images of another size than the tower takes.
    """
    tower = checkpoint.visual_encoder
    size = integer(tower.config.values, "image_size") if tower.config else None
    crop = clip_processor(processor.values)["crop_size"]
    height = crop.get("height") if isinstance(crop, dict) else None
    if "crop_size" in processor.values and height not in (None, size) and size is not None:
        raise PlanError(
            f"prepares images of {height} pixels, the vision tower takes {size}",
            where=str(processor.path or "image_processor of the XTuner config"),
            advice="Do the image processor and the tower belong together?",
        )
    values, note = loadable_image_processor(processor.values)
    nested = processor.path is not None and processor.path.name != PREPROCESSOR
    if nested:
        findings.note(f"{PREPROCESSOR} is made from the base's {PROCESSOR}, which holds it nested.")
    findings.note(note)
    return ImageProcessor(values, None if note or nested else processor.path)


def find_folder(reference: str) -> Path:
    """The folder at a path or Hub repo id, with its small files. Raises `ConversionError`."""
    folder = local_path(reference)
    if folder.is_dir():
        return folder
    if is_reference(reference):
        return fetch_model(reference, weights=False)
    raise PlanError("is not a folder here", where=reference)


def _elsewhere(
    loaded: Loaded, training_config: TrainingConfig, own: Path, findings: Findings
) -> tuple[Mapping[str, Json], Path | None] | None:
    """The image processor of another folder than the tower's; None where it is the tower's."""
    named = loaded.path
    try:
        of_tower = training_config.vision_path
    except ConversionError:  # Where --vision gives it, that is enough.
        of_tower = None
    if named is None or named == of_tower:
        return None
    try:
        path = find_image_processor(find_folder(named))
        values = read_image_processor(path)
    except ConversionError:
        if named in PUBLISHED:
            values = dict(PUBLISHED[named].processor)
            path = None
        elif own.is_file():
            findings.note(
                f"The XTuner config takes its image processor from '{named}', which cannot be read "
                f"here; the {PREPROCESSOR} beside the vision tower is used. If it differs, give "
                "--vision a folder with the tower and the right one."
            )
            return None
        else:
            raise
    return values, path


def _changes(arguments: Mapping[str, Value], where: str, findings: Findings) -> dict[str, Json]:
    """The config's arguments that CLIPImageProcessor has; raises for what cannot be read."""
    changes: dict[str, Json] = {}
    faults: list[Fault] = []
    for key, value in arguments.items():
        name = f"image_processor.{key}"
        if key not in PROCESSOR_KEYS:
            if value is not None:
                findings.note(f"{name} is set in the XTuner config; CLIPImageProcessor ignores it.")
        elif (plain := _json(value)) is not None:
            changes[key] = plain
        elif value is not None:
            faults.append(
                Fault(
                    where,
                    f"{name} is {shown(value)}, which is not a value of an image processor",
                    "Name a config that says it as a constant with --xtuner-config FILE.py.",
                )
            )
    raise_faults(PlanError, faults)
    return changes


def _json(value: Value) -> Json:
    """A number, a flag, a list of numbers or a table of numbers; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        entries = {str(key): _json(entry) for key, entry in value.items()}
        return None if None in entries.values() else entries
    if isinstance(value, (list, tuple)):
        items = [_json(item) for item in value]
        return None if None in items else items
    return None
