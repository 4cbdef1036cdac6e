"""One shard, written, checksummed, flushed and verified in one pass over its bytes.

The thread that calls reads or computes a block, looks for NaN and infinity in it, and writes it.
Followers work on the same block while the next one is read: one takes it into the checksum, from
the memory it is in, so that checksums cost no read; one reads it back from the file and compares
it with its source; one sends to the disk what is written so far.

Blocks go through this process, and not by `copy_file_range`: the checksum needs them in memory, and
reading them back for it costs more than the kernel's copy saves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from blake3 import blake3

from xtuner2llava.writing.blocks import BUFFERS, blocks, working_bytes
from xtuner2llava.writing.budget import Budget
from xtuner2llava.writing.disk import BLOCK_BYTES, disk_errors, read_all, write_all
from xtuner2llava.writing.follower import Follower
from xtuner2llava.writing.nonfinite import NonFinite, Tally
from xtuner2llava.writing.shards import Entry, Shard
from xtuner2llava.writing.verify import WrittenFile

# How many blocks may wait to get into the checksum, and as many to be verified. Each follower works
# on one more, and one is being read, so that a buffer is free again when it is its turn.
_AHEAD = (BUFFERS - 3) // 2
# How often what is written is sent to disk, so that little is left to wait for at the end.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Checksum:
    """`blake3` in hexadecimal digits, and the tensors that hold NaN or infinity, in file order."""

    blake3: str
    nonfinite: tuple[NonFinite, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    """`data` of `entry`, written at `offset` of the file."""

    entry: Entry
    offset: int
    data: memoryview


def write_shard(
    path: Path,
    descriptor: int,
    shard: Shard,
    budget: Budget,
    *,
    verify: bool = True,
    advance: Callable[[int], None] = lambda count: None,
) -> Checksum:
    """Writes `shard` to the empty file `descriptor`, which is that at `path`, and flushes it.

    Buffers are taken from `budget`. With `verify`, each block is read back from the file and
    compared: what was copied with its source, which is read again, what was computed with what is
    in memory. `advance` is told the bytes that are written and, with `verify`, again when they are
    verified; what it raises ends the work. Raises `OutputError`, `CorruptFileError`, `PlanError`
    for a value that overflows its dtype, and `VerificationError`.
    """
    digest = blake3()
    found: list[NonFinite] = []

    def flush(position: int) -> None:
        with disk_errors(path):
            os.fsync(descriptor)

    with ExitStack() as stack:
        flusher = stack.enter_context(Follower("flush", flush, 64))
        checker: Follower[_Block] | None = None
        if verify:
            file = WrittenFile(path, descriptor)
            check = _Check(file, advance)
            checker = stack.enter_context(Follower("verify", check, _AHEAD))

        def add(block: _Block) -> None:
            digest.update(block.data)
            if checker is not None:
                checker.put(block)

        hasher = stack.enter_context(Follower("checksum", add, _AHEAD))
        with disk_errors(path):
            write_all(descriptor, memoryview(shard.header), 0)
        digest.update(shard.header)
        advance(len(shard.header))
        flushed = 0
        buffers = cycle([memoryview(bytearray(BLOCK_BYTES)) for _ in range(BUFFERS)])
        for entry in shard.entries:
            with budget.take(working_bytes(entry.tensor), lambda: advance(0)):
                tally = Tally(entry.name, entry.tensor.dtype.code)
                for block in _entry_blocks(entry, buffers, tally):
                    with disk_errors(path):
                        write_all(descriptor, block.data, block.offset)
                    hasher.put(block)
                    advance(len(block.data))
                    end = block.offset + len(block.data)
                    if end - flushed >= _FLUSH_BYTES:
                        flushed = end
                        flusher.put(end)
                found.extend(tally.result())
        flusher.put(shard.size)
        hasher.finish()
        if checker is not None:
            checker.finish()
            check.finish()
            file.require_header(shard)
            advance(len(shard.header))
        flusher.finish()
    return Checksum(digest.hexdigest(), tuple(found))


def checksum(path: Path, shard: Shard, check: Callable[[], None]) -> Checksum:
    """The checksum of the finished file at `path`; `check` is called for each block.

    Raises `OutputError` where it cannot be read.
    """
    digest = blake3()
    found: list[NonFinite] = []
    buffer = memoryview(bytearray(BLOCK_BYTES))

    def read(start: int, length: int) -> Iterator[memoryview]:
        for offset in range(start, start + length, BLOCK_BYTES):
            check()
            view = buffer[: min(BLOCK_BYTES, start + length - offset)]
            read_all(descriptor, view, offset)
            digest.update(view)
            yield view

    with disk_errors(path, "cannot be read back"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for _ in read(0, len(shard.header)):
                pass
            for entry in shard.entries:
                tally = Tally(entry.name, entry.tensor.dtype.code)
                for view in read(entry.offset, entry.tensor.nbytes):
                    tally.add(view)
                found.extend(tally.result())
        finally:
            os.close(descriptor)
    return Checksum(digest.hexdigest(), tuple(found))


def _entry_blocks(entry: Entry, buffers: Iterator[memoryview], tally: Tally) -> Iterator[_Block]:
    offset = entry.offset
    for data in blocks(entry, buffers, tally):
        yield _Block(entry, offset, data)
        offset += len(data)


class _Check:
    """Compares blocks with the file, in order; `advance` is told the bytes that are right."""

    def __init__(self, file: WrittenFile, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance
        self._entry: Entry | None = None
        # The blocks of a copied entry, read once more; None for a computed one.
        self._source: Iterator[memoryview] | None = None

    def __call__(self, block: _Block) -> None:
        if block.entry is not self._entry:
            self.finish()
            copied = block.entry.tensor.ranges() is not None
            self._entry = block.entry
            self._source = blocks(block.entry) if copied else None
        expected = block.data if self._source is None else next(self._source)
        self._file.require_same(block.entry, block.offset, expected)
        self._advance(len(expected))

    def finish(self) -> None:
        """Ends with the entry; raises `CorruptFileError` if its source has changed meanwhile."""
        if self._source is not None:
            next(self._source, None)
            self._source = None
