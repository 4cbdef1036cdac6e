"""NaN and infinity, found in raw bytes at the speed of memory."""

from __future__ import annotations

from dataclasses import dataclass

# Per safetensors code: size in bytes, and the bits of +infinity, above which are the NaNs.
_INFINITY = {
    "F64": (8, 0x7FF0000000000000),
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
}


@dataclass(frozen=True, slots=True)
class NonFinite:
    """How many elements of the tensor `name` are NaN, and how many are infinite."""

    name: str
    nan: int
    infinite: int


def count_nonfinite(data: memoryview, code: str) -> tuple[int, int]:
    """(NaNs, infinities) among the little-endian elements `data` of the dtype with that code.

    (0, 0) for dtypes that have neither, and for the 8-bit floats, which are not looked at.
    """
    if code not in _INFINITY or not data:
        return 0, 0
    import numpy as np

    size, infinity = _INFINITY[code]
    sign = 1 << (8 * size - 1)
    bits = np.frombuffer(data, dtype=f"<u{size}")
    # As signed numbers, the positive floats are the largest; as unsigned ones, the negative
    # floats. So two maxima, which need no buffer, find whether there is anything to count.
    if int(bits.view(f"<i{size}").max()) < infinity and int(bits.max()) < infinity | sign:
        return 0, 0
    magnitude = bits & bits.dtype.type(sign - 1)
    return int(np.count_nonzero(magnitude > infinity)), int(np.count_nonzero(magnitude == infinity))
