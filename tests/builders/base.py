"""Folders of base models, with as few tensors as a test needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 2,
    "num_hidden_layers": 1,
    "image_size": 4,
    "patch_size": 2,
}


def save_base(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A folder with `config.json` and, if there are tensors, `model.safetensors`; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def llm_base(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
    return save_base(folder, {"model_type": "llama", "torch_dtype": "float16"}, tensors)


def vision_base(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
    given = tensors or {"vision_model.post_layernorm.bias": torch.zeros(2)}
    return save_base(folder, CLIP, given)
