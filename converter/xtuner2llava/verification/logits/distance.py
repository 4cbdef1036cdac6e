"""How far apart logits are, computed in blocks of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    token.
    """

    largest: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return f"largest difference {self.largest:.3g}, KL {self.kl:.2g}, top-1 {self.top1:.1%}"

    def to_dict(self) -> dict[str, Json]:
        return {"largest_difference": self.largest, "kl": self.kl, "top1": self.top1}


class Distances:
    """Distances of some `pairs` of named logits, which come in blocks of columns.

    Only sums over the columns are kept, so that logits of a large vocabulary need not be in memory.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], positions: int) -> None:
        import torch

        self._pairs = pairs
        names = {name for pair in pairs for name in pair}
        low = torch.full((positions,), -torch.inf, dtype=torch.float64)
        zero = torch.zeros(positions, dtype=torch.float64)
        self._highest = {name: low.clone() for name in names}
        self._best = {name: torch.zeros(positions, dtype=torch.int64) for name in names}
        self._sum = {name: zero.clone() for name in names}
        self._weighted = {pair: zero.clone() for pair in pairs}
        self._largest = {pair: zero.clone() for pair in pairs}
        self._columns = 0
        self.scale = 0.0

    def add(self, blocks: Mapping[str, torch.Tensor]) -> None:
        """The next columns: (positions, columns) by name."""
        import torch

        logits = {name: block.double() for name, block in blocks.items()}
        columns = 0
        for name, block in logits.items():
            columns = block.shape[1]
            top, index = block.max(dim=1)
            better = top > self._highest[name]
            self._best[name] = torch.where(better, index + self._columns, self._best[name])
            highest = torch.maximum(self._highest[name], top)
            shrink = (self._highest[name] - highest).exp()
            self._sum[name] = self._sum[name] * shrink + (block - highest[:, None]).exp().sum(1)
            for pair in self._pairs:
                if pair[0] == name:
                    apart = block - logits[pair[1]]
                    added = ((block - highest[:, None]).exp() * apart).sum(1)
                    self._weighted[pair] = self._weighted[pair] * shrink + added
                    most = apart.abs().amax(1)
                    self._largest[pair] = torch.maximum(self._largest[pair], most)
            self._highest[name] = highest
            self.scale = max(self.scale, float(block.abs().max()))
        self._columns += columns

    def of(self, one: str, other: str) -> Distance:
        """The distance of a pair, after the last block."""
        pair = (one, other)
        total = {name: self._highest[name] + self._sum[name].log() for name in pair}
        kl = self._weighted[pair] / self._sum[one] - total[one] + total[other]
        same = self._best[one] == self._best[other]
        # Zero, but for rounding, is the least that a divergence can be.
        return Distance(
            float(self._largest[pair].max()),
            max(0.0, float(kl.mean())) if bool(kl.isfinite().all()) else float("nan"),
            float(same.double().mean()),
        )
