"""Verification: what is on disk, compared with the plan and with the source, byte for byte."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from xtuner2llava.errors import VerificationError
from xtuner2llava.writing.blocks import blocks, computed_blocks, position
from xtuner2llava.writing.disk import BLOCK_BYTES, disk_errors, read_all
from xtuner2llava.writing.shards import Entry, Shard
from xtuner2llava.writing.work import OnProgress, Work

# Per computed tensor, the CRC-32 of each of its blocks, taken from memory before it was written.
Digests = Mapping[str, Sequence[int]]
_ADVICE = "The disk or memory of this machine may be faulty: convert again, best to another disk."


def verify_shards(
    folder: Path,
    shards: Sequence[Shard],
    *,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Compares the files in `folder` with `shards`, reading and computing all sources again.

    Raises `VerificationError` for the first difference of the first shard that has one.
    """
    work = Work(jobs, sum(shard.size for shard in shards), on_progress)
    work.run(
        lambda shard: verify_shard(folder / shard.filename, shard, advance=work.advance), shards
    )


def verify_shard(
    path: Path,
    shard: Shard,
    digests: Digests | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Compares the file at `path` with `shard`: size, header, then tensor by tensor.

    Stored tensors are read from their sources again. Computed ones are compared by `digests`
    where those are given, and else computed again. `advance` is told the bytes that were found
    right. Raises `VerificationError` and, for the sources, `CorruptFileError`.
    """
    with disk_errors(path, "cannot be read back"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with disk_errors(path, "cannot be read back"):
            size = os.fstat(descriptor).st_size
            if size != shard.size:
                raise VerificationError(
                    f"has {size:,} bytes, expected {shard.size:,}", where=str(path), advice=_ADVICE
                )
            header = memoryview(bytearray(len(shard.header)))
            read_all(descriptor, header, 0)
        if header != shard.header:
            raise VerificationError(
                "its header is not the one planned", where=str(path), advice=_ADVICE
            )
        advance(len(header))
        for entry in shard.entries:
            known = digests.get(entry.name) if digests is not None else None
            if known is None:
                _compare(path, descriptor, entry, advance)
            else:
                _compare_digests(path, descriptor, entry, known, advance)
    finally:
        os.close(descriptor)


def _compare(path: Path, descriptor: int, entry: Entry, advance: Callable[[int], None]) -> None:
    offset = entry.offset
    found = bytearray()
    for expected in blocks(entry):
        # Equal lengths of bytearray and buffer are compared by memcmp; slices would be copied.
        if len(found) != len(expected):
            found = bytearray(len(expected))
        with disk_errors(path, "cannot be read back"):
            read_all(descriptor, memoryview(found), offset)
        if found != expected:
            raise _difference(path, entry, offset, found, expected)
        offset += len(expected)
        advance(len(expected))


def _compare_digests(
    path: Path,
    descriptor: int,
    entry: Entry,
    digests: Sequence[int],
    advance: Callable[[int], None],
) -> None:
    offset = entry.offset
    buffer = memoryview(bytearray(min(BLOCK_BYTES, entry.tensor.nbytes)))
    cuts = list(computed_blocks(entry.tensor))
    for (source, start, stop), digest in zip(cuts, digests, strict=True):
        end = offset + (stop - start) * source.row_bytes
        crc = 0
        while offset < end:
            view = buffer[: min(len(buffer), end - offset)]
            with disk_errors(path, "cannot be read back"):
                read_all(descriptor, view, offset)
            crc = zlib.crc32(view, crc)
            offset += len(view)
            advance(len(view))
        if crc != digest:
            # Computing it once more tells which element it is.
            _compare(path, descriptor, entry, lambda count: None)
            raise VerificationError(
                f"bytes up to {end:,} are not what was computed the first time",
                where=f"{path}: {entry.name}",
                advice=_ADVICE,
            )


def _difference(
    path: Path, entry: Entry, offset: int, found: bytearray, expected: memoryview
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
