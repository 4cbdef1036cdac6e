"""`config.json` files of any version of transformers, in the vocabulary of 4.37.

LLaVA is pinned to transformers 4.37.2, so that is the vocabulary of everything inside: `rope_theta`
and `rope_scaling` (transformers 5 writes `rope_parameters`), `torch_dtype` (5: `dtype`),
`rope_scaling.type` (since 4.45: `rope_type`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.json_file import Json, integer, items, read_json, text

# The defaults of transformers for a CLIP vision tower
# (transformers 4.37.2 `models/clip/configuration_clip.py`, `CLIPVisionConfig`).
CLIP_VISION_DEFAULTS: dict[str, Json] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Every integer up to it is a float too; no factor is larger.
_LARGEST_INTEGER = 2**53


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's config file, and its values in 4.37 vocabulary.

    `rope_since_5` says that rope_theta stands where transformers before 5 does not read it.
    """

    path: Path
    values: dict[str, Json]
    rope_since_5: bool = False

    @property
    def model_type(self) -> str | None:
        return text(self.values, "model_type")

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(a for a in items(self.values, "architectures") if isinstance(a, str))


def read_model_config(folder: Path) -> ModelConfig:
    """The config of the model in `folder`. Raises `CorruptFileError` if there is none."""
    path = folder / "config.json"
    raw = read_json(path)
    values = in_437_vocabulary(raw)
    return ModelConfig(path, values, "rope_theta" in values and "rope_theta" not in raw)


def in_437_vocabulary(values: dict[str, Json]) -> dict[str, Json]:
    """The same config in the keys of transformers 4.37; keys that it does not know stay."""
    result = dict(values)
    if "dtype" in result:
        dtype = result.pop("dtype")
        result.setdefault("torch_dtype", dtype)
    if isinstance(result.get("torch_dtype"), str):
        result["torch_dtype"] = str(result["torch_dtype"]).removeprefix("torch.")
    # transformers 5 takes either name for the table.
    rope = result.pop("rope_parameters", None)
    if not isinstance(rope, dict):
        rope = result.get("rope_scaling")
    if isinstance(rope, dict):
        other = ("rope_theta", "partial_rotary_factor")
        result = {**{key: rope[key] for key in other if key in rope}, **result}
        rest = {key: value for key, value in rope.items() if key not in other}
        result["rope_scaling"] = _rope_scaling(rest)
    return result


def _rope_scaling(scaling: dict[str, Json]) -> Json:
    """`rope_scaling` with `type`; None where nothing is scaled."""
    rest = dict(scaling)
    named = rest.pop("rope_type", None)
    kind = rest.pop("type", named) or named
    if kind == "default" or (kind is None and not rest):
        return None
    if kind is None:
        return scaling
    factor = rest.pop("factor", None)
    if kind == "linear" and factor == 1:
        return None
    if isinstance(factor, int) and abs(factor) <= _LARGEST_INTEGER:
        factor = float(factor)
    return {"type": kind} | ({} if factor is None else {"factor": factor}) | rest


def vision_tower_config(config: ModelConfig) -> ModelConfig:
    """The vision tower's own config, complete: of a whole CLIP model, its `vision_config`.

    Raises `CorruptFileError` where a size is not a positive integer.
    """
    values = config.values
    nested = values.get("vision_config")
    if isinstance(nested, dict):
        values = {**nested, "model_type": nested.get("model_type", "clip_vision_model")}
    complete = {**CLIP_VISION_DEFAULTS, **values}
    for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        if (integer(complete, key) or 0) < 1:
            raise CorruptFileError(
                f"'{key}' is {complete[key]!r}, expected a positive integer",
                where=str(config.path),
            )
    return ModelConfig(config.path, complete)
