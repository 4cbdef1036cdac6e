"""CRC-32 sums are those of zlib, however long the bytes and however they are put together."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner2llava.tensors.crc32 import _FAR, combined, crc32

RANDOM = random.Random(0)  # noqa: S311


@pytest.mark.parametrize("start", [0, 1, 0xFFFFFFFF, 0x12345678])
@pytest.mark.parametrize(
    "length", [0, 1, 2 * _FAR - 1, 2 * _FAR, 2 * _FAR + 1, 512 << 10, 1_000_003]
)
def test_sums_are_those_of_zlib(length: int, start: int) -> None:
    data = RANDOM.randbytes(length)
    assert crc32(memoryview(bytearray(data)), start) == zlib.crc32(data, start)


def test_every_place_of_a_flipped_bit_counts() -> None:
    data = bytearray(RANDOM.randbytes(512 << 10))
    expected = zlib.crc32(data)
    for place in (0, 3, 4, *RANDOM.sample(range(len(data)), 100), len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1 << RANDOM.randrange(8)
        assert crc32(memoryview(bytearray(changed))) == zlib.crc32(changed) != expected


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_sums_of_pieces_are_combined(first: bytes, second: bytes) -> None:
    found = combined(zlib.crc32(first), zlib.crc32(second), len(second))
    assert found == zlib.crc32(first + second)


def test_a_long_second_piece() -> None:
    long = bytes(range(256)) * 40_000
    assert combined(zlib.crc32(b"abc"), zlib.crc32(long), len(long)) == zlib.crc32(b"abc" + long)
