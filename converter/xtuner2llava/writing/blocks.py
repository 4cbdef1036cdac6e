"""The parts of a planned tensor that are written one at a time, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtuner2llava.errors import PlanError
from xtuner2llava.tensors import thread_cache
from xtuner2llava.tensors.dtype import FLOAT64, DType
from xtuner2llava.tensors.files import FileRange, batches, read_ranges_into
from xtuner2llava.tensors.lazy import LazyTensor, Shape, row_blocks
from xtuner2llava.tensors.rounding import first_overflow, round_into, scratch_bytes
from xtuner2llava.tensors.stored import bytes_of, from_bytes
from xtuner2llava.writing.disk import BLOCK_BYTES
from xtuner2llava.writing.jobs import WorkingMemory
from xtuner2llava.writing.nonfinite import count_nonfinite
from xtuner2llava.writing.shards import Entry

if TYPE_CHECKING:
    import torch

# What one computed block may cost: for element by element work little enough for the cache, for
# rows enough to make a matrix product efficient. Never a share of some total, since a product may
# round differently for another number of rows, and the output must not depend on the jobs.
_ELEMENTS_BYTES = 4 << 20
_ROWS_BYTES = 16 << 20
# Tensors of more ranges than that are compared with their source, which costs less than so many
# sums: rows that a mapping interleaves one by one.
_MOST_SUMS = 1024

_LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38}


@dataclass(frozen=True, slots=True)
class Block:
    """`length` bytes of a planned tensor, from byte `start` on.

    Its elements are those of `pieces` in the dtype `stored`, or, where these are None, rows
    `[first_row, stop_row)` of `source`. With `summed`, the CRC-32 of `pieces` is of use.
    """

    entry: Entry
    start: int
    length: int
    stored: DType
    pieces: tuple[FileRange, ...] | None
    source: LazyTensor | None = None
    first_row: int = 0
    stop_row: int = 0
    summed: bool = False

    @property
    def offset(self) -> int:
        """Where it begins in the file."""
        return self.entry.offset + self.start

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.entry.tensor.nbytes

    @property
    def is_copied(self) -> bool:
        return self.pieces is not None and self.stored == self.entry.tensor.dtype


def cut_blocks(entry: Entry) -> Iterator[Block]:
    """The blocks of `entry`, in order; a tensor without elements has one of no bytes."""
    tensor = entry.tensor
    exact = _exact(tensor)
    ranges = exact.ranges()
    if not tensor.nbytes or ranges is not None:
        start, summed = 0, ranges is not None and len(ranges) <= _MOST_SUMS
        for pieces in batches(ranges or (), BLOCK_BYTES) if tensor.nbytes else [()]:
            count = sum(piece.length for piece in pieces) // exact.dtype.itemsize
            length = count * tensor.dtype.itemsize
            yield Block(entry, start, length, exact.dtype, pieces, summed=summed)
            start += length
        return
    row_bytes = math.prod(exact.row_shape) * tensor.dtype.itemsize
    for first, stop in row_blocks(exact, _block_memory(exact)):
        start, length = first * row_bytes, (stop - first) * row_bytes
        yield Block(entry, start, length, exact.dtype, None, exact, first, stop)


def read_exact(block: Block) -> torch.Tensor:
    """The elements of a block before they are rounded, in one dimension.

    It is valid until this thread reads the next one. Raises `CorruptFileError` where a file ends
    early or has changed.
    """
    count = block.length // block.entry.tensor.dtype.itemsize
    buffer = thread_cache.buffer("exact", count * block.stored.itemsize)
    if block.pieces is not None:
        read_ranges_into(block.pieces, buffer)
        return from_bytes(buffer, block.stored, (count,))
    assert block.source is not None  # noqa: S101 - a block has one of the two
    shape = (block.stop_row - block.first_row, *block.source.row_shape)
    exact = from_bytes(buffer, block.stored, shape)
    block.source.read_into(block.first_row, block.stop_row, exact)
    return exact.view(-1)


def rounded(block: Block, exact: torch.Tensor) -> tuple[memoryview, tuple[int, int]]:
    """The bytes of `block`, whose elements are `exact`; and how many are NaN, and infinite.

    They are valid until this thread rounds the next one. Raises `PlanError` for a finite value
    that becomes infinite.
    """
    dtype = block.entry.tensor.dtype
    result = exact
    if exact.dtype != dtype.torch:
        buffer = thread_cache.buffer("rounded", block.length)
        result = from_bytes(buffer, dtype, (len(exact),))
        round_into(exact, result)
    data = bytes_of(result)
    found = count_nonfinite(data, dtype.code)
    if found[1] and (lost := first_overflow(exact, result)) is not None:
        raise _overflow(block.entry, block.start // dtype.itemsize + lost[0], lost[1])
    return data, found


def blocks(entry: Entry) -> Iterator[memoryview]:
    """The bytes of `entry`, row-major and little-endian, block by block.

    A block is valid until the next one is asked for. Raises `CorruptFileError` if a source file is
    short or changes meanwhile, and `PlanError` for a finite value that its cast made infinite.
    """
    try:
        for block in cut_blocks(entry):
            if block.is_copied:
                data = thread_cache.buffer("source", block.length)
                read_ranges_into(block.pieces or (), data)
                yield data
            else:
                yield rounded(block, read_exact(block))[0]
    finally:
        thread_cache.clear()


def working_memory(tensor: LazyTensor) -> WorkingMemory:
    """The most memory that writing `tensor` takes at a time.

    A thread keeps its buffers for the next tensor, so what another would need is in here too.
    """
    exact = _exact(tensor)
    compared = 2 * BLOCK_BYTES  # Of the source, and of the file.
    if tensor.ranges() is not None:
        return WorkingMemory(compared)
    if exact.ranges() is not None:
        count, blocks, cost = BLOCK_BYTES // exact.dtype.itemsize, 1, BLOCK_BYTES
    else:
        rows = [stop - first for first, stop in row_blocks(exact, _block_memory(exact))] or [0]
        count, blocks = rows[0] * math.prod(exact.row_shape), len(rows)
        cost = rows[0] * exact.row_cost + exact.fixed_cost
    cost += count * tensor.dtype.itemsize + compared
    if exact.dtype == FLOAT64:
        cost += scratch_bytes(count)
    return WorkingMemory(cost, exact.shared_cost, blocks)


def _exact(tensor: LazyTensor) -> LazyTensor:
    """`tensor` before it is rounded, and flat where it can be."""
    if tensor.ranges() is not None:
        return tensor
    # Only the last rounding is looked through: one before it is a value of its own.
    flat = tensor.flat()
    return flat.unrounded() or flat


def _block_memory(exact: LazyTensor) -> int:
    return _ROWS_BYTES if len(exact.shape) > 1 else _ELEMENTS_BYTES


def _overflow(entry: Entry, element: int, value: float) -> PlanError:
    dtype = entry.tensor.dtype
    largest = _LARGEST.get(dtype.code)
    limit = f", whose largest value is {largest:g}" if largest else ""
    other = "bfloat16 or --dtype float32" if dtype.code == "F16" else "float32"
    return PlanError(
        f"element {list(position(element, entry.tensor.shape))} is {value:g}, "
        f"which overflows {dtype}{limit}",
        where=entry.name,
        advice=f"Convert with --dtype {other}.",
    )


def position(element: int, shape: Shape) -> tuple[int, ...]:
    """The index of the element that is number `element` in row-major order."""
    index = []
    for size in reversed(shape):
        element, place = divmod(element, size)
        index.append(place)
    return tuple(reversed(index))
