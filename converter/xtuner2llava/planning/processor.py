"""The files from which transformers makes an image processor, and for `hf` a LlavaProcessor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xtuner2llava.planning.config import json_bytes
from xtuner2llava.planning.image_processor import CLASS, PADDING_CLASS, PREPROCESSOR, PROCESSOR
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.tokenizers import MadeFile


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
