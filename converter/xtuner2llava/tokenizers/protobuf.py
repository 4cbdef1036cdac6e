"""Protobuf messages as lists of fields, for the little that SentencePiece models need of it.

Wire format: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    """A field: a varint's value is an int; a fixed-width number is its bytes, as a text is.

    `raw` are all its bytes in the message.
    """

    number: int
    value: int | bytes
    raw: bytes


def fields(data: bytes) -> Iterator[Field]:
    """The fields of a message in order. Raises `ValueError` or `IndexError` if it is none."""
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        kind = key & 7
        value: int | bytes
        if kind == VARINT:
            value, position = _varint(data, position)
        elif kind in (FIXED32, FIXED64, BYTES):
            length = _FIXED_BYTES.get(kind, 0)
            if kind == BYTES:
                length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("a field ends beyond the message")
            value = data[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {kind}")
        yield Field(key >> 3, value, data[start:position])


def field_bytes(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return _varint_bytes(number << 3 | BYTES) + _varint_bytes(len(value)) + value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise ValueError("a number without end")


def _varint_bytes(value: int) -> bytes:
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
