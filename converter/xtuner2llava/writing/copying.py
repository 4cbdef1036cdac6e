"""Bytes that pass unchanged, from file to file inside the kernel where it can.

`copy_file_range` moves no data through this process; on network file systems that know it, none
over the wire. Where the kernel or the file systems cannot, the same bytes are read and written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from itertools import groupby

from xtuner2llava.tensors import FileRange
from xtuner2llava.tensors.files import read_into
from xtuner2llava.writing.disk import BLOCK_BYTES, write_all

# Small enough that progress, Ctrl-C and the checksum that follows stay close behind.
_CHUNK_BYTES = 4 << 20
# How kernels say that they cannot copy between these two files (copy_file_range(2)).
_CANNOT = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)


def copy_ranges(ranges: Sequence[FileRange], target: int, offset: int) -> Iterator[int]:
    """Copies `ranges` to `offset` of the open file `target`; yields the bytes of each step.

    Raises `CorruptFileError` if a source file is short or changes meanwhile, and `OSError` of the
    target.
    """
    in_kernel = hasattr(os, "copy_file_range")
    buffer = memoryview(bytearray(BLOCK_BYTES))
    # A tensor may lie in as many files as there were GPUs: only one is open at a time.
    for file, pieces in groupby(ranges, key=lambda piece: piece.file):
        with file.open() as source:
            for piece in pieces:
                done = 0
                while done < piece.length:
                    rest = FileRange(file, piece.offset + done, piece.length - done)
                    count = _in_kernel(source, rest, target, offset) if in_kernel else 0
                    if not count:
                        # What the kernel does not copy, it says nothing about: an end of the file
                        # or a file system that cannot. Reading tells.
                        in_kernel = in_kernel and count is not None
                        view = buffer[: min(len(buffer), rest.length)]
                        read_into(source, FileRange(file, rest.offset, len(view)), view)
                        write_all(target, view, offset)
                        count = len(view)
                    done, offset = done + count, offset + count
                    yield count
            file.check(source)


def _in_kernel(source: int, piece: FileRange, target: int, offset: int) -> int | None:
    """How many bytes the kernel copied, at most a chunk; None if it cannot for these files."""
    count = min(piece.length, _CHUNK_BYTES)
    try:
        return os.copy_file_range(source, target, count, piece.offset, offset)
    except OSError as error:
        if error.errno in _CANNOT:
            return None
        raise
