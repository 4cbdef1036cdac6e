"""Files of `torch.save`, opened as data: names, shapes and file ranges, without torch.

The format is a zip whose entries are stored uncompressed: `{root}/data.pkl` is a pickle that
refers to storages, `{root}/data/{key}` are their bytes (pytorch/pytorch
`caffe2/serialize/inline_container.cc`, `torch/serialization.py`).
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, UnsupportedError, raise_faults
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.pickle_reader import TensorReference, Value, read_pickle
from xtuner2llava.storage.small_file import git_lfs_pointer
from xtuner2llava.tensors.files import FileRange, SourceFile, ZipMember, read_ranges
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.stored import view_of_storage

# Far above the largest seen (70B with optimizer state and message hub: some megabytes).
_MAX_PICKLE_BYTES = 256 << 20
# About a hundred bytes a storage.
_MAX_DIRECTORY_BYTES = 32 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# What zipfile raises for a damaged directory, besides its own error.
_DAMAGED_DIRECTORY = (ValueError, NotImplementedError, OverflowError, struct.error)
_TRUNCATED = "The file is truncated; copy or download it again."
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


class _DirectoryReader(io.FileIO):
    """A file whose directory `zipfile` reads up to a bounded size, not the size that it claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has {size:,} bytes")
        return super().read(_MAX_DIRECTORY_BYTES if size is None or size < 0 else size) or b""


class TorchFile:
    """An open `torch.save` file: its value, and its tensors on demand."""

    def __init__(self, path: Path, pickles: dict[bytes, Value] | None = None) -> None:
        """Reads the zip directory and the pickle of `path`, and no tensor.

        `pickles` are values of pickles that were read before, where several files have equal ones.
        Raises `CorruptFileError`, `UnsafeFileError` for a pickle of more than data, and
        `UnsupportedError` for what is not a zip of `torch.save`.
        """
        self.file = SourceFile.of(path)
        self._limits: dict[str, int] = {}
        self._entries = self._read_directory()
        self._storages: dict[str, FileRange] = {}
        split = [name.partition("/") for name in self._entries]
        roots = [root for root, _, name in split if name == "data.pkl"]
        if len(roots) != 1:
            found = f"{len(roots)} data.pkl" if roots else "no data.pkl"
            raise UnsupportedError(
                f"a zip, but not one that torch.save wrote ({found} in it)", where=str(path)
            )
        self._root = roots[0]
        order = self._small_entry("byteorder")
        if order not in (b"", b"little"):
            raise UnsupportedError(
                f"its byte order is {order[:20].decode('ascii', 'replace')!r}, expected 'little'",
                where=str(path),
            )
        data = self._small_entry("data.pkl")
        pickles = {} if pickles is None else pickles
        if data not in pickles:
            pickles[data] = read_pickle(data, f"{path} (data.pkl)")
        self.value: Value = pickles[data]

    @property
    def fingerprint(self) -> Fingerprint:
        """Its digest is of the name, size and CRC-32 of each entry in the zip directory."""
        lines = (f"{e.filename} {e.file_size} {e.CRC:08x}\n" for e in self._entries.values())
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        return Fingerprint(self.file.path.name, self.file.size, digest)

    def tensors(self, references: Mapping[str, TensorReference]) -> dict[str, LazyTensor]:
        """Lazy tensors for `references`, which this file's value holds; all faults at once."""
        tensors: dict[str, LazyTensor] = {}
        faults: list[Fault] = []
        for name, reference in references.items():
            try:
                tensors[name] = self._tensor(name, reference)
            except ValueError as error:
                faults.append(Fault(f"{self.file.path}, tensor {name}", str(error)))
        raise_faults(CorruptFileError, faults)
        return tensors

    def _tensor(self, name: str, reference: TensorReference) -> LazyTensor:
        claimed = reference.storage
        if claimed.key not in self._storages:
            self._storages[claimed.key] = self._range_of(f"data/{claimed.key}")
        storage, size = self._storages[claimed.key], claimed.elements * claimed.dtype.itemsize
        if size > storage.length:
            raise ValueError(
                f"its storage should have {size:,} bytes, the file has {storage.length:,}"
            )
        return view_of_storage(
            name, claimed.dtype, reference.shape, storage, reference.strides, reference.offset
        )

    def _read_directory(self) -> dict[str, zipfile.ZipInfo]:
        """The entries by name; sets how far each may reach: to the next, or to the directory."""
        path = self.file.path
        try:
            with _DirectoryReader(path) as stream, zipfile.ZipFile(stream) as archive:
                entries, end = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, OSError, *_DAMAGED_DIRECTORY) as error:
            raise _not_a_zip(path, error) from error
        found = {entry.filename: entry for entry in entries}
        if len(found) < len(entries):
            (name, _), *_ = Counter(entry.filename for entry in entries).most_common(1)
            raise self._corrupt(f"two entries '{name}'")
        in_file = sorted(entries, key=lambda entry: entry.header_offset)
        if in_file and in_file[0].header_offset < 0:
            raise self._corrupt(f"entry '{in_file[0].filename}' begins before the file", _TRUNCATED)
        for entry, following in zip_longest(in_file, in_file[1:]):
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
                raise self._corrupt(
                    f"entry '{entry.filename}' is compressed or encrypted; torch stores them plain"
                )
            limit = following.header_offset if following else end
            if entry.header_offset + _LOCAL_HEADER.size + entry.file_size > limit:
                if following:
                    names = f"'{entry.filename}' and '{following.filename}'"
                    raise self._corrupt(f"entries {names} overlap")
                what = f"entry '{entry.filename}' ends beyond the data, which has {end:,} bytes"
                raise self._corrupt(what, _TRUNCATED)
            self._limits[entry.filename] = limit
        return found

    def _small_entry(self, name: str) -> bytes:
        """The bytes of a metadata entry; empty if the file has none."""
        entry = self._entries.get(f"{self._root}/{name}")
        if entry is None:
            return b""
        if entry.file_size > _MAX_PICKLE_BYTES:
            raise self._corrupt(
                f"its {name} has {entry.file_size:,} bytes, more than any checkpoint needs"
            )
        data = bytes(read_ranges([self._range_of(name)]))
        if entry.CRC and zlib.crc32(data) != entry.CRC:
            raise self._corrupt(
                f"its {name} does not match its checksum",
                "The file is damaged; copy or download it again.",
            )
        return data

    def _range_of(self, name: str) -> FileRange:
        """Where the data of an entry lies: behind its local header, whose length varies."""
        entry = self._entries.get(f"{self._root}/{name}")
        if entry is None:
            raise self._corrupt(f"has no entry '{name}'")
        expected = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        size = _LOCAL_HEADER.size + len(expected)
        header = bytes(read_ranges([FileRange(self.file, entry.header_offset, size)]))
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
        offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if (
            signature != b"PK\x03\x04"
            or name_length != len(expected)
            or header[_LOCAL_HEADER.size :] != expected
            or offset + entry.file_size > self._limits[entry.filename]
        ):
            what = f"entry '{entry.filename}' is not where the directory says"
            raise self._corrupt(what, _TRUNCATED)
        member = ZipMember(entry.filename, offset, entry.file_size, entry.CRC)
        return FileRange(self.file, offset, entry.file_size, member)

    def _corrupt(self, what: str, advice: str = "") -> CorruptFileError:
        return CorruptFileError(what, where=str(self.file.path), advice=advice)


def _not_a_zip(path: Path, error: Exception) -> UnsupportedError | CorruptFileError:
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as failure:
        return CorruptFileError(f"cannot be read ({failure.strerror})", where=str(path))
    if start.startswith(b"version https://git-lfs"):
        return git_lfs_pointer(str(path))
    again = "Copy or download it again."
    kind: type[UnsupportedError | CorruptFileError] = UnsupportedError
    what, advice = f"not a checkpoint of torch.save ({error})", ""
    if not start:
        kind, what, advice = CorruptFileError, "is empty", again
    elif start.startswith(b"PK"):
        what = f"starts as a checkpoint of torch.save but its end is missing ({error})"
        kind, advice = CorruptFileError, _TRUNCATED
    elif _LEGACY_MAGIC in start:
        what = "the format that torch.save wrote before version 1.6 (no zip)"
        advice = "Save it again where it is trusted: torch.save(torch.load(path), new_path)."
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what, advice = "a web page, such as a site's answer in place of the file", again
    elif start[8:10] == b'{"':
        what = "a safetensors file alone, which does not say whose its tensors are"
        advice = "Give the folder that it lies in."
    return kind(what, where=str(path), advice=advice)
