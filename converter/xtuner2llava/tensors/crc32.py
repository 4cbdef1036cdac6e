"""CRC-32 sums, at the speed of memory where zlib has no special instructions for them."""

from __future__ import annotations

import zlib
from functools import lru_cache

# zlib's polynomial P, with the coefficient of x^0 in the highest bit.
_POLYNOMIAL = 0xEDB88320
# Modulo P, x^(8 * 91639) equals x^(8 * 41678) + 1. So adding a byte, without carry, to two others
# that far behind it leaves the remainder as it was without that byte: two XORs take the place of
# most of the division (Russell, "Chorba: A novel CRC32 implementation", arXiv 2412.16398).
_FAR = 91639
_NEAR = _FAR - 41678


def crc32(data: memoryview, start: int = 0) -> int:
    """What `zlib.crc32` returns. It overwrites `data`."""
    end = len(data) - _FAR
    if end < _FAR:
        return zlib.crc32(data, start)
    import numpy as np

    values = np.frombuffer(data, np.uint8)
    # The start value is XORed into the first bytes; what follows is linear.
    values[:4] ^= np.frombuffer((start ^ 0xFFFFFFFF).to_bytes(4, "little"), np.uint8)
    for place in range(0, end, _NEAR):
        part = values[place : min(place + _NEAR, end)]
        for distance in (_NEAR, _FAR):
            behind = values[place + distance : place + distance + len(part)]
            np.bitwise_xor(behind, part, out=behind)
    return zlib.crc32(data[end:], 0xFFFFFFFF)


def combined(first: int, second: int, length: int) -> int:
    """The CRC-32 of two byte strings, one after the other; the second has `length` bytes.

    The first is multiplied by x^(8 * length) modulo P (zlib `crc32.c`, `crc32_combine`).
    """
    return _product(_shift(length), first) ^ second


@lru_cache(1024)  # Most blocks have the same length.
def _shift(length: int) -> int:
    """x^(8 * length) modulo P."""
    shift, power = 1 << 31, 1 << 23  # x^0, and x^8: a byte
    while length:
        if length & 1:
            shift = _product(shift, power)
        power = _product(power, power)
        length >>= 1
    return shift


def _product(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
