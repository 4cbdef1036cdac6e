"""The config that the LLM was trained with: its base's, with what the training run changed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xtuner2llava.errors import PlanError, UnsupportedError
from xtuner2llava.sources import ModelConfig
from xtuner2llava.sources.model_config import in_437_vocabulary
from xtuner2llava.storage.json_file import Json, integer
from xtuner2llava.training_config import (
    Reference,
    Table,
    TrainingConfig,
    Unknown,
    Value,
)


def trained_llm_config(
    config: ModelConfig, training_config: TrainingConfig | None
) -> dict[str, Json]:
    """The LLM's config in 4.37 vocabulary, as training used it.

    XTuner passes further arguments of `model.llm` on to `from_pretrained`, where they override the
    config, and turns LLaVAModel's `max_position_embeddings` into a linear `rope_scaling`
    (InternLM/xtuner `xtuner/model/llava.py`, `_prepare_for_long_context_training`).
    """
    values: dict[str, Json] = dict(config.values)
    if training_config is None:
        return values
    for key, value in training_config.llm_overrides.items():
        if key.startswith("_"):
            continue
        values[key] = _json(value, f"{training_config.where}, model.llm.{key}")
    values = in_437_vocabulary(values)
    longest = training_config.max_position_embeddings
    if longest is not None:
        scaling = values.get("rope_scaling")
        before = scaling.get("factor") if isinstance(scaling, dict) else None
        factor = linear_rope_factor(
            longest,
            integer(values, "max_position_embeddings"),
            before if isinstance(before, (int, float)) else 1,
        )
        if factor is not None:
            values["rope_scaling"] = {"type": "linear", "factor": factor}
    return values


def linear_rope_factor(
    max_position_embeddings: int | None,
    original_max_position_embeddings: int | None,
    original_rope_factor: float = 1,
) -> float | None:
    """The factor of the `{"type": "linear"}` that XTuner trained with; None: RoPE is the base's.

    `max_position_embeddings` is the argument of LLaVAModel, the others are the base LLM's: 1 where
    its `rope_scaling` is None or has no `factor`. A factor replaces the base's `rope_scaling`
    whole; `max_position_embeddings` of the config stays (xtuner/model/llava.py,
    `_prepare_for_long_context_training`, the same from v0.1.23 to today). Raises
    `UnsupportedError` for a factor that is not a positive number.
    """
    if max_position_embeddings is None or not original_max_position_embeddings:
        return None
    if not (math.isfinite(original_rope_factor) and original_rope_factor > 0):
        raise UnsupportedError(
            f"the base LLM's rope_scaling has the factor {original_rope_factor}, "
            "a positive number was expected"
        )
    original = original_max_position_embeddings * original_rope_factor
    if max_position_embeddings <= original:
        return None
    return float(math.ceil(max_position_embeddings / original))


def _json(value: Value, where: str) -> Json:
    """A value of an XTuner config, where it can stand in a model's config."""
    if isinstance(value, Table):
        entries: Mapping[object, Value] = dict(value.items())
        return {str(key): _json(entry, where) for key, entry in entries.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry, where) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Reference):
        return value.path.rpartition(".")[2]
    what = value.reason if isinstance(value, Unknown) else "it is not a value of a config"
    raise PlanError(f"cannot be read as data: {what}", where=where)
