"""Whether two tensors that a config ties are the same, as far as headers tell."""

from __future__ import annotations

from xtuner2llava.tensors import LazyTensor
from xtuner2llava.tensors.files import cut, read_ranges

_SAMPLE_BYTES = 64 << 10
_BLOCK_BYTES = 8 << 20


def are_surely_equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether both are the same bytes of the same files, as tied weights of a `.pth` are."""
    return one is other or (
        one.dtype == other.dtype and one.ranges() is not None and one.ranges() == other.ranges()
    )


def are_surely_different(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether they cannot be the same: other shapes, one of them computed, or other first bytes.

    Reads at most 64 KiB of each. Equal samples prove nothing; the conversion compares the rest.
    """
    if one is other:
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    ranges, other_ranges = one.ranges(), other.ranges()
    if ranges is None or other_ranges is None:
        return True
    if ranges == other_ranges:
        return False
    size = min(_SAMPLE_BYTES, one.nbytes)
    return read_ranges(cut(ranges, 0, size)) != read_ranges(cut(other_ranges, 0, size))


def first_difference(one: LazyTensor, other: LazyTensor) -> int | None:
    """The byte at which two tensors that are stored somewhere differ first; None if nowhere."""
    ranges, other_ranges = one.ranges() or (), other.ranges() or ()
    for start in range(0, one.nbytes, _BLOCK_BYTES):
        size = min(_BLOCK_BYTES, one.nbytes - start)
        block = read_ranges(cut(ranges, start, size))
        other_block = read_ranges(cut(other_ranges, start, size))
        if block != other_block:
            at = next(i for i in range(size) if block[i] != other_block[i])
            return start + at
    return None
