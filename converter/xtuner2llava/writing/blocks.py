"""The bytes of a planned tensor, block by block, from wherever they come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, repeat
from typing import TYPE_CHECKING

from xtuner2llava.errors import PlanError
from xtuner2llava.tensors import (
    DType,
    FileRange,
    LazyTensor,
    Shape,
    first_overflow,
    round_into,
    row_blocks,
)
from xtuner2llava.tensors.files import read_into
from xtuner2llava.tensors.kept import forget
from xtuner2llava.writing.disk import BLOCK_BYTES
from xtuner2llava.writing.nonfinite import Tally
from xtuner2llava.writing.shards import Entry
from xtuner2llava.writing.source_sums import RangeSum, add_bytes

if TYPE_CHECKING:
    import torch

# What one computed block may cost: for element by element work little enough for the cache, for
# rows enough to make a matrix product efficient. Never a share of some total, since a product may
# round differently for another number of rows, and the output must not depend on the jobs.
_ELEMENTS_BYTES = 4 << 20
_ROWS_BYTES = 16 << 20

# How many blocks may be written and checked beside the one that is being made.
AHEAD = 3

_LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38}


def blocks(
    entry: Entry,
    buffers: Iterator[memoryview] | None = None,
    tally: Tally | None = None,
    sums: list[RangeSum] | None = None,
) -> Iterator[memoryview]:
    """The bytes of `entry`, row-major and little-endian, in blocks of at most `BLOCK_BYTES`.

    What is copied or only rounded goes into `buffers`, of `BLOCK_BYTES` each, one after another;
    by default a block is valid until the next one is asked for. What is computed has memory of its
    own. With `tally`, what is not finite in computed values is counted; with `sums`, the CRC-32 of
    what was read for rounding is added to them. Raises `CorruptFileError` if a source file is
    short or changes meanwhile, and `PlanError` for a finite value that its cast made infinite.
    """
    buffers = buffers or repeat(memoryview(bytearray(BLOCK_BYTES)))
    dtype, ranges = _stored(entry.tensor)
    if ranges is not None and dtype == entry.tensor.dtype:
        return _copied(ranges, buffers, sums)
    tally = tally or Tally(entry.name, entry.tensor.dtype.code)
    if ranges is not None:
        return _rounded(entry, dtype, ranges, buffers, tally, sums)
    return _computed(entry, tally)


def stored_ranges(tensor: LazyTensor) -> Sequence[FileRange] | None:
    """The ranges that hold its elements, in whatever dtype; None if they must be computed."""
    return _stored(tensor)[1]


def working_bytes(tensor: LazyTensor) -> int:
    """The most memory that writing `tensor` takes at a time, in bytes."""
    dtype, ranges = _stored(tensor)
    if ranges is not None:
        if dtype == tensor.dtype:
            return 3 * BLOCK_BYTES  # of the source, of the file, and for a copy without the kernel
        return (AHEAD + 3) * BLOCK_BYTES + _source_bytes(dtype, tensor.dtype)
    source = tensor.flat()
    rows = next((stop - start for start, stop in _cuts(source)), 0)
    held = 2 * source.row_bytes  # by the blocks that are being checked
    return rows * (source.row_cost + held) + source.fixed_cost + 2 * BLOCK_BYTES


def _cuts(source: LazyTensor) -> Iterator[tuple[int, int]]:
    """First row and last row + 1 of each block."""
    return row_blocks(source, _ROWS_BYTES if len(source.shape) > 1 else _ELEMENTS_BYTES)


def _stored(tensor: LazyTensor) -> tuple[DType, Sequence[FileRange] | None]:
    """The ranges that hold the elements of `tensor`, and the dtype they have there.

    That is another one than its own where they are only rounded; the ranges are None where they
    are computed.
    """
    # Only the last rounding is looked through: one before it is a value of its own.
    for stored in (tensor, tensor.unrounded()):
        ranges = None if stored is None else stored.ranges()
        if stored is not None and ranges is not None:
            if sum(piece.length for piece in ranges) != stored.nbytes:
                raise RuntimeError(f"the ranges of a tensor are not its {stored.nbytes:,} bytes")
            return stored.dtype, ranges
    return tensor.dtype, None


def _source_bytes(source: DType, target: DType) -> int:
    """What a block of `target` takes in `source`."""
    return BLOCK_BYTES // target.itemsize * source.itemsize


def _rounded(
    entry: Entry,
    dtype: DType,
    ranges: Sequence[FileRange],
    buffers: Iterator[memoryview],
    tally: Tally,
    sums: list[RangeSum] | None,
) -> Iterator[memoryview]:
    """Elements of `dtype` from files, rounded to that of `entry` while they are in the cache."""
    import torch

    target = entry.tensor.dtype
    source = memoryview(bytearray(_source_bytes(dtype, target)))
    done = 0
    for data in _copied(ranges, repeat(source), sums):
        count = len(data) // dtype.itemsize
        block = next(buffers)[: count * target.itemsize]
        exact = torch.frombuffer(data, dtype=dtype.torch)
        rounded = torch.frombuffer(block, dtype=target.torch)
        round_into(exact, rounded)
        if tally.add(block):
            _refuse_overflow(entry, done, first_overflow(exact, rounded))
        yield block
        done += count


def _copied(
    ranges: Sequence[FileRange],
    buffers: Iterator[memoryview],
    sums: list[RangeSum] | None = None,
) -> Iterator[memoryview]:
    # Taken only when something is read into it: whoever reuses buffers counts one for each block.
    buffer: memoryview | None = None
    filled = 0
    # A tensor may lie in as many files as there were GPUs: only one is open at a time.
    for file, pieces in groupby(ranges, key=lambda piece: piece.file):
        with file.open() as descriptor:
            for piece in pieces:
                done = 0
                while done < piece.length:
                    if buffer is None:
                        buffer, filled = next(buffers), 0
                    count = min(piece.length - done, len(buffer) - filled)
                    part = FileRange(file, piece.offset + done, count, piece.member)
                    read_into(descriptor, part, buffer[filled : filled + count])
                    if sums is not None:
                        add_bytes(sums, part, buffer[filled : filled + count])
                    done, filled = done + count, filled + count
                    if filled == len(buffer):
                        yield buffer
                        buffer = None
            file.check(descriptor)
    if buffer is not None:
        yield buffer[:filled]


def _computed(entry: Entry, tally: Tally) -> Iterator[memoryview]:
    source = entry.tensor.flat()
    try:
        for start, stop in _cuts(source):
            data = _as_bytes(source.read(start, stop))
            if len(data) != (stop - start) * source.row_bytes:
                raise RuntimeError(
                    f"{entry.name}: rows {start} to {stop} came as {len(data)} bytes"
                )
            if tally.add(data):
                before = start * math.prod(source.row_shape)
                _refuse_overflow(entry, before, source.overflow(start, stop))
            for place in range(0, len(data), BLOCK_BYTES):
                yield data[place : place + BLOCK_BYTES]
    finally:
        forget()


def _as_bytes(block: torch.Tensor) -> memoryview:
    """The memory of `block`; numpy knows no bfloat16, so it goes through bytes."""
    import torch

    return block.contiguous().flatten().view(torch.uint8).numpy().data


def _refuse_overflow(entry: Entry, before: int, lost: tuple[int, float] | None) -> None:
    """Raises `PlanError` if an element is `lost`; `before` are those of earlier blocks."""
    if lost is None:
        return
    element, value = before + lost[0], lost[1]
    dtype = entry.tensor.dtype
    largest = _LARGEST.get(dtype.code)
    limit = f", whose largest value is {largest:g}" if largest else ""
    other = "bfloat16 or --dtype float32" if dtype.code == "F16" else "float32"
    raise PlanError(
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
