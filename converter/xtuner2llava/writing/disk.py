"""Whole buffers read and written; what the disk refuses becomes an error that says what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xtuner2llava.errors import OutputError

# Large enough that what Python does for a block costs little, and small enough that the blocks of
# all threads stay in the caches.
BLOCK_BYTES = 4 << 20

_ADVICE = {
    errno.ENOSPC: "Free space on that disk, or choose an OUT on another one.",
    errno.EDQUOT: "Your quota on that disk is used up; free space, or choose another OUT.",
    errno.EFBIG: "Files of that size are not allowed here (`ulimit -f`, or the file system): "
    "try a smaller --max-shard-size.",
    errno.EIO: "The disk reports a hardware or network fault; choose an OUT on another one.",
    errno.EROFS: "The file system is mounted read-only; choose an OUT on another one.",
    errno.EACCES: "You may not write there; choose another OUT or change its permissions.",
    errno.EPERM: "You may not write there; choose another OUT or change its permissions.",
}


@contextmanager
def disk_errors(path: Path, doing: str = "cannot be written") -> Iterator[None]:
    """Turns an `OSError` of the block into an `OutputError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{doing} ({error.strerror or error})",
            where=str(path),
            advice=_ADVICE.get(error.errno or 0, ""),
        ) from error


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`; raises `OSError`."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def read_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Fills `view` from `offset` on; raises `OSError` (EIO) where the file ends before that."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise OSError(errno.EIO, f"the file ends at byte {offset:,}")
        view, offset = view[count:], offset + count


def flush_directory(path: Path) -> None:
    """Makes the names in the directory `path` survive a power cut; raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some network file systems flush no directories.
            raise
    finally:
        os.close(descriptor)
