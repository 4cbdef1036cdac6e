"""The bytes of a planned tensor, block by block, from wherever they come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from xtuner2llava.errors import PlanError
from xtuner2llava.tensors import (
    FileRange,
    LazyTensor,
    Shape,
    Stored,
    first_overflow,
    round_into,
    row_blocks,
    thread_cache,
)
from xtuner2llava.tensors.files import cut, read_ranges
from xtuner2llava.tensors.stored import bytes_of
from xtuner2llava.writing.disk import BLOCK_BYTES
from xtuner2llava.writing.nonfinite import NonFiniteCounter
from xtuner2llava.writing.shards import Entry
from xtuner2llava.writing.source_sums import RangeSum, add_sums

if TYPE_CHECKING:
    import torch

# What one computed block may cost: for element by element work little enough for the cache, for
# rows enough to make a matrix product efficient. Never a share of some total, since a product may
# round differently for another number of rows, and the output must not depend on the jobs.
_ELEMENTS_BYTES = 4 << 20
_ROWS_BYTES = 16 << 20
# What is read at a time of a tensor that is only rounded.
_STORED_BYTES = 1 << 20

# How many blocks may wait to be checked beside the one that is being made.
AHEAD = 1

_LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38}


def blocks(entry: Entry) -> Iterator[memoryview]:
    """The bytes of `entry`, row-major and little-endian, in blocks of at most `BLOCK_BYTES`.

    A block is valid until the next one is asked for. Raises `CorruptFileError` if a source file is
    short or changes meanwhile, and `PlanError` for a finite value that its cast made infinite.
    """
    ranges = entry.tensor.ranges()
    if ranges is not None:
        for start in range(0, entry.tensor.nbytes, BLOCK_BYTES):
            yield memoryview(read_ranges(cut(ranges, start, BLOCK_BYTES)))
        return
    counter = NonFiniteCounter(entry.name, entry.tensor.dtype.code)
    for first, exact in exact_blocks(entry.tensor):
        yield from rounded(entry, first, exact, counter)


def exact_blocks(
    tensor: LazyTensor, sums: list[RangeSum] | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Elements of a tensor without ranges, before it is rounded: (number of the first, elements).

    A block is valid until the block after the next is asked for. With `sums`, the CRC-32 of what
    was read of a tensor that is only rounded is added to them.
    """
    import torch

    source, cuts = _exact(tensor)
    if not cuts:
        return
    ranges = source.ranges() or ()
    shape = (cuts[0][1], *source.row_shape)
    memory = cycle([torch.empty(shape, dtype=source.dtype.torch) for _ in range(AHEAD + 1)])
    try:
        for start, stop in cuts:
            block = next(memory)[: stop - start]
            source.read_into(start, stop, block)
            if sums is not None:
                data = memoryview(bytearray(bytes_of(block)))
                add_sums(sums, cut(ranges, start * source.row_bytes, len(data)), data)
            yield start * math.prod(source.row_shape), block.view(-1)
    finally:
        thread_cache.clear()


def rounded(
    entry: Entry, first: int, exact: torch.Tensor, counter: NonFiniteCounter
) -> Iterator[memoryview]:
    """The bytes of `exact`, the elements of `entry` from number `first` on, in its dtype.

    A block, of at most `BLOCK_BYTES`, is valid until the next one is asked for. What is not finite
    is counted. Raises `PlanError` for a finite value that becomes infinite.
    """
    import torch

    dtype = entry.tensor.dtype.torch
    count = min(BLOCK_BYTES // dtype.itemsize, len(exact))
    buffer = exact if exact.dtype == dtype else torch.empty(count, dtype=dtype)
    for start in range(0, len(exact), count):
        values = exact[start : start + count]
        if exact.dtype != dtype:
            round_into(values, buffer[: len(values)])
        block = values if exact.dtype == dtype else buffer[: len(values)]
        data = bytes_of(block)
        if counter.add(data) and (lost := first_overflow(values, block)) is not None:
            raise _overflow(entry, first + start + lost[0], lost[1])
        yield data


def stored_ranges(tensor: LazyTensor) -> Sequence[FileRange] | None:
    """The ranges that hold its elements, in its dtype or before rounding; None if computed."""
    ranges = tensor.ranges()
    # Only the last rounding is looked through: one before it is a value of its own.
    exact = tensor.unrounded()
    return exact.ranges() if ranges is None and exact is not None else ranges


def working_bytes(tensor: LazyTensor) -> int:
    """The most memory that writing `tensor` takes at a time, in bytes."""
    if tensor.ranges() is not None:
        return 3 * BLOCK_BYTES  # of the source, of the file, and for a copy without the kernel
    source, cuts = _exact(tensor)
    rows = cuts[0][1] if cuts else 0
    blocks_ahead = AHEAD * rows * source.row_bytes
    return blocks_ahead + rows * source.row_cost + source.fixed_cost + 2 * BLOCK_BYTES


def _exact(tensor: LazyTensor) -> tuple[LazyTensor, list[tuple[int, int]]]:
    """`tensor` before it is rounded, and the first row and the last row + 1 of its blocks."""
    flat = tensor.flat()
    source = flat.unrounded() or flat
    ranges = source.ranges()
    if ranges is None:
        memory = _ROWS_BYTES if len(flat.shape) > 1 else _ELEMENTS_BYTES
        return source, list(row_blocks(flat, memory))
    source = Stored("", source.dtype, (math.prod(source.shape),), ranges)
    return source, list(row_blocks(source, _STORED_BYTES))


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
