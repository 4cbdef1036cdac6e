"""Rounding a block of values to another dtype once, not twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Elements that are rounded at a time, which a processor's caches hold. Python lets one thread at a
# time begin an operation, so that smaller ones would have many threads wait for each other.
_CHUNK = 1 << 20

# Bits of a float32 that are zero wherever it is half-way between two narrower floats.
_HALF_WAY = 0xFFF

# Of a float64's significand, the last bit that rounding to odd keeps: four more than float16 has,
# and so few that float32 still holds those of the smallest bfloat16s.
_ODD_BIT = 1 << 38


def scratch_bytes(count: int) -> int:
    """What rounding `count` float64s takes: float32s, their low bits, and which of these are 0."""
    return 9 * min(count, _CHUNK)


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

    torch takes float64 to narrower floats by way of float32 (c10/util/Half.h, BFloat16.h): where
    the first rounding ends half-way between two of their numbers, the second goes by parity, not
    by the value. About one float16 in 16,000 differs for that. Here it does not.
    """
    import torch

    if source.dtype == torch.float64 and target.itemsize <= 2 and target.is_floating_point():
        _round_twice(source, target)
    else:
        target.copy_(source)


def _round_twice(source: torch.Tensor, target: torch.Tensor) -> None:
    """Rounds by way of float32, and again where that is half-way between two numbers of `target`.

    There it rounds to odd first: it cuts bits off, and sets the last one kept if any of them was
    set. So float32 holds the value exactly, it is never half-way if it was not, and the second
    rounding is right (Boldo and Melquiond, "When double rounding is odd").
    """
    import numpy as np
    import torch

    integer = torch.int16 if target.itemsize == 2 else torch.uint8  # 8-bit floats are not indexed.
    # In memory that is used again: new memory for each chunk costs more than the rounding.
    singles = torch.empty(min(_CHUNK, len(source)), dtype=torch.float32)
    masked = np.empty(len(singles), np.uint32)
    for start in range(0, len(source), _CHUNK):
        exact, result = source[start : start + _CHUNK], target[start : start + _CHUNK]
        single = singles[: len(exact)].copy_(exact)
        result.copy_(single)
        low = np.bitwise_and(single.numpy().view(np.uint32), _HALF_WAY, out=masked[: len(exact)])
        unsure = low == 0
        if np.count_nonzero(unsure) > len(unsure) // 64:  # Numbers of both dtypes, such as zeros.
            unsure &= single.numpy() != exact.numpy()
        doubtful = np.flatnonzero(unsure)
        bits = exact.numpy().view(np.int64)[doubtful]
        # The sum carries into the bit unless all bits below are zero.
        odd = ((bits & _ODD_BIT - 1) + (_ODD_BIT - 1) | bits) & -_ODD_BIT
        again = torch.from_numpy(odd.view(np.float64)).to(target.dtype)
        result.view(integer)[doubtful] = again.view(integer)


def first_overflow(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[int, float] | None:
    """The first element, counted through all dimensions, that is finite in `exact` and infinite in
    `rounded`, as (its number, the finite value); None if there is none."""
    lost = (exact.isfinite() & rounded.isinf()).flatten()
    if not bool(lost.any()):
        return None
    index = int(lost.nonzero()[0, 0])
    return index, float(exact.flatten()[index])
