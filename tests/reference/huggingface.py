"""LlavaForConditionalGeneration, loaded from a folder by whatever transformers is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch

# Llava 1.5's: CLIP's patches, one feature for each.
_IMAGE_TOKEN = -200


def load(folder: Path) -> Any:
    """The model in float32, and nothing of the folder left over or made up."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside transformers
        model, info = LlavaForConditionalGeneration.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    wrong = {key: found for key, found in info.items() if found}
    assert not wrong, wrong
    return model.eval()


def expands_image_tokens() -> bool:
    """Whether a prompt has an image token for each image feature, as from 4.45 on."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return (major, minor) >= (4, 45)


def logits(
    model: Any, input_ids: numpy.ndarray[Any, Any], pixels: numpy.ndarray[Any, Any]
) -> torch.Tensor:
    """(text and image tokens, vocabulary), for one prompt with one -200 where the image goes."""
    import torch

    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    image = [model.config.image_token_index] * (patches if expands_image_tokens() else 1)
    (row,) = input_ids.tolist()
    place = row.index(_IMAGE_TOKEN)
    ids = torch.tensor([row[:place] + image + row[place + 1 :]])
    with torch.no_grad():
        found = model(
            input_ids=ids,
            pixel_values=torch.from_numpy(pixels),
            attention_mask=torch.ones_like(ids),
        ).logits[0]
    assert isinstance(found, torch.Tensor)
    return found
