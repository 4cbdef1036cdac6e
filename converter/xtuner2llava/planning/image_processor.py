"""How images were prepared in training, as files that every transformers of a format loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, PlanError, UnsupportedError, raise_faults
from xtuner2llava.hub.download import find_folder
from xtuner2llava.planning.config import json_bytes
from xtuner2llava.planning.plan import Findings
from xtuner2llava.planning.vision_tower import PROCESSOR_KEYS, PUBLISHED, clip_processor
from xtuner2llava.sources.artifact import VISUAL_ENCODER
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.storage.json_file import Json, integer, read_json, table, text
from xtuner2llava.training_config.config import TrainingConfig
from xtuner2llava.training_config.values import Value, shown

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
CLASS = "CLIPImageProcessor"
# Pads images to squares with the mean colour; in transformers from 4.49 on.
PADDING_CLASS = "LlavaImageProcessor"
# Auto classes take the class that the file names.
_AUTO = ("AutoImageProcessor", "AutoProcessor", "AutoFeatureExtractor")
_CLIP = (CLASS, f"{CLASS}Fast", f"{CLASS}Pil", "CLIPFeatureExtractor", "CLIPProcessor")
# Without these, LlavaProcessor of 4.45 to 4.57 makes one image token for an image, or fails.
_COUNTS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """How images were prepared in training: `values` are those of a preprocessor_config.json.

    `path` is the file that says exactly this; None where the file has to be made.
    """

    values: Mapping[str, Json]
    path: Path | None


def trained_processor(checkpoint: Checkpoint, tower: Path, findings: Findings) -> ImageProcessor:
    """The training's image processor, as every transformers loads it.

    That is the file in the folder `tower`, or the one that the XTuner config names in its place,
    with the config's own arguments. An XTuner folder with a trained tower has it as it was used
    (InternLM/xtuner `xtuner/model/llava.py`, `to_xtuner_llava`). Raises `PlanError` for one that
    CLIPImageProcessor is not, whose arguments cannot be read, or that makes images of another size
    than the tower takes.
    """
    config = checkpoint.training_config
    own = tower == checkpoint.artifact.folders.get(VISUAL_ENCODER) and _is_in(tower)
    found = _in_folder(tower) if config is None or own else _of_training(config, tower, findings)
    values, path = found.values, found.path
    where = str(path or "image_processor of the XTuner config")
    raise_faults(PlanError, [Fault(where, what) for what in colour_faults(values)])
    tower_config = checkpoint.visual_encoder.config
    size = integer(tower_config.values, "image_size") if tower_config else None
    height = table(clip_processor(values), "crop_size").get("height")
    if "crop_size" in values and height not in (None, size) and size is not None:
        raise PlanError(
            f"prepares images of {height} pixels, the vision tower takes {size}",
            where=where,
            advice="Do the image processor and the tower belong together?",
        )
    loadable, note = loadable_image_processor(values)
    nested = path is not None and path.name != PREPROCESSOR
    if nested:
        findings.note(f"{PREPROCESSOR} is made from the base's {PROCESSOR}, which holds it nested.")
    findings.note(note)
    return ImageProcessor(loadable, None if note or nested else path)


def loadable_image_processor(values: Mapping[str, Json]) -> tuple[dict[str, Json], str | None]:
    """The settings as CLIPImageProcessor of transformers 4.37.2 to 5 loads them, and a note.

    Without a note, `values` are such already. XTuner trains with `CLIPImageProcessor` for
    any class that a base names, and later versions name one more for each way to compute the same
    (`…Fast`, `…Pil`), which 4.37.2 refuses.
    """
    named = values.get("image_processor_type")
    if named == CLASS or (named is None and values.get("feature_extractor_type") is not None):
        return dict(values), None
    settings = {key: values[key] for key in PROCESSOR_KEYS if values.get(key) is not None}
    why = f"the base names a {named}" if named is not None else "the base names no class"
    return (
        {**settings, "image_processor_type": CLASS},
        f"{PREPROCESSOR} is written for {CLASS}, with which XTuner trains: {why}.",
    )


def processor_files(
    processor: str,
    settings: Mapping[str, Json],
    *,
    image_token: str,
    patch_size: object,
    select_strategy: object,
    pads: bool,
) -> dict[str, bytes]:
    """The image processor's config with the processor's class, and the processor's own.

    From 4.45 on it writes as many image tokens into a prompt as there will be image features, and
    counts: patches, and one for CLIP's class token (`num_additional_image_tokens`), less one where
    the strategy is `default` and leaves that out (transformers `models/llava/processing_llava.py`).
    Where training padded images to squares, with the mean colour, LlavaImageProcessor does that.
    """
    # Older bases, openai's too, name the class by a key that transformers 5 does not have.
    left_out = ("feature_extractor_type", "_valid_processor_keys" if pads else "")
    image_values: dict[str, Json] = {
        "image_processor_type": CLASS,
        **{key: value for key, value in settings.items() if key not in left_out},
        "processor_class": processor,
    }
    if pads:
        image_values |= {"image_processor_type": PADDING_CLASS, "do_pad": True}
    values = {
        "image_token": image_token,
        "num_additional_image_tokens": 1,
        "patch_size": patch_size,
        "processor_class": processor,
        "vision_feature_select_strategy": select_strategy,
    }
    return {PREPROCESSOR: json_bytes(image_values), PROCESSOR: json_bytes(values)}


# Which transformers can load the image processor that pads as training did.
PADDING_NOTE = (
    "Training padded images to squares, so the image processor is a LlavaImageProcessor with "
    "do_pad, and needs transformers 4.49 or later. For 4.45 to 4.48, pad images yourself with "
    f"image_mean * 255 and set image_processor_type to {CLASS} in {PREPROCESSOR}."
)


def image_processor_faults(values: Mapping[str, Json]) -> Iterator[str]:
    """Why not every transformers makes an image processor of a preprocessor_config.json."""
    yield from colour_faults(values)
    named = values.get("image_processor_type")
    if named == PADDING_CLASS:
        if values.get("do_pad") is not True:
            yield f"{PREPROCESSOR} names {PADDING_CLASS} without do_pad true, so it does not pad"
    elif loadable_image_processor(values)[1] is not None:
        found = "no class" if named is None else str(named)
        yield f"{PREPROCESSOR} names {found}, expected {CLASS} in image_processor_type"


def colour_faults(values: Mapping[str, Json]) -> Iterator[str]:
    """What is not a mean or a deviation of three channels; None stands for CLIP's own."""
    for key in ("image_mean", "image_std"):
        found = values.get(key)
        channels = [type(each) in (int, float) for each in found] if isinstance(found, list) else []
        if found is not None and channels != [True] * 3:
            yield f"{key} is {found!r}, expected three numbers"


def processor_faults(values: Mapping[str, Json], patch_size: int | None) -> Iterator[str]:
    """Why the processor_config.json of `hf` does not make as many image tokens as features."""
    lacking = [key for key in _COUNTS if values.get(key) is None]
    if lacking:
        yield f"{PROCESSOR} lacks {', '.join(lacking)}"
    written = values.get("patch_size")
    if written is not None and patch_size is not None and written != patch_size:
        yield f"{PROCESSOR} has patch_size {written}, the tower {patch_size}"
    if "image_processor" in values:
        yield (
            f"{PROCESSOR} holds an image processor, which transformers before 5 takes from "
            f"{PREPROCESSOR}"
        )


def _is_in(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (PREPROCESSOR, PROCESSOR))


def _in_folder(folder: Path) -> ImageProcessor:
    """The settings in `folder`; a processor that transformers 5 saved holds them nested."""
    path, nested = folder / PREPROCESSOR, folder / PROCESSOR
    if not path.is_file() and nested.is_file():
        inner = read_json(nested).get("image_processor")
        if isinstance(inner, dict):
            return ImageProcessor(inner, nested)
    if not path.is_file():
        raise UnsupportedError(
            f"has no {PREPROCESSOR}, which says how images are prepared",
            where=str(folder),
            advice=f"Give --vision a folder with the vision tower and its {PREPROCESSOR}.",
        )
    return ImageProcessor(read_json(path), path)


def _of_training(config: TrainingConfig, tower: Path, findings: Findings) -> ImageProcessor:
    """What the XTuner config says of the image processor that it names, or that of the tower."""
    named, loaded = _named(config, tower, findings), config.data.image_processor
    values, kind = named.values, loaded.type
    if kind in _AUTO:
        kind = (
            text(values, "image_processor_type") or text(values, "feature_extractor_type") or kind
        )
    if kind not in (None, *_CLIP):
        raise PlanError(
            f"the training prepared images with {kind}, and LLaVA does with {CLASS}",
            where=f"{config.where}, image_processor",
            advice="A model with another image processor cannot be converted exactly.",
        )
    changes: dict[str, Json] = {}
    faults: list[Fault] = []
    for key, value in loaded.arguments.items():
        name = f"image_processor.{key}"
        if value is None:
            continue
        if key not in PROCESSOR_KEYS:
            findings.note(f"{name} is set in the XTuner config; {CLASS} ignores it.")
        elif (plain := _json(value)) is not None:
            changes[key] = plain
        else:
            faults.append(
                Fault(
                    config.where,
                    f"{name} is {shown(value)}, which is not a value of an image processor",
                    "Name a config that says it as a constant with --xtuner-config FILE.py.",
                )
            )
    raise_faults(PlanError, faults)
    if changes.items() <= clip_processor(values).items():
        return named
    listed = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    findings.note(f"{PREPROCESSOR} has the arguments of the XTuner config: {listed}.")
    return ImageProcessor({**values, **changes}, None)


def _named(config: TrainingConfig, tower: Path, findings: Findings) -> ImageProcessor:
    """The image processor in the folder that the config names; that of the tower where it is it."""
    named = config.data.image_processor.path
    try:
        of_tower = config.base_path(VISUAL_ENCODER)
    except ConversionError:  # Where --vision gives it, that is enough.
        of_tower = None
    if named is None or (named == of_tower and _is_in(tower)):
        return _in_folder(tower)
    try:
        return _in_folder(find_folder(named))
    except ConversionError:
        if named in PUBLISHED:
            return ImageProcessor(PUBLISHED[named].processor, None)
        if not _is_in(tower):
            return _in_folder(tower)
    findings.note(
        f"The XTuner config takes its image processor from '{named}', which cannot be read here; "
        f"the {PREPROCESSOR} beside the vision tower is used. If it differs, give --vision a "
        "folder with the tower and the right one."
    )
    return _in_folder(tower)


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
