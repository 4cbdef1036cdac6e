"""SentencePiece models: their pieces, and how they treat spaces.

google/sentencepiece `src/sentencepiece_model.proto`: ModelProto, TrainerSpec, NormalizerSpec; wire
format: protobuf.dev, "Encoding". The packages that read them, sentencepiece and protobuf, are no
dependencies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.small_file import read_small

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_MAX_BYTES = 64 << 20
_MAX_PIECES = 1_000_000  # Gemma's has 256,000
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A token: its text (with `SPACE` for a space), its score, and its type, such as `NORMAL`."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a `tokenizer.model` says; a piece's id is its place in `pieces`."""

    pieces: tuple[SentencePiece, ...]
    algorithm: int
    byte_fallback: bool
    adds_dummy_prefix: bool
    removes_extra_spaces: bool
    escapes_spaces: bool
    charsmap: bytes

    @property
    def ids(self) -> dict[str, int]:
        """The first id of each text."""
        found: dict[str, int] = {}
        for index, piece in enumerate(self.pieces):
            found.setdefault(piece.text, index)
        return found


class Field(NamedTuple):
    """A field: a varint's value is an int; a fixed-width number is its bytes, as a text is.

    `raw` are all its bytes in the message.
    """

    number: int
    value: int | bytes
    raw: bytes


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in the file `path`. Raises `CorruptFileError` if it is none."""
    found: dict[int, list[bytes]] = {_PIECES: [], _TRAINER: [], _NORMALIZER: []}
    try:
        for number, value, _ in fields(model_bytes(path)):
            if number in found and isinstance(value, bytes):
                found[number].append(value)
                if len(found[number]) > _MAX_PIECES:
                    raise ValueError("too many pieces")
        pieces = tuple(map(_piece, found[_PIECES]))
        # A message in several fields is the one that their bytes make together.
        trainer, normalizer = (_values(b"".join(found[n])) for n in (_TRAINER, _NORMALIZER))
    except (IndexError, ValueError, struct.error) as error:
        raise CorruptFileError("is not a SentencePiece model", where=str(path)) from error
    if not pieces:
        raise CorruptFileError("is a SentencePiece model without pieces", where=str(path))
    charsmap = normalizer.get(2)
    return SentencePieceModel(
        pieces,
        algorithm=_number(trainer, 3, UNIGRAM),
        byte_fallback=bool(_number(trainer, 35, 0)),
        adds_dummy_prefix=bool(_number(normalizer, 3, 1)),
        removes_extra_spaces=bool(_number(normalizer, 4, 1)),
        escapes_spaces=bool(_number(normalizer, 5, 1)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
    )


def model_bytes(path: Path) -> bytes:
    """The bytes of a model file. Raises `CorruptFileError` if there are too many, or none."""
    return read_small(path, _MAX_BYTES)


def with_texts(data: bytes, texts: Mapping[int, str]) -> bytes:
    """The model `data` with other texts for the pieces of some ids; all else stays, byte for byte.

    A model that `read_sentencepiece` reads is assumed.
    """
    result = []
    index = 0
    for number, value, raw in fields(data):
        if number == _PIECES and isinstance(value, bytes):
            if index in texts:
                rest = b"".join(part.raw for part in fields(value) if part.number != 1)
                raw = field_bytes(_PIECES, field_bytes(1, texts[index].encode()) + rest)
            index += 1
        result.append(raw)
    return b"".join(result)


def fields(data: bytes) -> Iterator[Field]:
    """The fields of a message in order. Raises `ValueError` or `IndexError` if it is none."""
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        kind = key & 7
        length = _FIXED_BYTES.get(kind)
        if kind in (_VARINT, _BYTES):
            length, position = _varint(data, position)
        if length is None:
            raise ValueError(f"wire type {kind}")
        value: int | bytes = length
        if kind != _VARINT:
            value, position = data[position : position + length], position + length
            if position > len(data):
                raise ValueError("a field ends beyond the message")
        yield Field(key >> 3, value, data[start:position])


def field_bytes(number: int, value: bytes) -> bytes:
    """A length-delimited field; `number` is at most 15."""
    head, length = bytearray([number << 3 | _BYTES]), len(value)
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise ValueError("a number without end")


def _piece(data: bytes) -> SentencePiece:
    values = _values(data)
    text, score = values.get(1, b""), values.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece without text")
    kind = _number(values, 3, NORMAL)
    return SentencePiece(text.decode("utf-8", "replace"), struct.unpack("<f", score)[0], kind)


def _values(data: bytes) -> dict[int, int | bytes]:
    return {field.number: field.value for field in fields(data)}


def _number(values: Mapping[int, int | bytes], number: int, default: int) -> int:
    value = values.get(number, default)
    return value if isinstance(value, int) else default
