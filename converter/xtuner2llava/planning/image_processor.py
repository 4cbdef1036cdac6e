"""The image processor that every transformers a format is for loads, and hf's LlavaProcessor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from xtuner2llava.planning.config import json_bytes
from xtuner2llava.planning.published_towers import PROCESSOR_KEYS
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.tokenizers import MadeFile

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
CLASS = "CLIPImageProcessor"
# Pads images to squares with the mean colour; in transformers from 4.49 on.
PADDING_CLASS = "LlavaImageProcessor"
# Without these, LlavaProcessor of 4.45 to 4.57 makes one image token for an image, or fails.
_COUNTS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def find_image_processor(folder: Path) -> Path:
    """The file in `folder` with its image processor's settings.

    A processor that transformers 5 saved holds them in processor_config.json. Where neither file is
    there, the one that should be.
    """
    path, nested = folder / PREPROCESSOR, folder / PROCESSOR
    if not path.is_file() and nested.is_file() and "image_processor" in read_json(nested):
        return nested
    return path


def read_image_processor(path: Path) -> dict[str, Json]:
    """The settings in a file that `find_image_processor` found."""
    values = read_json(path)
    inner = values.get("image_processor")
    return dict(inner) if isinstance(inner, dict) else values


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
    patch_size: int,
    select_strategy: str,
    aspect_ratio: str | None,
) -> dict[str, MadeFile]:
    """The image processor's config with the processor's class, and the processor's own.

    From 4.45 on it writes as many image tokens into a prompt as there will be image features, and
    counts: patches, and one for CLIP's class token (`num_additional_image_tokens`), less one where
    the strategy is `default` and leaves that out (transformers `models/llava/processing_llava.py`).
    Where training padded images to squares, with the mean colour, LlavaImageProcessor does that.
    """
    # Older bases, openai's too, name the class by a key that transformers 5 does not have.
    image_values: dict[str, Json] = {
        "image_processor_type": CLASS,
        **{key: value for key, value in settings.items() if key != "feature_extractor_type"},
        "processor_class": processor,
    }
    if aspect_ratio == "pad":
        image_values |= {"image_processor_type": PADDING_CLASS, "do_pad": True}
        image_values.pop("_valid_processor_keys", None)
    processor_values: dict[str, Json] = {
        "image_token": image_token,
        "num_additional_image_tokens": 1,
        "patch_size": patch_size,
        "processor_class": processor,
        "vision_feature_select_strategy": select_strategy,
    }
    return {
        PREPROCESSOR: lambda: json_bytes(image_values),
        PROCESSOR: lambda: json_bytes(processor_values),
    }


def padding_note(aspect_ratio: str | None) -> str | None:
    """Which transformers can load the image processor that pads as training did."""
    if aspect_ratio != "pad":
        return None
    return (
        "Training padded images to squares, so the image processor is a LlavaImageProcessor with "
        "do_pad, and needs transformers 4.49 or later. For 4.45 to 4.48, pad images yourself with "
        f"image_mean * 255 and set image_processor_type to {CLASS} in {PREPROCESSOR}."
    )


def image_processor_faults(values: Mapping[str, Json]) -> Iterator[str]:
    """Why not every transformers makes an image processor of a preprocessor_config.json."""
    named = values.get("image_processor_type")
    if named == PADDING_CLASS:
        if values.get("do_pad") is not True:
            yield f"{PREPROCESSOR} names {PADDING_CLASS} without do_pad true, so it does not pad"
    elif loadable_image_processor(values)[1] is not None:
        found = "no class" if named is None else str(named)
        yield f"{PREPROCESSOR} names {found}, expected {CLASS} in image_processor_type"


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
