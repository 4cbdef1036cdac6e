"""Rounding a block of values to another dtype once, not twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Elements in work at a time. They stay in a processor's cache, and torch does so many without
# waking other threads (at::internal::GRAIN_SIZE), whose waiting costs more where all are busy.
_CHUNK = 1 << 15
# Of a float32, the bits that the narrower dtype cannot hold, and their value half-way between two
# of its neighbours.
_LOST_BITS = {"torch.bfloat16": (0xFFFF, 0x8000), "torch.float16": (0x1FFF, 0x1000)}
# Below it, float16 holds fewer bits than that.
_SMALLEST_NORMAL = {"torch.bfloat16": 0.0, "torch.float16": 2.0**-14}


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

    twice = source.dtype == torch.float64 and target.itemsize <= 2 and target.is_floating_point()
    for start in range(0, source.numel(), _CHUNK):
        exact, rounded = source[start : start + _CHUNK], target[start : start + _CHUNK]
        if not twice:
            rounded.copy_(exact)
        elif str(target.dtype) not in _LOST_BITS:
            rounded.copy_(_by_odd(exact, target.dtype))
        else:
            _round_twice(exact, rounded)


def _round_twice(exact: torch.Tensor, rounded: torch.Tensor) -> None:
    """By way of float32, as torch does, and by odd where that may be wrong."""
    import numpy as np
    import torch

    lost, tie = _LOST_BITS[str(rounded.dtype)]
    smallest = _SMALLEST_NORMAL[str(rounded.dtype)]
    single = exact.float()
    rounded.copy_(single)
    bits = single.numpy().view(np.int32)
    doubtful = (bits & lost) == tie
    if smallest:
        doubtful |= np.abs(single.numpy()) < smallest
    where = torch.from_numpy(np.flatnonzero(doubtful))
    if len(where):
        rounded[where] = _by_odd(exact[where], rounded.dtype)


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
