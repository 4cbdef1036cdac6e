"""LoRA merged in float64: W + s · B · A, with how far float32 may be from it.

The names are PEFT's (huggingface/peft `src/peft/tuners/lora/layer.py`): in a `.pth`
`base_model.model.{module}.lora_A.default.weight`, in an adapter folder without `.default`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xtuner2llava.errors import CheckpointError, UnsupportedError
from xtuner2llava.verification.recomputed.files import FileTensor
from xtuner2llava.verification.recomputed.weight import Block, Weight, of_file

if TYPE_CHECKING:
    import torch

_PEFT = "base_model.model."
_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_HALF_UNIT = 2.0**-24  # of float32, relative to a value


@dataclass(frozen=True, slots=True)
class LoraScale:
    """What the shapes of the factors do not say."""

    alpha: float | None
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank). Raises `CheckpointError` if alpha is unknown."""
        alpha = self.alpha
        for key, value in self.alpha_pattern.items():
            if module == key or module.endswith("." + key):
                alpha = value
                break
        if alpha is None:
            raise CheckpointError(
                "its LoRA alpha is recorded nowhere",
                where=module,
                advice="Give --lora-alpha or --vision-lora-alpha, as for convert.",
            )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def is_adapter(tensors: Mapping[str, FileTensor]) -> bool:
    """Whether a part of a state dict is what PEFT saved, and no whole model."""
    return any(n.startswith(_PEFT) or ".lora_" in n for n in tensors) or all(
        name.endswith("bias") for name in tensors
    )


def with_adapter(
    base: Mapping[str, Weight], tensors: Mapping[str, FileTensor], scale: LoraScale
) -> dict[str, Weight]:
    """The base's weights with what the adapter replaces replaced, and its factors merged."""
    weights = dict(base)
    factors: dict[str, dict[str, FileTensor]] = {}
    for full, tensor in tensors.items():
        parts = full.removeprefix(_PEFT).split(".")
        kind = next((part for part in parts if part in _KINDS), None)
        if kind is not None:
            module = ".".join(parts[: parts.index(kind)])
            factors.setdefault(module, {})[kind] = tensor
            continue
        if "modules_to_save" in parts:
            place = parts.index("modules_to_save")
            parts = [*parts[:place], parts[-1]]
        name = ".".join(part for part in parts if part != "base_layer")
        if name not in base:
            raise UnsupportedError("is saved beside the adapter, the base has none", where=name)
        weights[name] = of_file(tensor)
    for module, found in factors.items():
        name = f"{module}.weight"
        if name not in weights:
            raise UnsupportedError("has a LoRA, and the base has no such weight", where=name)
        weights[name] = _merged(weights[name], module, found, scale)
    return weights


def _merged(
    weight: Weight, module: str, factors: Mapping[str, FileTensor], scale: LoraScale
) -> Weight:
    """W + s · B · A, and for DoRA each row of that brought to its length."""
    embedding = "lora_embedding_A" in factors
    try:
        down = factors["lora_embedding_A" if embedding else "lora_A"]
        up = factors["lora_embedding_B" if embedding else "lora_B"]
    except KeyError as error:
        raise UnsupportedError(f"its LoRA has no {error}", where=module) from None
    rank = down.shape[0]
    factor = scale.of(module, rank)
    magnitude = factors.get("lora_magnitude_vector")
    turned = embedding or scale.fan_in_fan_out

    def delta(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of B, (rows, rank), and all of A, (rank, columns), in float64."""
        b, a = (up, down) if not turned else (down, up)
        if turned:
            # The weight is (inputs, outputs): its update is (B · A) transposed, Aᵀ · Bᵀ.
            return b.whole().double().T[start:stop], a.whole().double().T
        return b.rows(start, stop).double().flatten(1), a.whole().double().flatten(1)

    def read(start: int, stop: int) -> Block:
        block = weight.read(start, stop)
        base = block.value.double().flatten(1)
        left, right = delta(start, stop)
        value = base + factor * (left @ right)
        # A sum of `rank` products and W in float32 is off by at most (rank + 4) half units of the
        # sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
        terms = base.abs() + abs(factor) * (left.abs() @ right.abs())
        bound = (rank + 4) * _HALF_UNIT * terms
        if magnitude is not None:
            length = magnitude.whole().double().flatten()[start:stop, None]
            norm = value.norm(dim=1, keepdim=True)
            bound = (bound + bound.norm(dim=1, keepdim=True) / norm * value.abs()) * length / norm
            value = value * (length / norm)
            bound = bound.abs() + 16 * _HALF_UNIT * value.abs()
        shape = block.value.shape
        return Block(value.reshape(shape), bound.reshape(shape))

    return Weight(weight.shape, weight.dtype, True, read)
