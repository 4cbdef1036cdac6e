"""The files from which AutoProcessor makes a LlavaProcessor."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner2llava.llava.config import json_bytes
from xtuner2llava.sources.json_file import Json
from xtuner2llava.tokenizers import MadeFile

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_BACKGROUND = "(122, 116, 104)"  # CLIP's mean in 8 bits, with which XTuner and LLaVA pad


def processor_files(
    processor: str,
    preprocessor: Mapping[str, Json],
    *,
    image_token: str,
    patch_size: int,
    select_strategy: str,
) -> dict[str, MadeFile]:
    """The image processor's config with the processor's class, and the processor's own.

    From 4.45 on it writes as many image tokens into a prompt as there will be image features, and
    counts: patches, and one for CLIP's class token (`num_additional_image_tokens`), less one where
    the strategy is `default` and leaves that out (transformers `models/llava/processing_llava.py`).
    """
    # Older bases, openai's too, name the class by a key that transformers 5 has no more.
    image_values: dict[str, Json] = {
        "image_processor_type": "CLIPImageProcessor",
        **{k: v for k, v in preprocessor.items() if k != "feature_extractor_type"},
        "processor_class": processor,
    }
    values: dict[str, Json] = {
        "image_token": image_token,
        "num_additional_image_tokens": 1,
        "patch_size": patch_size,
        "processor_class": processor,
        "vision_feature_select_strategy": select_strategy,
    }
    return {
        PREPROCESSOR: lambda: json_bytes(image_values),
        PROCESSOR: lambda: json_bytes(values),
    }


def padding_note(preprocessor: Mapping[str, Json], aspect_ratio: object) -> str | None:
    """What to do where training padded images to squares and the image processor crops them."""
    if aspect_ratio != "pad" or preprocessor.get("do_center_crop") is False:
        return None
    return (
        "Training padded images to squares, and CLIPImageProcessor crops them. To see what the "
        f"model was trained on, pad images with {_BACKGROUND} before the processor, or, with "
        "transformers 4.49 or later, set image_processor_type to LlavaImageProcessor and do_pad "
        f"to true in {PREPROCESSOR}."
    )
