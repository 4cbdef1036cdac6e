"""Opens what XTuner leaves behind, and base models, as lazy tensors; nobody else knows layouts."""

from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.sources.model_config import ModelConfig
from xtuner2llava.sources.opening import open_checkpoint, open_training
from xtuner2llava.sources.part import Part
from xtuner2llava.storage.weights import Fingerprint

__all__ = [
    "Checkpoint",
    "Fingerprint",
    "ModelConfig",
    "Part",
    "open_checkpoint",
    "open_training",
]
