"""The CLIP vision towers that OpenAI published: all that LLaVA loads by one of their names.

LLaVA and LLaVA-NeXT make the tower from the config of `mm_vision_tower` and prepare images with the
image processor there, not from those in the converted folder (haotian-liu/LLaVA
`llava/model/multimodal_encoder/clip_encoder.py`, `load_model`). The weights alone are replaced by
the folder's. So a name fits a tower only where every value here agrees with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.sources.model_config import CLIP_VISION_DEFAULTS
from xtuner2llava.storage.json_file import Json

# Of CLIPVisionConfig, the keys that decide what a tower computes; `projection_dim` does not.
_CONFIG = {key: value for key, value in CLIP_VISION_DEFAULTS.items() if key != "projection_dim"}
# Absent keys mean these (transformers 4.37.2 `models/clip/image_processing_clip.py`,
# CLIPImageProcessor).
_PROCESSOR: Mapping[str, Json] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
PROCESSOR_KEYS = tuple(_PROCESSOR)
# With another of these, loading fails; with another of the rest, LLaVA computes other features.
_SHAPES = frozenset(_CONFIG) - {"hidden_act", "layer_norm_eps", "num_attention_heads"}
# Processors save their numbers from float32 or float64.
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Difference:
    """One value of a tower that is not that of a published one."""

    key: str
    here: Json
    there: Json

    @property
    def is_of_shape(self) -> bool:
        """Whether tensors have other shapes for it, so that LLaVA cannot load them."""
        return self.key in _SHAPES

    def __str__(self) -> str:
        return f"{self.key} is {self.here!r} here and {self.there!r} there"


@dataclass(frozen=True, slots=True)
class PublishedTower:
    """What a repository of OpenAI's holds: values of CLIPVisionConfig and CLIPImageProcessor."""

    name: str
    config: Mapping[str, Json]
    processor: Mapping[str, Json]

    def differences(
        self, config: Mapping[str, Json], processor: Mapping[str, Json]
    ) -> tuple[Difference, ...]:
        """Where a tower's `config` and image `processor` say something else, shapes first."""
        ours = {**_CONFIG, **config}
        prepared = clip_processor(processor)
        found = [
            *(Difference(key, ours[key], value) for key, value in self.config.items()),
            *(Difference(key, prepared[key], value) for key, value in self.processor.items()),
        ]
        different = [one for one in found if not _equal(one.here, one.there)]
        return tuple(sorted(different, key=lambda one: not one.is_of_shape))


def clip_processor(values: Mapping[str, Json]) -> dict[str, Json]:
    """A preprocessor_config.json as CLIPImageProcessor understands it, every value explicit.

    A bare number is the shortest edge for `size`, both edges for `crop_size` (transformers
    `image_processing_utils.py`, `get_size_dict`).
    """
    result = {**_PROCESSOR, **{key: values[key] for key in _PROCESSOR if key in values}}
    size, crop = result["size"], result["crop_size"]
    if isinstance(size, int):
        result["size"] = {"shortest_edge": size}
    if isinstance(crop, int):
        result["crop_size"] = {"height": crop, "width": crop}
    for key in ("size", "crop_size"):
        sizes = result[key]
        if isinstance(sizes, dict):  # Some versions write all edges, None where one is not meant.
            result[key] = {edge: n for edge, n in sizes.items() if n is not None}
    return result


def _openai(
    name: str, hidden: int, inner: int, layers: int, heads: int, patch: int, image: int
) -> PublishedTower:
    config: dict[str, Json] = {
        **_CONFIG,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": image,
    }
    size: dict[str, Json] = {"size": image, "crop_size": image}
    return PublishedTower(f"openai/{name}", config, clip_processor(size))


PUBLISHED: Mapping[str, PublishedTower] = {
    tower.name: tower
    for tower in (
        _openai("clip-vit-large-patch14-336", 1024, 4096, 24, 16, 14, 336),
        _openai("clip-vit-large-patch14", 1024, 4096, 24, 16, 14, 224),
        _openai("clip-vit-base-patch16", 768, 3072, 12, 12, 16, 224),
        _openai("clip-vit-base-patch32", 768, 3072, 12, 12, 32, 224),
    )
}


def _equal(one: Json, other: Json) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_TOLERANCE)
    return one == other
