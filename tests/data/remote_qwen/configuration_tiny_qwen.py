"""The config of a Qwen 1, as code beside a model; written for tests."""

from transformers import PretrainedConfig


class TinyQwenConfig(PretrainedConfig):
    model_type = "qwen"
