"""Verification: what is on disk, compared with the plan and with the source, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

from xtuner2llava.errors import VerificationError
from xtuner2llava.tensors import thread_cache
from xtuner2llava.writing.blocks import blocks, position
from xtuner2llava.writing.disk import disk_errors, read_all, write_all
from xtuner2llava.writing.shards import Entry, Shard

_ADVICE = "The disk or memory of this machine may be faulty: convert again, best to another disk."


def verify_shard(path: Path, shard: Shard) -> None:
    """Compares the file at `path` with `shard`: size, header, then tensor by tensor.

    Stored tensors are read from their sources again, computed ones are computed again. Raises
    `VerificationError` for the first difference and, for the sources, `CorruptFileError`.
    """
    with disk_errors(path, "cannot be read back"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file = WrittenFile(path, descriptor)
        file.require_header(shard)
        for entry in shard.entries:
            offset = entry.offset
            for expected in blocks(entry):
                file.require_same(entry, offset, expected)
                offset += len(expected)
    finally:
        os.close(descriptor)


class WrittenFile:
    """The file at `path`, open as `descriptor`, as something to compare with what it should be."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    def write(self, data: memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        with disk_errors(self.path):
            write_all(self.descriptor, data, offset)

    def flush(self) -> None:
        with disk_errors(self.path):
            os.fsync(self.descriptor)

    def require_header(self, shard: Shard) -> None:
        """Raises `VerificationError` unless it has the size and the header of `shard`."""
        with disk_errors(self.path, "cannot be read back"):
            size = os.fstat(self.descriptor).st_size
            if size != shard.size:
                raise VerificationError(
                    f"has {size:,} bytes, expected {shard.size:,}",
                    where=str(self.path),
                    advice=_ADVICE,
                )
            header = bytearray(len(shard.header))
            read_all(self.descriptor, memoryview(header), 0)
        if header != shard.header:
            raise VerificationError(
                "its header is not the one planned", where=str(self.path), advice=_ADVICE
            )

    def read(self, offset: int, count: int) -> memoryview:
        """The `count` bytes at `offset`, in memory that this thread's next call uses again."""
        found = thread_cache.buffer("found", count)
        with disk_errors(self.path, "cannot be read back"):
            read_all(self.descriptor, found, offset)
        return found

    def require_same(
        self, entry: Entry, offset: int, expected: memoryview, found: memoryview | None = None
    ) -> None:
        """Raises `VerificationError` unless it has the bytes `expected` of `entry` at `offset`.

        `found` are the bytes there, if they were read already.
        """
        if found is None:
            found = self.read(offset, len(expected))
        if not _same(found, expected):
            raise _difference(self.path, entry, offset, found, expected)


def _same(one: memoryview, other: memoryview) -> bool:
    """Whether they are equal, at the speed of memory, and while other threads go on."""
    import numpy as np

    whole = len(one) // 8 * 8
    words, others = (np.frombuffer(data[:whole], np.uint64) for data in (one, other))
    return np.array_equal(words, others) and one[whole:] == other[whole:]


def _difference(
    path: Path, entry: Entry, offset: int, found: memoryview, expected: memoryview
) -> VerificationError:
    tensor = entry.tensor
    first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    size = tensor.dtype.itemsize
    start = first - (offset + first - entry.offset) % size
    element = (offset + start - entry.offset) // size
    return VerificationError(
        f"element {list(position(element, tensor.shape))} (byte {offset + first:,} of the file) "
        f"is {bytes(found[start : start + size]).hex()}, "
        f"expected {bytes(expected[start : start + size]).hex()}",
        where=f"{path}: {entry.name}",
        advice=_ADVICE,
    )
