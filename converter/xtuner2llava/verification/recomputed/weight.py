"""A weight of the trained model, to be read in blocks of rows, exact or computed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtuner2llava.verification.recomputed.files import FileTensor

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 4 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a weight.

    `value` is as stored, or float64 where it was computed. `bound` then is how far a computation
    in float32 may be from it, by element; None says that it is what a file holds.
    """

    value: torch.Tensor
    bound: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Block:
        """The block with its elements put elsewhere."""
        return Block(change(self.value), None if self.bound is None else change(self.bound))


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor that `read(start, stop)` gives rows of; a scalar has one row.

    `dtype` is the stored one, of a merge that of the base's weight. `computed` says that arithmetic
    is part of it, `divisible` that reading it in blocks costs no more than reading it whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    computed: bool
    read: Callable[[int, int], Block]
    divisible: bool = True

    @property
    def count(self) -> int:
        """The number of rows; a scalar has one."""
        return self.shape[0] if self.shape else 1

    def whole(self) -> Block:
        return self.read(0, self.count)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of some megabytes each, or one of all rows."""
        row = math.prod(self.shape[1:])
        step = max(1, _BLOCK_ELEMENTS // max(1, row) if self.divisible else self.count)
        for start in range(0, self.count, step):
            yield start, min(start + step, self.count)

    def float32(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All of it in float32, rounded to `dtype` before if that is given."""
        import torch

        result = torch.empty(self.shape, dtype=torch.float32)
        for start, stop in self.blocks():
            value = self.read(start, stop).value
            value = value if dtype is None else value.to(dtype)
            (result[start:stop] if self.shape else result).copy_(value)
        return result


def of_file(tensor: FileTensor) -> Weight:
    """What a file holds, as it is."""
    return Weight(
        tensor.shape, tensor.dtype, False, lambda start, stop: Block(tensor.rows(start, stop))
    )


def rearranged(
    sources: Sequence[Weight],
    shape: tuple[int, ...],
    change: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> Weight:
    """Elements of whole `sources` in other places: `change` makes the whole result of them."""
    import torch

    computed = any(source.computed for source in sources)

    def read(start: int, stop: int) -> Block:
        wholes = [source.whole() for source in sources]
        if not computed:
            return Block(change([block.value for block in wholes])[start:stop].clone())
        values = change([block.value.double() for block in wholes])
        bounds = change([_bound(block) for block in wholes])
        return Block(values[start:stop].clone(), bounds[start:stop].clone())

    def _bound(block: Block) -> torch.Tensor:
        if block.bound is not None:
            return block.bound
        return torch.zeros_like(block.value, dtype=torch.float64)

    return Weight(shape, sources[0].dtype, computed, read, divisible=False)
