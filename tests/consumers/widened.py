"""A model of the format hf that computes the same with heads twice as wide.

vLLM on CPU has no kernel for heads of 16, as those of `tests/checkpoints` are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from reference.compose import read_tensors

if TYPE_CHECKING:
    import torch

ROOT = 2**0.5
TEXT, PROJECTOR = "language_model.", "multi_modal_projector."


def write_widened(folder: Path, out: Path) -> Path:
    """A copy of `folder`, a Llama or Qwen2, whose LLM has a zero after each number.

    The mean that norms divide by halves, as does its epsilon; so their weights do by the root of 2.
    Attention divides by the root of the head's width, so queries grow by as much. Each pair that
    rotates has its angle still: the one of number i of 16 is that of number 2i of 32.
    """
    from safetensors.torch import save_file

    shutil.copytree(folder, out)
    tensors = {name: widened(name, tensor) for name, tensor in read_tensors(folder).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= {key: 2 * text[key] for key in ("hidden_size", "intermediate_size")}
    text["rms_norm_eps"] /= 2
    assert text.get("head_dim") is None
    (out / "config.json").write_text(json.dumps(config))
    return out


def widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not name.startswith((TEXT, PROJECTOR)):
        return tensor
    if "norm" in name:
        tensor = tensor / ROOT
    if "q_proj" in name:
        tensor = tensor * ROOT
    kept = {"embed_tokens": 0, "lm_head": 0, "linear_1": 1}  # of tokens, and of the tower
    for dim in range(tensor.dim()):
        if not any(word in name and kept[word] == dim for word in kept):
            tensor = with_zeros(tensor, dim)
    return tensor.contiguous()


def with_zeros(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    moved = tensor.movedim(dim, -1)
    made = moved.new_zeros(*moved.shape[:-1], 2 * moved.shape[-1])
    made[..., ::2] = moved
    return made.movedim(-1, dim)
