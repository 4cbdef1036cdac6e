"""Safetensors files, read by their header alone.

The header's rules are those of the format's own page (huggingface/safetensors README, "Format"):
8 bytes of length, JSON, then the data without holes or overlaps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from xtuner2llava.errors import CorruptFileError, Fault, raise_faults
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.json_file import Json, parse_json
from xtuner2llava.storage.small_file import git_lfs_pointer
from xtuner2llava.tensors.dtype import BY_CODE, DType
from xtuner2llava.tensors.files import FileRange, SourceFile, read_ranges
from xtuner2llava.tensors.lazy import LazyTensor, Shape
from xtuner2llava.tensors.stored import Stored

# The format's own limit is 100 MB, enough for headers that need more memory than is worth it. This
# is for some 300,000 tensors; the largest models have a few thousand in a file.
MAX_HEADER_BYTES = 32_000_000
# The length of the header comes first, in so many bytes.
START_BYTES = 8
_SAMPLES, _SAMPLE_BYTES = 4, 4096


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
    """The header of a safetensors file; `metadata` is not checked."""

    entries: tuple[HeaderEntry, ...]
    metadata: Json
    sha256: str


class SafetensorsFile:
    """An open safetensors file: its tensors by name, and its metadata."""

    def __init__(self, path: Path) -> None:
        """Reads the header of `path`, and no tensor. Raises `CorruptFileError` on any fault."""
        file = self.file = SourceFile.of(path)
        header = read_header(
            lambda offset, length: read_ranges([FileRange(file, offset, length)]),
            file.size,
            str(path),
        )
        self.metadata = header.metadata
        self._header_digest = header.sha256
        self.tensors: dict[str, LazyTensor] = {
            e.name: Stored(e.name, e.dtype, e.shape, (FileRange(file, e.offset, e.length),))
            for e in header.entries
        }

    def fingerprint(self, *, sampled: bool = False) -> Fingerprint:
        """Its digest is of the header, and if `sampled` of a few blocks of the data too.

        Checkpoints of one training have the same header.
        """
        file, digest = self.file, self._header_digest
        if sampled:
            length = min(_SAMPLE_BYTES, file.size)
            places = [(file.size - length) * n // _SAMPLES for n in range(1, _SAMPLES + 1)]
            data = read_ranges([FileRange(file, place, length) for place in places])
            digest = hashlib.sha256(digest.encode() + data).hexdigest()
        return Fingerprint(file.path.name, file.size, digest)


def read_header(read: Callable[[int, int], bytearray], size: int, where: str) -> Header:
    """The header of the file of `size` bytes that `read(offset, length)` reads.

    Raises `CorruptFileError` with all that is wrong with it, `UnsupportedError` for a git-lfs
    pointer.
    """
    start = bytes(read(0, min(START_BYTES, size)))
    if size < START_BYTES + 2:
        raise CorruptFileError(f"has only {size} bytes", where=where)
    if start == b"version ":
        raise git_lfs_pointer(where)
    length = int.from_bytes(start, "little")
    if length > size - START_BYTES:
        raise CorruptFileError(
            f"its header claims {length:,} bytes, the file has {size:,}",
            where=where,
            advice="It is truncated or not a safetensors file; copy or download it again.",
        )
    if length > MAX_HEADER_BYTES:
        raise CorruptFileError(
            f"its header claims {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}",
            where=where,
            advice="If it is a model all the same, save it in more and smaller shards.",
        )
    data = bytes(read(START_BYTES, length))
    described = parse_json(data, f"{where} (header)")
    metadata = described.pop("__metadata__", None)
    entries: list[HeaderEntry] = []
    faults: list[Fault] = []
    for name, value in described.items():
        try:
            entries.append(_entry(name, value, START_BYTES + length, size))
        except ValueError as error:
            faults.append(Fault(f"{where}, tensor {name}", str(error)))
    raise_faults(CorruptFileError, faults)
    _reject_holes(entries, START_BYTES + length, size, where)
    return Header(tuple(entries), metadata, hashlib.sha256(data).hexdigest())


def _entry(name: str, entry: Json, data_start: int, size: int) -> HeaderEntry:
    if not isinstance(entry, dict):
        raise ValueError("its header entry is not an object")
    code, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in BY_CODE:
        raise ValueError(f"dtype {code!r} is unknown")
    if not _are_natural(shape) or len(shape) > 16:
        raise ValueError(f"shape {shape!r} makes no sense")
    if not _are_natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {offsets!r} make no sense")
    (begin, end), dtype = offsets, BY_CODE[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        what = f"{end - begin:,} bytes given, shape {shape} of {dtype} has {nbytes:,}"
        raise ValueError(what)
    if data_start + end > size:
        raise ValueError(f"ends at byte {data_start + end:,} of a file with {size:,}")
    return HeaderEntry(name, dtype, tuple(shape), data_start + begin, nbytes)


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


def _are_natural(value: Json) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
