"""The trained model: its weights by part, and how it was told to compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CheckpointError
from xtuner2llava.recipe import Recipe, Table
from xtuner2llava.sources.json_file import Json, read_json
from xtuner2llava.verification.layout import LLM, VISUAL_ENCODER
from xtuner2llava.verification.recomputed.weight import Weight


@dataclass(frozen=True, slots=True)
class Trained:
    """The whole model by part, under the source's own names, and what says how it computes.

    `folders` hold each part's `config.json`, tokenizer or image processor; `was_trained` says
    which parts the run changed.
    """

    weights: Mapping[str, Mapping[str, Weight]]
    folders: Mapping[str, Path]
    was_trained: frozenset[str]
    recipe: Recipe | None

    @property
    def select_layer(self) -> int:
        return -2 if self.recipe is None else self.recipe.visual_select_layer

    def llm_config(self) -> dict[str, Json]:
        """The LLM's own config as the training used it: with XTuner's changes.

        Arguments of `from_pretrained` replace keys of the config; `max_position_embeddings` of
        LLaVAModel becomes a linear rope scaling (InternLM/xtuner `xtuner/model/llava.py`,
        `_prepare_for_long_context_training`).
        """
        values = read_json(self.folders[LLM] / "config.json")
        if self.recipe is None:
            return values
        for key, value in self.recipe.llm_overrides.items():
            if key in values:
                values[key] = _plain(value)
        longest = self.recipe.max_position_embeddings
        here = values.get("max_position_embeddings")
        if longest is not None and isinstance(here, int):
            rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
            before = rope.get("factor", 1) if isinstance(rope, dict) else 1
            reach = here * (before if isinstance(before, int | float) else 1)
            if longest > reach:
                scaling: dict[str, Json] = {"type": "linear"}
                scaling["factor"] = float(math.ceil(longest / reach))
                theta = rope.get("rope_theta") if isinstance(rope, dict) else None
                if theta is not None:
                    values["rope_theta"] = theta
                values.pop("rope_parameters", None)
                values["rope_scaling"] = scaling
        return values

    def vision_config(self) -> dict[str, Json]:
        """The tower's own config; of a whole CLIP model, its `vision_config`."""
        values = read_json(self.folders[VISUAL_ENCODER] / "config.json")
        inner = values.get("vision_config")
        return inner if isinstance(inner, dict) else values


def _plain(value: object) -> Json:
    """A value of an XTuner config as JSON. Raises `CheckpointError` for code."""
    if isinstance(value, Table):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"an argument of the LLM cannot be read as data: {value}")
