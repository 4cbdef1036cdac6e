"""Rows for tokens without training: each the mean of all rows of another tensor."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtuner2llava.tensors.dtype import FLOAT64, DType
from xtuner2llava.tensors.lazy import LazyTensor, row_blocks

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 1 << 20


class Mean(LazyTensor):
    """`rows` rows, each the mean of the rows of `source`, summed in float64 and rounded once.

    The sum goes through `source` in blocks, always the same ones, so that the result is the same
    each time; it is made when it is first read, and kept.
    """

    def __init__(self, source: LazyTensor, rows: int) -> None:
        if len(source.shape) < 2 or not source.rows:
            raise ValueError(f"shape {source.shape} has no rows to take the mean of")
        self._source = source
        self.dtype, self.shape = source.dtype, (rows, *source.row_shape)
        self._row: torch.Tensor | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        # Another process makes the mean, and its lock, for itself.
        return Mean, (self._source, self.rows)

    @property
    def fixed_cost(self) -> int:
        row = math.prod(self.row_shape) * FLOAT64.itemsize
        block = max(_BLOCK_BYTES, self._source.row_cost)
        # The block comes once as it is and once in float64.
        return 2 * row + (1 + FLOAT64.itemsize // self.dtype.itemsize) * block

    @property
    def stored_dtype(self) -> DType:
        return self._source.stored_dtype

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self._mean())

    def leaves(self) -> Iterator[LazyTensor]:
        return self._source.leaves()

    def _mean(self) -> torch.Tensor:
        import torch

        with self._lock:
            if self._row is None:
                total = torch.zeros(self.row_shape, dtype=torch.float64)
                for start, stop in row_blocks(self._source, _BLOCK_BYTES):
                    total += self._source.read(start, stop).to(torch.float64).sum(0)
                self._row = (total / self._source.rows).to(self.dtype.torch)
            return self._row
