"""Tensors as they lie in files: whole byte ranges, and strided views of a storage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from xtuner2llava.tensors.dtype import DType
from xtuner2llava.tensors.files import FileRange, cut, join, read_ranges, read_ranges_into
from xtuner2llava.tensors.lazy import LazyTensor, Shape

if TYPE_CHECKING:
    import torch

# A strided block whose elements span at most this many bytes of the file is read in one go.
_SPAN_BYTES = 4 << 20


def from_bytes(buffer: bytearray | memoryview, dtype: DType, shape: Shape) -> torch.Tensor:
    """`buffer` as a tensor of `shape`, without a copy."""
    import torch

    if not buffer:
        return torch.empty(shape, dtype=dtype.torch)
    return torch.frombuffer(buffer, dtype=dtype.torch).view(shape)


def bytes_of(block: torch.Tensor) -> memoryview:
    """The memory of `block`, row-major; numpy knows no bfloat16, so it goes through bytes."""
    import torch

    return block.view(-1).view(torch.uint8).numpy().data


class Stored(LazyTensor):
    """A row-major tensor whose bytes are `ranges`, one after the other; `name` says whose."""

    def __init__(self, name: str, dtype: DType, shape: Shape, ranges: Sequence[FileRange]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._ranges = join(ranges)
        found = sum(piece.length for piece in self._ranges)
        if found != self.nbytes:
            raise ValueError(f"{name}: {found} bytes given, {shape} of {dtype} has {self.nbytes}")

    def ranges(self) -> tuple[FileRange, ...]:
        return self._ranges

    def extents(self) -> tuple[FileRange, ...]:
        return self._ranges

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        if out.dtype == self.dtype.torch:
            pieces = cut(self._ranges, start * self.row_bytes, (stop - start) * self.row_bytes)
            read_ranges_into(pieces, bytes_of(out))
            return
        out.copy_(self.read(start, stop))

    def leaves(self) -> Iterator[LazyTensor]:
        yield self

    def flat(self) -> LazyTensor:
        return Stored(self.name, self.dtype, (math.prod(self.shape),), self._ranges)


class Strided(LazyTensor):
    """A view of a storage that is not row-major: transposed, sliced by columns, or expanded.

    `strides` and `offset` count elements, as in `torch.Tensor.as_strided`; `storage` is the range
    of the whole storage. The caller has checked that the view stays inside it.
    """

    def __init__(
        self,
        name: str,
        dtype: DType,
        shape: Shape,
        storage: FileRange,
        strides: Shape,
        offset: int,
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._storage, self._strides, self._offset = storage, strides, offset

    @property
    def row_cost(self) -> int:
        return 2 * self.row_bytes

    def read(self, start: int, stop: int) -> torch.Tensor:
        first = self._offset + start * self._strides[0]
        return self._gather(first, (stop - start, *self.row_shape), self._strides)

    def leaves(self) -> Iterator[LazyTensor]:
        yield self

    def extents(self) -> tuple[FileRange, ...]:
        return (self._storage,)

    def _gather(self, first: int, shape: Shape, strides: Shape) -> torch.Tensor:
        """The view of `shape` and `strides` at element `first`, in as few reads as are bounded."""
        import torch

        if not math.prod(shape):
            return torch.empty(shape, dtype=self.dtype.torch)
        size = self.dtype.itemsize
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if span * size <= max(_SPAN_BYTES, 2 * math.prod(shape) * size):
            piece = FileRange(self._storage.file, self._storage.offset + first * size, span * size)
            block = from_bytes(read_ranges([piece]), self.dtype, (span,))
            return block.as_strided(shape, strides).clone(memory_format=torch.contiguous_format)
        # The elements lie far apart: take the widest dimension apart, so that what is left is near.
        widest = max(range(len(shape)), key=lambda dim: strides[dim])
        rest = shape[:widest] + shape[widest + 1 :]
        rest_strides = strides[:widest] + strides[widest + 1 :]
        result = torch.empty(shape, dtype=self.dtype.torch)
        for index in range(shape[widest]):
            part = self._gather(first + index * strides[widest], rest, rest_strides)
            result.select(widest, index).copy_(part)
        return result


def view_of_storage(
    name: str,
    dtype: DType,
    shape: Shape,
    storage: FileRange,
    strides: Shape,
    offset: int,
) -> LazyTensor:
    """The tensor that `torch._utils._rebuild_tensor_v2` would build on this storage.

    Raises `ValueError` if the numbers are negative or the view leaves the storage.
    """
    if len(shape) != len(strides) or any(n < 0 for n in (*shape, *strides, offset)):
        raise ValueError(f"{name}: shape {shape}, strides {strides}, offset {offset} make no sense")
    if math.prod(shape) == 0:
        return Stored(name, dtype, shape, ())
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > storage.length:
        raise ValueError(
            f"{name}: its last element is number {last:,} of a storage "
            f"that has {storage.length // dtype.itemsize:,}"
        )
    expected = 1
    row_major = True
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1:
            row_major = row_major and stride == expected
            expected *= n
    if row_major:
        piece = FileRange(
            storage.file,
            storage.offset + offset * dtype.itemsize,
            math.prod(shape) * dtype.itemsize,
            storage.member,
        )
        return Stored(name, dtype, shape, (piece,))
    return Strided(name, dtype, shape, storage, strides, offset)
