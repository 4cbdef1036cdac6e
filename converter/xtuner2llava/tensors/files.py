"""Byte ranges of source files, read without memory mapping.

A mapped file that another process truncates kills the reader with SIGBUS; `pread` turns the same
accident into an error message.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

# As zlib's, at several times its speed where the processor multiplies without carry.
from isal.isal_zlib import crc32

from xtuner2llava.errors import CorruptFileError

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when its header was read; size in bytes, mtime in nanoseconds."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """The state of `path` now. Raises `CorruptFileError` if it cannot be looked at."""
        try:
            status = path.stat()
        except OSError as error:
            raise CorruptFileError(f"cannot be read ({error.strerror})", where=str(path)) from error
        if not stat.S_ISREG(status.st_mode):
            raise CorruptFileError("cannot be read (it is not a plain file)", where=str(path))
        return cls(path, status.st_size, status.st_mtime_ns)

    def __reduce__(self) -> tuple[object, ...]:
        # Another process may have another working directory.
        return SourceFile, (self.path.absolute(), self.size, self.mtime_ns)

    @contextmanager
    def open(self) -> Iterator[int]:
        """A read-only file descriptor; raises `CorruptFileError` if the file has changed since."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CorruptFileError(
                f"cannot be opened ({error.strerror})", where=str(self.path)
            ) from error
        try:
            self.check(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def check(self, descriptor: int) -> None:
        """Raises `CorruptFileError` unless the open file is the one whose header was read."""
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CorruptFileError(
                "the file changed while it was read: "
                f"it had {self.size:,} bytes, now {status.st_size:,}",
                where=str(self.path),
                advice="Wait until nothing writes to it, then run again.",
            )


@dataclass(frozen=True, slots=True)
class ZipMember:
    """An entry of a zip: `length` bytes at `offset` of its file, whose CRC-32 is `crc32`.

    That is 0 where torch.save computes none (`torch.serialization.set_crc32_options`).
    """

    name: str
    offset: int
    length: int
    crc32: int


@dataclass(frozen=True, slots=True)
class FileRange:
    """`length` bytes of `file` from `offset` on.

    `member` is the zip entry that they lie in, if the file is a zip.
    """

    file: SourceFile
    offset: int
    length: int
    member: ZipMember | None = None

    @property
    def checkable(self) -> ZipMember | None:
        """The entry, if it carries a CRC-32."""
        return self.member if self.member is not None and self.member.crc32 else None


def cut(ranges: Sequence[FileRange], start: int, length: int) -> tuple[FileRange, ...]:
    """Bytes `[start, start + length)` of the concatenation of `ranges`, as ranges."""
    pieces = []
    for piece in ranges:
        if length <= 0:
            break
        if start >= piece.length:
            start -= piece.length
            continue
        take = min(piece.length - start, length)
        pieces.append(FileRange(piece.file, piece.offset + start, take, piece.member))
        start, length = 0, length - take
    return tuple(pieces)


def batches(ranges: Sequence[FileRange], size: int) -> Iterator[tuple[FileRange, ...]]:
    """The same bytes in batches of `size`, of which the last may be shorter."""
    batch: list[FileRange] = []
    room = size
    for piece in ranges:
        done = 0
        while done < piece.length:
            take = min(room, piece.length - done)
            batch.append(FileRange(piece.file, piece.offset + done, take, piece.member))
            done, room = done + take, room - take
            if not room:
                yield tuple(batch)
                batch, room = [], size
    if batch:
        yield tuple(batch)


def join(ranges: Sequence[FileRange]) -> tuple[FileRange, ...]:
    """The same bytes with neighbours in one file made one range and empty ranges left out."""
    joined: list[FileRange] = []
    for piece in ranges:
        if not piece.length:
            continue
        last = joined[-1] if joined else None
        if (
            last
            and last.file == piece.file
            and last.member == piece.member
            and last.offset + last.length == piece.offset
        ):
            length = last.length + piece.length
            joined[-1] = FileRange(last.file, last.offset, length, last.member)
        else:
            joined.append(piece)
    return tuple(joined)


def read_ranges(ranges: Sequence[FileRange]) -> bytearray:
    """The bytes of `ranges`, one after the other, in a new buffer of exactly that size."""
    buffer = bytearray(sum(piece.length for piece in ranges))
    read_ranges_into(ranges, memoryview(buffer))
    return buffer


def read_ranges_into(ranges: Sequence[FileRange], view: memoryview) -> None:
    """Fills `view` with the bytes of `ranges`, one after the other."""
    # A tensor may lie in as many files as there were GPUs: only one is open at a time.
    for file, pieces in groupby(ranges, key=lambda piece: piece.file):
        with file.open() as descriptor:
            for piece in pieces:
                read_into(descriptor, piece, view[: piece.length])
                view = view[piece.length :]
            file.check(descriptor)


def read_into(descriptor: int, piece: FileRange, view: memoryview) -> None:
    """Fills `view` with the bytes of `piece`, whose file is open as `descriptor`."""
    done = 0
    while done < piece.length:
        try:
            count = os.preadv(descriptor, [view[done:]], piece.offset + done)
        except OSError as error:
            raise CorruptFileError(
                f"reading failed at byte {piece.offset + done:,} ({error.strerror})",
                where=str(piece.file.path),
            ) from error
        if not count:
            raise CorruptFileError(
                f"ends at byte {piece.offset + done:,}, "
                f"expected data up to byte {piece.offset + piece.length:,}",
                where=str(piece.file.path),
                advice="The file is truncated; copy or download it again.",
            )
        done += count


def crc32_of(piece: FileRange) -> int:
    """The CRC-32 of the bytes of `piece` as they stand in the file now."""
    found = 0
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, piece.length)))
    with piece.file.open() as descriptor:
        for done in range(0, piece.length, _BLOCK_BYTES):
            view = buffer[: piece.length - done]
            read_into(descriptor, FileRange(piece.file, piece.offset + done, len(view)), view)
            found = crc32(view, found)
    return found


def require_member(
    file: SourceFile, member: ZipMember, tensors: Callable[[], str] = lambda: ""
) -> None:
    """Reads all of `member`; raises `CorruptFileError` if it does not match its CRC-32.

    The error ends with what `tensors` returns, which says what lies in it.
    """
    found = crc32_of(FileRange(file, member.offset, member.length))
    if found != member.crc32:
        raise CorruptFileError(
            f"entry '{member.name}' is damaged: its bytes have the CRC-32 {found:08x}, "
            f"the file says {member.crc32:08x}{tensors()}",
            where=str(file.path),
            advice="Copy or download the file again.",
        )
