"""How far apart two sets of logits are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtuner2llava.storage.json_file import Json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Distance:
    """One set of logits from another.

    `largest` is the largest absolute difference, `kl` the mean over positions of the divergence of
    the first from the second in nats, `top1` the fraction of positions with the same likeliest
    token. NaN wherever a logit is.
    """

    largest: float
    kl: float
    top1: float

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> Distance:
        """The distance over all positions, from what `by_position` gives for parts of them."""
        import torch

        largest, kl, same = torch.cat([*parts], dim=1)
        # A divergence is at least zero, but for rounding.
        return cls(float(largest.max()), float(kl.mean().clamp(min=0)), float(same.mean()))

    def __str__(self) -> str:
        return f"largest difference {self.largest:.3g}, KL {self.kl:.2g}, top-1 {self.top1:.1%}"

    def to_dict(self) -> dict[str, Json]:
        return {"largest_difference": self.largest, "kl": self.kl, "top1": self.top1}


def by_position(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Largest difference, divergence and agreement on the likeliest token, (3, positions).

    Both are logits, (positions, vocabulary).
    """
    import torch

    first, second = one.double(), other.double()
    largest = (first - second).abs().amax(1)
    same = first.argmax(1) == second.argmax(1)
    logs = first.log_softmax(1)
    kl = (logs.exp() * (logs - second.log_softmax(1))).sum(1)
    return torch.stack([largest, kl, same.double()])
