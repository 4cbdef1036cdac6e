"""The layouts that XTuner and Hugging Face write, opened as lazy tensors."""

from xtuner2llava.sources.checkpoint import Checkpoint, open_checkpoint, open_training
from xtuner2llava.sources.model_config import ModelConfig
from xtuner2llava.sources.part import Part
from xtuner2llava.storage.fingerprint import Fingerprint

__all__ = [
    "Checkpoint",
    "Fingerprint",
    "ModelConfig",
    "Part",
    "open_checkpoint",
    "open_training",
]
