"""Rounding a block of values to another dtype once, not twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

# Elements in work at a time. They stay in a processor's cache, and torch does so many without
# waking other threads (at::internal::GRAIN_SIZE), whose waiting costs more where all are busy.
_CHUNK = 1 << 15


@dataclass(frozen=True, slots=True)
class _Narrowing:
    """Of a float32, the bits that a narrower dtype cannot hold, and what they are half-way between
    two of its neighbours; the bits of a float32 below which that dtype holds fewer."""

    lost: int
    tie: int
    smallest: int = 0


_NARROWINGS = {
    "torch.bfloat16": _Narrowing(0xFFFF, 0x8000),
    "torch.float16": _Narrowing(0x1FFF, 0x1000, (127 - 14) << 23),
}


def round_to(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`block` in `dtype`, rounded as by `round_into`; `block` itself if that is its dtype."""
    import torch

    if block.dtype == dtype:
        return block
    result = torch.empty(block.shape, dtype=dtype)
    round_into(block.reshape(-1), result.view(-1))
    return result


def round_into(source: torch.Tensor, target: torch.Tensor) -> None:
    """Fills `target` with `source`, both of one dimension, rounded to nearest, ties to even.

    torch takes float64 to the 16-bit floats by way of float32 (c10/util/Half.h, BFloat16.h): where
    the first rounding ends half-way between two 16-bit neighbours, the second goes by parity, not
    by the value. About one float16 in 16,000 differs for that. Here it does not.
    """
    import torch

    narrowing = _NARROWINGS.get(str(target.dtype))
    twice = source.dtype == torch.float64 and target.itemsize <= 2 and target.is_floating_point()
    if twice and narrowing is not None:
        _round_twice(source, target, narrowing)
        return
    for start in range(0, source.numel(), _CHUNK):
        exact, rounded = source[start : start + _CHUNK], target[start : start + _CHUNK]
        rounded.copy_(_by_odd(exact, target.dtype) if twice else exact)


def first_overflow(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[int, float] | None:
    """The first element, counted through all dimensions, that is finite in `exact` and infinite in
    `rounded`, as (its number, the finite value); None if there is none."""
    lost = (exact.isfinite() & rounded.isinf()).flatten()
    if not bool(lost.any()):
        return None
    index = int(lost.nonzero()[0, 0])
    return index, float(exact.flatten()[index])


def _round_twice(source: torch.Tensor, target: torch.Tensor, narrowing: _Narrowing) -> None:
    """By way of float32, as torch does, and by odd where that may be wrong."""
    import numpy as np
    import torch

    # In memory that is used again: new memory for each chunk costs more than the rounding.
    size = -(-min(_CHUNK, source.numel()) // 8) * 8
    buffer = torch.empty(size, dtype=torch.float32)
    spare, one, other = np.empty(size, np.int32), np.empty(size, np.bool_), np.empty(size, np.bool_)
    pending: list[np.ndarray] = []
    waiting = 0
    for start in range(0, source.numel(), _CHUNK):
        exact, rounded = source[start : start + _CHUNK], target[start : start + _CHUNK]
        count = exact.numel()
        single, masked, doubtful = buffer[:count], spare[:count], one[:count]
        rounded.copy_(single.copy_(exact))
        bits = single.numpy().view(np.int32)
        np.equal(np.bitwise_and(bits, narrowing.lost, out=masked), narrowing.tie, out=doubtful)
        if narrowing.smallest:
            np.bitwise_and(bits, 0x7FFFFFFF, out=masked)
            doubtful |= np.less(masked, narrowing.smallest, out=other[:count])
        pending.append(_places(one, count) + start)
        waiting += len(pending[-1])
        # Usually few in all, but where a weight is zero, every element.
        if waiting >= _CHUNK or start + count == source.numel():
            where = torch.from_numpy(np.concatenate(pending))
            target[where] = _by_odd(source[where], target.dtype)
            pending, waiting = [], 0


def _places(flags: np.ndarray, count: int) -> np.ndarray:
    """Where the first `count` of `flags` are true; looked for eight at a time, as few are."""
    import numpy as np

    end = -(-count // 8) * 8
    flags[count:end] = False
    eights = np.flatnonzero(flags[:end].view(np.uint64))
    places = (eights[:, None] * 8 + np.arange(8)).reshape(-1)
    found: np.ndarray = places[flags[places]]
    return found


def _by_odd(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same by rounding to odd first, which keeps what the second rounding must know.

    Inexact float32s are cut towards zero and get an odd last bit: so none is ever half-way, and
    each lies on the side of its float64 (Boldo and Melquiond, "When double rounding is odd").
    """
    import torch

    single = block.float()
    back = single.double()
    bits = single.view(torch.int32)
    bits -= (back.abs() > block.abs()).int()
    bits |= (back != block).int()
    return single.to(dtype)
