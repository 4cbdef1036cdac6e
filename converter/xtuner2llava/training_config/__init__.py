"""XTuner's training config, read as data."""

from xtuner2llava.training_config.config import TrainingConfig
from xtuner2llava.training_config.datasets import (
    WITHOUT_IDS,
    Loaded,
    TrainingData,
)
from xtuner2llava.training_config.evaluator import read_python
from xtuner2llava.training_config.values import (
    Reference,
    Section,
    Table,
    Unknown,
    Value,
    dotted,
    shown,
)

__all__ = [
    "WITHOUT_IDS",
    "Loaded",
    "Reference",
    "Section",
    "Table",
    "TrainingConfig",
    "TrainingData",
    "Unknown",
    "Value",
    "dotted",
    "read_python",
    "shown",
]
