"""SentencePiece models: their pieces, and how they treat spaces.

google/sentencepiece `src/sentencepiece_model.proto`: ModelProto, TrainerSpec, NormalizerSpec.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.tokenizers.protobuf import field_bytes, fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_MAX_BYTES = 64 << 20
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A token: its text (a space is U+2581), its score, and its type, such as `NORMAL`."""

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
        found: dict[str, int] = {}
        for index, piece in enumerate(self.pieces):
            found.setdefault(piece.text, index)
        return found

    def first(self, kind: int) -> str | None:
        """The text of the first piece of a type."""
        return next((piece.text for piece in self.pieces if piece.kind == kind), None)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in the file `path`. Raises `CorruptFileError` if it is none."""
    data = model_bytes(path)
    pieces: list[SentencePiece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value, _ in fields(data):
            if not isinstance(value, bytes):
                continue
            if number == _PIECES:
                pieces.append(_piece(value))
            elif number == _TRAINER:
                trainer |= _values(value)
            elif number == _NORMALIZER:
                normalizer |= _values(value)
    except (IndexError, ValueError, struct.error) as error:
        raise CorruptFileError("is not a SentencePiece model", where=str(path)) from error
    if not pieces:
        raise CorruptFileError("is a SentencePiece model without pieces", where=str(path))
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        tuple(pieces),
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
    for field in fields(data):
        raw = field.raw
        if field.number == _PIECES and isinstance(field.value, bytes):
            if index in texts:
                rest = b"".join(part.raw for part in fields(field.value) if part.number != 1)
                raw = field_bytes(_PIECES, field_bytes(1, texts[index].encode()) + rest)
            index += 1
        result.append(raw)
    return b"".join(result)


def _piece(data: bytes) -> SentencePiece:
    values = _values(data)
    text, score = values.get(1, b""), values.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece without text")
    return SentencePiece(
        text.decode("utf-8", "replace"),
        struct.unpack("<f", score)[0],
        _number(values, 3, NORMAL),
    )


def _values(data: bytes) -> dict[int, int | bytes]:
    return {field.number: field.value for field in fields(data)}


def _number(values: Mapping[int, int | bytes], number: int, default: int) -> int:
    value = values.get(number, default)
    return value if isinstance(value, int) else default
