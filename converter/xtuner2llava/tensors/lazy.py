"""`LazyTensor`: a tensor that is file ranges until its values are needed.

A lazy tensor has two ways out. `ranges()` gives the byte ranges whose concatenation is the tensor,
so that a writer can copy them; `read(start, stop)` gives a block of rows, so that what must be
computed is computed within a bounded buffer. Rows are the first dimension; a scalar has one row.
Where nothing is done but rounding, `unrounded()` gives the tensor before it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtuner2llava.tensors.dtype import DType
from xtuner2llava.tensors.files import FileRange

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


class LazyTensor(ABC):
    """A tensor known by dtype and shape; subclasses say where its values come from."""

    dtype: DType
    shape: Shape

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> Shape:
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def row_cost(self) -> int:
        """Bytes of memory that `read` needs for each row, the result included."""
        return self.row_bytes

    @property
    def fixed_cost(self) -> int:
        """Bytes of memory that `read` needs besides, however few the rows."""
        return 0

    @property
    def shared_cost(self) -> int:
        """Bytes of memory besides that threads share which read blocks of it at the same time."""
        return 0

    @property
    def stored_dtype(self) -> DType:
        """What "as stored" means for it: computed tensors are float64 until they are rounded."""
        return self.dtype

    def ranges(self) -> tuple[FileRange, ...] | None:
        """The tensor's bytes, row-major and little-endian, as file ranges; None if computed."""
        return None

    def unrounded(self) -> LazyTensor | None:
        """The tensor whose elements, rounded to `dtype`, are those of this one; None if none is."""
        return None

    # A subclass overrides one of these two.

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)`, of shape `(stop - start, *row_shape)`, in memory of their own.

        Raises `CorruptFileError` where a file ends early or has changed.
        """
        import torch

        out = torch.empty((stop - start, *self.row_shape), dtype=self.dtype.torch)
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Fills `out`, row-major and of that shape, with rows `[start, stop)`.

        Its dtype is that of this tensor, or float64. Raises as `read` does.
        """
        out.copy_(self.read(start, stop))

    @abstractmethod
    def leaves(self) -> Iterator[LazyTensor]:
        """The stored tensors that it is made of."""

    def extents(self) -> tuple[FileRange, ...]:
        """All bytes of files that reading it may touch."""
        return tuple(piece for leaf in self.leaves() for piece in leaf.extents())

    def flat(self) -> LazyTensor:
        """The same bytes, as one dimension where rows can be cut anywhere; else itself.

        It lets a block be bounded even if one row is larger than the memory allowed.
        """
        return self


class Derived(LazyTensor):
    """A tensor computed from the same rows of one other, `source`."""

    def __init__(self, source: LazyTensor, dtype: DType, shape: Shape) -> None:
        self._source = source
        self.dtype, self.shape = dtype, shape

    @property
    def row_cost(self) -> int:
        return self.row_bytes + self._source.row_cost

    @property
    def fixed_cost(self) -> int:
        return self._source.fixed_cost

    @property
    def shared_cost(self) -> int:
        return self._source.shared_cost

    @property
    def stored_dtype(self) -> DType:
        return self._source.stored_dtype

    def leaves(self) -> Iterator[LazyTensor]:
        return self._source.leaves()


def row_blocks(tensor: LazyTensor, memory: int) -> Iterator[tuple[int, int]]:
    """Cuts the rows of `tensor` into equal blocks that each cost at most `memory` bytes to read.

    A single row that costs more is still a block of its own.
    """
    if not tensor.nbytes:
        return
    most = max(1, memory // max(1, tensor.row_cost))
    step = math.ceil(tensor.rows / math.ceil(tensor.rows / most))
    for start in range(0, tensor.rows, step):
        yield start, min(start + step, tensor.rows)
