"""Rounding a block of values to another dtype once, not twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Elements that are rounded to odd at a time. They stay in a processor's cache, and are so many that
# threads seldom wait for each other between two operations, where Python lets one at a time go on.
_CHUNK = 1 << 17

# Of a float64's significand, the last bit that rounding to odd keeps: four more than float16 has,
# and so few that float32 still holds those of the smallest bfloat16s.
_ODD_BIT = 1 << 38


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
        _round_by_odd(source, target)
    else:
        target.copy_(source)


def _round_by_odd(source: torch.Tensor, target: torch.Tensor) -> None:
    """Rounds to odd first: cuts bits off, and sets the last one kept if any of them was set.

    So float32 holds the value exactly, it is never half-way if it was not, and the second rounding
    is right (Boldo and Melquiond, "When double rounding is odd").
    """
    import numpy as np
    import torch

    exact = source.numpy().view(np.int64)
    # In memory that is used again: new memory for each chunk costs more than the rounding.
    odd = np.empty(min(_CHUNK, len(exact)), np.int64)
    for start in range(0, len(exact), _CHUNK):
        bits = exact[start : start + _CHUNK]
        kept = odd[: len(bits)]
        np.bitwise_and(bits, _ODD_BIT - 1, out=kept)
        kept += _ODD_BIT - 1  # Carries into the bit unless all bits below are zero.
        kept |= bits
        kept &= -_ODD_BIT
        target[start : start + _CHUNK].copy_(torch.from_numpy(kept).view(torch.float64))


def first_overflow(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[int, float] | None:
    """The first element, counted through all dimensions, that is finite in `exact` and infinite in
    `rounded`, as (its number, the finite value); None if there is none."""
    lost = (exact.isfinite() & rounded.isinf()).flatten()
    if not bool(lost.any()):
        return None
    index = int(lost.nonzero()[0, 0])
    return index, float(exact.flatten()[index])
