"""One shard: written, checksummed, flushed and verified while it is written.

A pipeline of three threads. The calling one copies ranges inside the kernel, or computes blocks.
The next rounds and writes what was computed, reads back what stands in the file, and derives from
that all that is known of the shard: its BLAKE3, the values that are not finite, and the CRC-32 of
the source entries. The last flushes, so that little is left to wait for at the end, and records how
far the file is right, so that an interrupted run goes on from there.

What is proven. The BLAKE3 is that of the file as it was read back. What was copied equals its
source: the CRC-32 that the source carries is compared with that of the file (`source_sums`); where
it carries none, the source is read again and compared. What was computed equals what was in memory,
and what it was computed from matches the CRC-32 of the source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from xtuner2llava.errors import CorruptFileError, OutputError, PlanError
from xtuner2llava.tensors import FileRange
from xtuner2llava.tensors.files import cut, read_into, read_ranges
from xtuner2llava.writing.blocks import (
    AHEAD,
    exact_blocks,
    rounded,
    stored_ranges,
    working_bytes,
)
from xtuner2llava.writing.disk import BLOCK_BYTES, disk_errors
from xtuner2llava.writing.jobs import Budget, Stage, Stopped
from xtuner2llava.writing.nonfinite import NonFinite, NonFiniteCounter
from xtuner2llava.writing.shards import Entry, Shard
from xtuner2llava.writing.source_sums import RangeSum, SourceSums, add_sums
from xtuner2llava.writing.verify import WrittenFile

if TYPE_CHECKING:
    import torch

# Copied at a time: enough that a call costs nothing, little enough that the caches still have most
# of it when it is read back.
_COPY_BYTES = 8 << 20
# How often what is written is sent to disk, and how many such requests may wait for it.
_FLUSH_BYTES = 256 << 20
_PENDING_FLUSHES = 4
# Tensors of more ranges than that are compared with their source, which costs less than so many
# sums: rows that a mapping interleaves one by one.
_MOST_SUMS = 1024


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """What is known of the first `size` bytes of a shard's file, which end with a whole tensor.

    `blake3` is theirs, in hexadecimal digits; `nonfinite` are the tensors among them with NaN or
    infinity, in file order; `sums` are those of what was read for them. `verified` says that they
    were read back and compared.
    """

    size: int
    blake3: str
    verified: bool
    nonfinite: tuple[NonFinite, ...] = ()
    sums: tuple[RangeSum, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {
            "size": self.size,
            "blake3": self.blake3,
            "verified": self.verified,
            "nonfinite": [[n.name, n.nan, n.infinite] for n in self.nonfinite],
            "sums": [list(found) for found in self.sums],
        }

    @classmethod
    def from_json(cls, values: object) -> WrittenPart | None:
        """None for what `to_json` did not make."""
        try:
            assert isinstance(values, dict)  # noqa: S101
            part = cls(
                int(values["size"]),
                str(values["blake3"]),
                values["verified"] is True,
                tuple(NonFinite(str(n), int(nan), int(inf)) for n, nan, inf in values["nonfinite"]),
                tuple(
                    RangeSum(str(path), int(m), int(o), int(n), int(crc))
                    for path, m, o, n, crc in values["sums"]
                ),
            )
        except (AssertionError, KeyError, TypeError, ValueError):
            return None
        return part


def hash_start(path: Path, size: int, check: Callable[[], None]) -> blake3:
    """The BLAKE3 of the first `size` bytes of the file at `path`, or of all where it is shorter.

    `check` is called for each block. Raises `OutputError` where it cannot be read.
    """
    digest = blake3()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with disk_errors(path, "cannot be read back"), path.open("rb", buffering=0) as file:
        while size and (count := file.readinto(buffer[:size]) or 0):
            check()
            digest.update(buffer[:count])
            size -= count
    return digest


def write_shard(
    path: Path,
    descriptor: int,
    shard: Shard,
    budget: Budget,
    sources: SourceSums,
    *,
    begun: tuple[WrittenPart, blake3] | None = None,
    verify: bool = True,
    record: Callable[[WrittenPart], None] = lambda part: None,
    advance: Callable[[int], None] = lambda count: None,
) -> WrittenPart:
    """Writes `shard` to the file `descriptor`, which is that at `path`, and flushes it.

    The file is empty, or has what `begun` says, whose hasher has taken it in. Buffers are taken
    from `budget`. With `verify`, what is written is compared as the module says. `record` is
    called, from another thread, with what is flushed so far; also when the work ends early.
    `advance` is called with the bytes that are written and, with `verify`, again when they are
    verified; what it raises ends the work. Raises `OutputError`, `CorruptFileError`, `PlanError`
    for a value that overflows its dtype, and `VerificationError`.
    """
    with Stage("flush", _PENDING_FLUSHES) as flusher, Stage("check", AHEAD) as checker:
        file = WrittenFile(path, descriptor)
        checks = _Checks(file, shard, sources, verify, flusher, record, advance, begun)
        copier = _Copier(file)
        try:
            for entry in shard.entries:
                if entry.offset + entry.tensor.nbytes > checks.begun_bytes:
                    with budget.take(working_bytes(entry.tensor), lambda: advance(0)):
                        _write_entry(entry, copier, checker, checks, sources, advance)
            checker.finish()
            if verify:
                file.require_header(shard)
            flusher.finish()
            checks.flush()
        except BaseException as error:
            with suppress(Exception):
                checker.finish()  # What is written may still be right, and worth keeping.
            checker.drop()
            flusher.drop()
            # With other values, or another source, it would be another conversion.
            if not isinstance(error, (PlanError, CorruptFileError)):
                with suppress(OutputError):
                    checks.flush(record_it=True)
            raise
        return checks.part


def _write_entry(
    entry: Entry,
    copier: _Copier,
    checker: Stage,
    checks: _Checks,
    sources: SourceSums,
    advance: Callable[[int], None],
) -> None:
    """Copies or computes `entry`, and hands it to `checker`."""
    stored = stored_ranges(entry.tensor)
    sums: list[RangeSum] | None = []
    if stored is None or len(stored) > _MOST_SUMS:
        sources.require(entry.tensor)
        sums = None
    counter = NonFiniteCounter(entry.name, entry.tensor.dtype.code)
    ranges = entry.tensor.ranges()
    if ranges is None:
        for first, exact in exact_blocks(entry.tensor, sums):
            advance(0)  # It raises where the work is to end.
            checker.put(checks.computed, entry, first, exact, counter)
    else:
        offset = entry.offset
        for batch in copier.copy(ranges, offset):
            length = sum(piece.length for piece in batch)
            advance(length)
            checker.put(checks.copied, entry, offset, batch, counter, sums)
            offset += length
    checker.put(checks.end, entry, counter, sums)


class _Copier:
    """Copies ranges into the file, in the kernel where that can."""

    def __init__(self, file: WrittenFile) -> None:
        self._file = file
        self._in_kernel = hasattr(os, "copy_file_range")

    def copy(self, ranges: Sequence[FileRange], offset: int) -> Iterator[Sequence[FileRange]]:
        """Copies `ranges` to `offset` on; gives those copied since, which are of one file."""
        for file, group in groupby(ranges, key=lambda piece: piece.file):
            pieces = list(group)
            with file.open() as source:
                for done in range(0, sum(piece.length for piece in pieces), _COPY_BYTES):
                    batch = cut(pieces, done, _COPY_BYTES)
                    for piece in batch:
                        self._copy_range(source, piece, offset)
                        offset += piece.length
                    yield batch
                file.check(source)

    def _copy_range(self, source: int, piece: FileRange, offset: int) -> None:
        done = 0
        while self._in_kernel and done < piece.length:
            start, target = piece.offset + done, self._file.descriptor
            try:
                count = os.copy_file_range(
                    source, target, piece.length - done, start, offset + done
                )
            except OSError:
                count = 0
            # File systems and kernels refuse for many reasons. Whichever it is, reads and writes
            # do without, or fail with an error that says whose it is.
            self._in_kernel = count > 0
            done += count
        if done == piece.length:
            return
        buffer = memoryview(bytearray(min(BLOCK_BYTES, piece.length - done)))
        while done < piece.length:
            view = buffer[: piece.length - done]
            read_into(source, FileRange(piece.file, piece.offset + done, len(view)), view)
            self._file.write(view, offset + done)
            done += len(view)


class _Checks:
    """What is known of a shard's file; one thread calls this for what was copied and computed."""

    def __init__(
        self,
        file: WrittenFile,
        shard: Shard,
        sources: SourceSums,
        verify: bool,
        flusher: Stage,
        record: Callable[[WrittenPart], None],
        advance: Callable[[int], None],
        begun: tuple[WrittenPart, blake3] | None,
    ) -> None:
        self._file, self._sources, self._verify = file, sources, verify
        self._flusher, self._record, self._advance = flusher, record, advance
        if begun is None:
            header = memoryview(shard.header)
            file.write(header, 0)
            begun = WrittenPart(0, "", verify), blake3(header)
        self.part, self._digest = begun
        self.begun_bytes = self._recorded = self.part.size
        self._unflushed = 0
        for _ in range(1 + verify):
            advance(self.begun_bytes or len(shard.header))

    def copied(
        self,
        entry: Entry,
        offset: int,
        batch: Sequence[FileRange],
        counter: NonFiniteCounter,
        sums: list[RangeSum] | None,
    ) -> None:
        """Takes in what was copied to `offset` from `batch`, which is of one file."""
        length = sum(piece.length for piece in batch)
        for done in range(0, length, BLOCK_BYTES):
            pieces = cut(batch, done, BLOCK_BYTES)
            found = self._file.read(offset + done, sum(piece.length for piece in pieces))
            self._digest.update(found)
            counter.add(memoryview(found))
            if self._verify:
                # A sum that the source carries is compared when its entry is complete.
                if sums is None or any(piece.checkable is None for piece in pieces):
                    self._file.require_same(entry, offset + done, read_ranges(pieces), found)
                self._count(len(found))
            if sums is not None:
                add_sums(sums, pieces, memoryview(found))
        self._flush_in_time(length)

    def computed(
        self, entry: Entry, first: int, exact: torch.Tensor, counter: NonFiniteCounter
    ) -> None:
        """Rounds and writes the elements from number `first` on, and takes them in."""
        offset = entry.offset + first * entry.tensor.dtype.itemsize
        try:
            for data in rounded(entry, first, exact, counter):
                self._file.write(data, offset)
                self._count(len(data))
                self._digest.update(data)
                if self._verify:
                    self._file.require_same(entry, offset, data)
                    self._count(len(data))
                offset += len(data)
                self._flush_in_time(len(data))
        except PlanError:
            self._sources.require(entry.tensor)  # A damaged value may be why one overflows.
            raise

    def end(self, entry: Entry, counter: NonFiniteCounter, sums: list[RangeSum] | None) -> None:
        """Takes in that `entry` is complete."""
        self.part = WrittenPart(
            entry.offset + entry.tensor.nbytes,
            self._digest.hexdigest(),
            self._verify,
            (*self.part.nonfinite, *counter.result()),
            (*self.part.sums, *(sums or ())),
        )

    def flush(self, *, record_it: bool = False) -> None:
        """Sends what is written to the disk; then records how much of it is known to be right."""
        part = self.part
        self._file.flush()
        if record_it and part.size > self._recorded:
            self._record(part)
            self._recorded = part.size

    def _count(self, count: int) -> None:
        """Counts what is checked. Where the work is to end, the thread that copies ends it: what
        it copied before is still looked at, and kept."""
        with suppress(Stopped):
            self._advance(count)

    def _flush_in_time(self, count: int) -> None:
        self._unflushed += count
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            self._flusher.put(lambda: self.flush(record_it=True))
