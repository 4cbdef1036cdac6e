"""One shard: written, checksummed, flushed and verified while it is written.

The thread that calls copies ranges inside the kernel, or computes blocks. A stage behind it writes
what was computed, reads back what stands in the file, and takes that into everything that is known
of the shard: its BLAKE3, the values that are not finite, and the CRC-32 of the source entries. A
second stage flushes, so that little is left to wait for at the end, and records how far the file is
right, so that an interrupted run goes on from there.

What is proven. The BLAKE3 is that of the file as it was read back. What was copied equals its
source: the CRC-32 that the source carries is compared with that of the file (`source_sums`); where
it carries none, the source is read again and compared. What was computed equals what was in memory,
and what it was computed from matches the CRC-32 of the source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

from blake3 import blake3

from xtuner2llava.errors import CorruptFileError, OutputError, PlanError
from xtuner2llava.tensors import FileRange
from xtuner2llava.tensors.files import cut, read_into
from xtuner2llava.writing.blocks import AHEAD, blocks, stored_ranges, working_bytes
from xtuner2llava.writing.budget import Budget
from xtuner2llava.writing.disk import BLOCK_BYTES, disk_errors, write_all
from xtuner2llava.writing.nonfinite import NonFinite, Tally
from xtuner2llava.writing.shards import Entry, Shard
from xtuner2llava.writing.source_sums import RangeSum, SourceSums, add_bytes
from xtuner2llava.writing.stage import Stage
from xtuner2llava.writing.verify import WrittenFile
from xtuner2llava.writing.work import Stopped

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
    with (
        Stage("flush", _PENDING_FLUSHES) as flusher,
        Stage("check", AHEAD) as checker,
    ):
        writer = _Writer(path, descriptor, shard, verify, checker, flusher, record, advance)
        try:
            writer.begin(begun)
            for entry in shard.entries:
                if entry.offset + entry.tensor.nbytes > writer.begun_bytes:
                    with budget.take(working_bytes(entry.tensor), lambda: advance(0)):
                        writer.write(entry, sources)
            return writer.finish()
        except BaseException as error:
            with suppress(Exception):
                checker.finish()  # What is written may still be right, and worth keeping.
            checker.drop()
            flusher.drop()
            # With other values, or another source, it would be another conversion.
            if not isinstance(error, (PlanError, CorruptFileError)):
                with suppress(OutputError):
                    writer.flush(record_it=True)
            raise


class _Writer:
    """`write_shard`, a tensor at a time; the thread of `checker` calls `_check…`.

    What the two share goes there by `checker.put`, and back by `checker.finish`.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        shard: Shard,
        verify: bool,
        checker: Stage,
        flusher: Stage,
        record: Callable[[WrittenPart], None],
        advance: Callable[[int], None],
    ) -> None:
        self._path, self._descriptor, self._shard = path, descriptor, shard
        self._verify, self._checker, self._flusher = verify, checker, flusher
        self._record, self._advance = record, advance
        self._file = WrittenFile(path, descriptor)
        self._kernel_copies = hasattr(os, "copy_file_range")
        self._buffers = cycle([memoryview(bytearray(BLOCK_BYTES)) for _ in range(AHEAD + 1)])
        self._source = bytearray()
        self._digest = blake3()
        self._nonfinite: list[NonFinite] = []
        self._sums: list[RangeSum] = []
        self._part = WrittenPart(0, self._digest.hexdigest(), verify)
        self._recorded = self._unflushed = 0
        self.begun_bytes = 0

    def begin(self, begun: tuple[WrittenPart, blake3] | None) -> None:
        """Writes the header, or takes over what was written before."""
        if begun is not None:
            self._part, self._digest = begun
            self._nonfinite, self._sums = [*self._part.nonfinite], [*self._part.sums]
            self._recorded = self.begun_bytes = self._part.size
            for _ in range(1 + self._verify):
                self._advance(self.begun_bytes)
            return
        header = memoryview(self._shard.header)
        with disk_errors(self._path):
            write_all(self._descriptor, header, 0)
        self._digest.update(header)
        self._advance(len(header))
        if self._verify:
            self._advance(len(header))

    def write(self, entry: Entry, sources: SourceSums) -> None:
        """Writes the bytes of `entry`, and has them checked."""
        ranges = stored_ranges(entry.tensor)
        summed = ranges is not None and len(ranges) <= _MOST_SUMS
        if not summed:
            sources.require(entry.tensor)
        tally = Tally(entry.name, entry.tensor.dtype.code)
        sums: list[RangeSum] = []
        copied = entry.tensor.ranges()
        if copied is not None:
            self._copy(entry, copied, tally, sums if summed else None)
        else:
            try:
                self._compute(entry, tally, sums if summed else None)
            except PlanError:
                sources.require(entry.tensor)  # A damaged value may be why one overflows.
                raise
        self._checker.put(self._check_end, entry, tally, sums)

    def finish(self) -> WrittenPart:
        """Waits until everything is checked and flushed."""
        self._checker.finish()
        if self._verify:
            self._file.require_header(self._shard)
        self._flusher.finish()
        self.flush()
        return self._part

    def flush(self, *, record_it: bool = False) -> None:
        """Sends what is written to the disk; then records how much of it is known to be right."""
        part = self._part
        with disk_errors(self._path):
            os.fsync(self._descriptor)
        if record_it and part.size > self._recorded:
            self._record(part)
            self._recorded = part.size

    def _copy(
        self,
        entry: Entry,
        ranges: Sequence[FileRange],
        tally: Tally,
        sums: list[RangeSum] | None,
    ) -> None:
        offset = entry.offset
        for file, group in groupby(ranges, key=lambda piece: piece.file):
            pieces = list(group)
            with file.open() as source:
                for done in range(0, sum(piece.length for piece in pieces), _COPY_BYTES):
                    batch = cut(pieces, done, _COPY_BYTES)
                    start = offset
                    for piece in batch:
                        self._copy_range(source, piece, offset)
                        offset += piece.length
                    self._advance(offset - start)
                    self._checker.put(self._check_copy, entry, start, batch, tally, sums)
                file.check(source)

    def _compute(self, entry: Entry, tally: Tally, sums: list[RangeSum] | None) -> None:
        offset = entry.offset
        for data in blocks(entry, self._buffers, tally, sums):
            self._advance(0)  # It raises where the work is to end.
            self._checker.put(self._check_block, entry, offset, data)
            offset += len(data)

    def _copy_range(self, source: int, piece: FileRange, offset: int) -> None:
        done = 0
        while self._kernel_copies and done < piece.length:
            try:
                count = os.copy_file_range(
                    source,
                    self._descriptor,
                    piece.length - done,
                    piece.offset + done,
                    offset + done,
                )
            except OSError:
                count = 0
            # File systems and kernels refuse for many reasons. Whichever it is, reads and writes
            # do without, or fail with an error that says whose it is.
            self._kernel_copies = count > 0
            done += count
        while done < piece.length:
            view = next(self._buffers)[: piece.length - done]
            read_into(source, FileRange(piece.file, piece.offset + done, len(view)), view)
            with disk_errors(self._path):
                write_all(self._descriptor, view, offset + done)
            done += len(view)

    def _check_copy(
        self,
        entry: Entry,
        offset: int,
        batch: Sequence[FileRange],
        tally: Tally,
        sums: list[RangeSum] | None,
    ) -> None:
        """Takes in what was copied to `offset` from `batch`, which is of one file."""
        length = sum(piece.length for piece in batch)
        for done in range(0, length, BLOCK_BYTES):
            pieces = cut(batch, done, min(BLOCK_BYTES, length - done))
            found = self._file.read(offset + done, sum(piece.length for piece in pieces))
            view = memoryview(found)
            self._digest.update(view)
            tally.add(view)
            proven = sums is not None
            for piece in pieces:
                if sums is not None:
                    add_bytes(sums, piece, view[: piece.length])
                proven = proven and piece.checkable is not None
                view = view[piece.length :]
            if self._verify:
                if not proven:
                    self._file.require_same(entry, offset + done, self._read_again(pieces), found)
                self._count(len(found))
        self._flush_in_time(length)

    def _read_again(self, pieces: Sequence[FileRange]) -> bytearray:
        """The bytes of `pieces`, which are of one file, in a buffer that the next call uses too."""
        count = sum(piece.length for piece in pieces)
        if len(self._source) != count:
            self._source = bytearray(count)
        view = memoryview(self._source)
        with pieces[0].file.open() as descriptor:
            for piece in pieces:
                read_into(descriptor, piece, view[: piece.length])
                view = view[piece.length :]
        return self._source

    def _check_block(self, entry: Entry, offset: int, data: memoryview) -> None:
        with disk_errors(self._path):
            write_all(self._descriptor, data, offset)
        self._count(len(data))
        self._digest.update(data)
        if self._verify:
            self._file.require_same(entry, offset, data)
            self._count(len(data))
        self._flush_in_time(len(data))

    def _check_end(self, entry: Entry, tally: Tally, sums: Sequence[RangeSum]) -> None:
        self._nonfinite.extend(tally.result())
        self._sums.extend(sums)
        self._part = WrittenPart(
            entry.offset + entry.tensor.nbytes,
            self._digest.hexdigest(),
            self._verify,
            tuple(self._nonfinite),
            tuple(self._sums),
        )

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
