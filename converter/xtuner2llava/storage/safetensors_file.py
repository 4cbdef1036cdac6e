"""Safetensors files, read by their header alone.

The header's rules are those of the format's own page (huggingface/safetensors README, "Format"):
8 bytes of length, JSON, then the data without holes or overlaps.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, UnsupportedError, raise_faults
from xtuner2llava.storage.json_file import Json, parse_json
from xtuner2llava.tensors import BY_CODE, DType, FileRange, LazyTensor, Shape, SourceFile, Stored
from xtuner2llava.tensors.files import read_ranges

# The format's own limit is 100 MB, which may describe more tensors than memory is worth. This is
# for some 300,000, and the largest models have a few thousand in a file.
MAX_HEADER_BYTES = 32_000_000
# A file begins with so many bytes that say how long its header is.
START_BYTES = 8


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor in a header; `offset` counts bytes from the start of the file."""

    name: str
    dtype: DType
    shape: Shape
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a safetensors file says; `metadata` is as it stands there."""

    entries: tuple[HeaderEntry, ...]
    metadata: Json


class SafetensorsFile:
    """An open safetensors file: its tensors by name, its metadata, and its header's hash."""

    def __init__(self, path: Path) -> None:
        """Reads the header of `path`, and no tensor. Raises `CorruptFileError` on any fault."""
        self.file = SourceFile.of(path)
        start = bytes(read_ranges([FileRange(self.file, 0, min(START_BYTES, self.file.size))]))
        length = header_length(start, self.file.size, str(path))
        data = bytes(read_ranges([FileRange(self.file, START_BYTES, length)]))
        self.header_sha256 = hashlib.sha256(data).hexdigest()
        header = parse_header(data, self.file.size, str(path))
        self.metadata = header.metadata
        self.tensors: dict[str, LazyTensor] = {
            entry.name: Stored(
                entry.name,
                entry.dtype,
                entry.shape,
                (FileRange(self.file, entry.offset, entry.length),),
            )
            for entry in header.entries
        }


def header_length(start: bytes, size: int, where: str) -> int:
    """The length of the header of a file of `size` bytes, from its first `START_BYTES`.

    Raises `CorruptFileError` if it cannot be, `UnsupportedError` for a git-lfs pointer.
    """
    if size < START_BYTES + 2:
        raise CorruptFileError(f"has only {size} bytes", where=where)
    (length,) = struct.unpack("<Q", start)
    if start == b"version ":
        raise UnsupportedError(
            "a git-lfs pointer, not the file itself",
            where=where,
            advice="Run `git lfs pull` in its repository.",
        )
    if MAX_HEADER_BYTES < length <= size - START_BYTES:
        raise CorruptFileError(
            f"its header claims {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}",
            where=where,
            advice="If it is a model all the same, save it in more and smaller shards.",
        )
    if length > size - START_BYTES:
        raise CorruptFileError(
            f"its header claims {length:,} bytes, the file has {size:,}",
            where=where,
            advice="It is truncated or no safetensors file; copy or download it again.",
        )
    return int(length)


def parse_header(data: bytes, size: int, where: str) -> Header:
    """What the header `data`, without its length, says of a file of `size` bytes.

    Raises `CorruptFileError` with all that is wrong with it.
    """
    described = parse_json(data, f"{where} (header)")
    metadata = described.pop("__metadata__", None)
    data_start = START_BYTES + len(data)
    entries: list[HeaderEntry] = []
    faults: list[Fault] = []
    for name, value in described.items():
        try:
            entries.append(_entry(name, value, data_start, size))
        except ValueError as error:
            faults.append(Fault(f"{where}, tensor {name}", str(error)))
    raise_faults(CorruptFileError, faults)
    _reject_holes(entries, data_start, size, where)
    return Header(tuple(entries), metadata)


def _entry(name: str, entry: Json, data_start: int, size: int) -> HeaderEntry:
    if not isinstance(entry, dict):
        raise ValueError("its header entry is no object")
    code = entry.get("dtype")
    if not isinstance(code, str) or code not in BY_CODE:
        raise ValueError(f"dtype {code!r} is unknown")
    shape = _natural_numbers(entry.get("shape"))
    if shape is None or len(shape) > 16:
        raise ValueError(f"shape {entry.get('shape')!r} makes no sense")
    offsets = _natural_numbers(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {entry.get('data_offsets')!r} make no sense")
    begin, end = offsets
    dtype = BY_CODE[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{end - begin:,} bytes given, shape {shape} of {dtype} has "
            f"{math.prod(shape) * dtype.itemsize:,}"
        )
    if data_start + end > size:
        raise ValueError(f"ends at byte {data_start + end:,} of a file with {size:,}")
    return HeaderEntry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _reject_holes(entries: Sequence[HeaderEntry], data_start: int, size: int, where: str) -> None:
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.length)):
        if entry.offset != position:
            kind = "overlaps the tensor before it" if entry.offset < position else "follows a hole"
            raise CorruptFileError(
                f"tensor {entry.name} at byte {entry.offset - data_start:,} {kind}", where=where
            )
        position += entry.length
    if position != size:
        raise CorruptFileError(
            f"has {size:,} bytes, its header describes {position:,}",
            where=where,
            advice="The file is truncated or damaged; copy or download it again.",
        )


def _natural_numbers(value: Json) -> list[int] | None:
    if not isinstance(value, list):
        return None
    numbers = [n for n in value if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    return numbers if len(numbers) == len(value) else None
