"""Whether two tensors that a config ties are the same."""

from __future__ import annotations

from xtuner2llava.tensors import LazyTensor
from xtuner2llava.tensors.files import cut, read_ranges

_BLOCK_BYTES = 8 << 20


def are_equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether both hold the same bytes; computed tensors count as different.

    Tied weights of a `.pth` share their storage, and most folders hold them once: nothing is read
    then. Where a checkpoint holds both, this reads both up to the first difference, which is the
    only tensor data that planning reads: without it, a plan could not say which tensors are
    written. The embedding of the largest LLMs has 1 to 2 GB.
    """
    if one is other:
        return True
    ranges, others = one.ranges(), other.ranges()
    if one.shape != other.shape or one.dtype != other.dtype or ranges is None or others is None:
        return False
    return ranges == others or all(
        read_ranges(cut(ranges, start, size)) == read_ranges(cut(others, start, size))
        for start in range(0, one.nbytes, _BLOCK_BYTES)
        for size in (min(_BLOCK_BYTES, one.nbytes - start),)
    )
