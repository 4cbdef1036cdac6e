"""Tensors that must be computed, block of rows by block of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtuner2llava.tensors.dtype import FLOAT64, DType
from xtuner2llava.tensors.lazy import Derived, LazyTensor, Shape, row_blocks
from xtuner2llava.tensors.rounding import round_to

if TYPE_CHECKING:
    import torch

_TILE_BYTES = 1 << 20


class Cast(Derived):
    """`source` in another dtype, rounded to nearest, ties to even.

    Casts are the last step of a plan, so that a value is rounded once.
    """

    def __init__(self, source: LazyTensor, dtype: DType) -> None:
        super().__init__(source, dtype, source.shape)

    def unrounded(self) -> LazyTensor:
        return self._source

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        if self.dtype == FLOAT64:
            self._source.read_into(start, stop, out)
        else:
            out.copy_(round_to(self._source.read(start, stop), self.dtype.torch))

    def flat(self) -> LazyTensor:
        return Cast(self._source.flat(), self.dtype)


def cast(source: LazyTensor, dtype: DType) -> LazyTensor:
    """`source` itself where it already has that dtype; else a `Cast`."""
    return source if source.dtype == dtype else Cast(source, dtype)


class Fill(LazyTensor):
    """A tensor that no file holds: every element is `value`."""

    def __init__(self, dtype: DType, shape: Shape, value: float) -> None:
        self.dtype, self.shape, self._value = dtype, shape, value

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.fill_(self._value)

    def leaves(self) -> Iterator[LazyTensor]:
        return iter(())

    def flat(self) -> LazyTensor:
        return Fill(self.dtype, (math.prod(self.shape),), self._value)


class Columns(Derived):
    """Columns `[first, last)` of the second dimension of `source`."""

    def __init__(self, source: LazyTensor, first: int, last: int) -> None:
        if len(source.shape) < 2 or not 0 <= first <= last <= source.shape[1]:
            raise ValueError(f"columns {first} to {last} of shape {source.shape}")
        super().__init__(source, source.dtype, (source.shape[0], last - first, *source.shape[2:]))
        self._first, self._last = first, last

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self._source.read(start, stop)[:, self._first : self._last])


class Transpose(Derived):
    """A matrix with its dimensions exchanged.

    A block of its rows is a block of columns of `source`, so each block passes over all of it.
    """

    def __init__(self, source: LazyTensor) -> None:
        if len(source.shape) != 2:
            raise ValueError(f"a matrix is needed, shape {source.shape} is none")
        super().__init__(source, source.dtype, (source.shape[1], source.shape[0]))

    @property
    def row_cost(self) -> int:
        return self.row_bytes

    @property
    def fixed_cost(self) -> int:
        # Tiles and results of uneven sizes leave holes in the heap, up to one of glibc's (64 MB).
        return max(_TILE_BYTES, self._source.row_cost) + self._source.fixed_cost + (64 << 20)

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        for low, high in row_blocks(self._source, _TILE_BYTES):
            out[:, low:high] = self._source.read(low, high)[:, start:stop].T


class Normalize(Derived):
    """The rows of a matrix, each divided by its L2 norm, in float64 until it is rounded.

    What Baichuan2's head does at run time (baichuan-inc/Baichuan2 `modeling_baichuan.py`,
    `NormHead`: `torch.nn.functional.normalize`, whose norms are at least 1e-12).
    """

    def __init__(self, source: LazyTensor) -> None:
        if len(source.shape) != 2:
            raise ValueError(f"a matrix is needed, shape {source.shape} is none")
        super().__init__(source, FLOAT64, source.shape)

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        import torch

        self._source.read_into(start, stop, out)
        torch.nn.functional.normalize(out, out=out)
