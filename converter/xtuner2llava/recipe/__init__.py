"""XTuner's training config, read as data."""

from xtuner2llava.recipe.lora import LoraRecipe
from xtuner2llava.recipe.python_data import read_python
from xtuner2llava.recipe.recipe import Recipe
from xtuner2llava.recipe.rope import linear_rope_factor
from xtuner2llava.recipe.training_data import (
    WITHOUT_IDS,
    Evaluation,
    Loaded,
    TrainingData,
    UsedValue,
)
from xtuner2llava.recipe.values import Reference, Table, Unknown, Value, dotted, shown

__all__ = [
    "WITHOUT_IDS",
    "Evaluation",
    "Loaded",
    "LoraRecipe",
    "Recipe",
    "Reference",
    "Table",
    "TrainingData",
    "Unknown",
    "UsedValue",
    "Value",
    "dotted",
    "linear_rope_factor",
    "read_python",
    "shown",
]
