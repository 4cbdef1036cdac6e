"""One shard: written, checksummed, flushed and verified block by block, by any number of threads.

A thread copies a block inside the kernel, or computes, rounds and writes it, and reads back what
stands in the file. Then it waits for its turn: BLAKE3 takes the blocks in order. Another thread
flushes, so that little is left to wait for at the end, and records how far the file is right, so
that an interrupted run goes on from there.

What is proven. The BLAKE3 is that of the file as it was read back. What was copied equals its
source: the CRC-32 that the source carries is compared with that of the file (`source_sums`); where
it carries none, the source is read again and compared. What was computed equals what was in memory,
and what it was computed from matches the CRC-32 of the source.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from blake3 import blake3

from xtuner2llava.errors import CorruptFileError, OutputError, PlanError
from xtuner2llava.tensors import thread_cache
from xtuner2llava.tensors.files import FileRange, read_into, read_ranges_into
from xtuner2llava.tensors.stored import bytes_of
from xtuner2llava.writing.blocks import Block, cut_blocks, read_exact, rounded
from xtuner2llava.writing.disk import BLOCK_BYTES, disk_errors
from xtuner2llava.writing.jobs import Turns
from xtuner2llava.writing.nonfinite import NonFinite, count_nonfinite
from xtuner2llava.writing.shards import Shard
from xtuner2llava.writing.source_sums import RangeSum, SourceSums, append_sum, sums_of
from xtuner2llava.writing.verify import WrittenFile

# How often what is written is sent to disk.
_FLUSH_BYTES = 256 << 20


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

    def to_json(self, *, finished: bool = False) -> dict[str, object]:
        return {
            "finished": finished,
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


class ShardFile:
    """The file `descriptor`, at `path`, that becomes `shard`.

    It is empty, or has what `begun` says, whose hasher has taken it in. With `verify`, what is
    written is compared as the module says. `record` is called, from another thread, with what is
    flushed so far; also by `close`. `advance` is called with the bytes that are written and, with
    `verify`, again when they are verified.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        shard: Shard,
        sources: SourceSums,
        *,
        begun: tuple[WrittenPart, blake3] | None = None,
        verify: bool = True,
        record: Callable[[WrittenPart], None] = lambda part: None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.shard, self.descriptor = shard, descriptor
        self._file, self._sources, self._verify = WrittenFile(path, descriptor), sources, verify
        self._record, self._advance = record, advance
        if begun is None:
            header = memoryview(shard.header)
            self._file.write(header, 0)
            begun = WrittenPart(0, "", verify), blake3(header)
        self.part, self._digest = begun
        self._recorded = self.begun_bytes = self.part.size
        self._hashing, self._completing = Turns(), Turns()
        self._nonfinite, self._sums = [*self.part.nonfinite], [*self.part.sums]
        self._nan = self._infinite = self._unflushed = 0
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._copies_in_kernel = hasattr(os, "copy_file_range")
        # Kernels let one thread write to a file at a time, and have the others spin meanwhile.
        self._writing = threading.Lock()
        self._count(self.begun_bytes or len(shard.header))

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """What is to be written, in order, numbered."""
        entries = (e for e in self.shard.entries if e.offset + e.tensor.nbytes > self.begun_bytes)
        return enumerate(block for entry in entries for block in cut_blocks(entry))

    def write(self, number: int, block: Block) -> None:
        """Writes and checks a block. Other threads may write others, if all before have begun.

        Raises `OutputError`, `CorruptFileError`, `PlanError` for a value that overflows its dtype,
        `VerificationError`, and `Stopped` where a block before this one failed.
        """
        try:
            thread_cache.use_for(block.entry)
            if not block.summed and not block.start:
                self._sources.require(block.entry.tensor)
            read, data, found = self._copy(block) if block.is_copied else self._compute(block)
            with self._hashing.take(number):
                self._digest.update(data)
                digest = self._digest.hexdigest() if block.is_last else ""
            sums = sums_of(block.pieces or (), read) if block.summed else []
            with self._completing.take(number):
                self._complete(block, digest, found, sums)
        except BaseException:
            self._hashing.give_up(number)
            self._completing.give_up(number)
            raise
        self._count(block.length)

    def finish(self) -> WrittenPart:
        """Returns when everything that was written is flushed, and the header is compared."""
        if self._verify:
            self._file.require_header(self.shard)
        self._flusher.shutdown()
        if self._flushing is not None:
            self._flushing.result()
        self._file.flush()
        return self.part

    def give_up(self, error: BaseException) -> None:
        """Records what is right, after `error`, when no thread writes any more."""
        self._flusher.shutdown()
        # With other values, or another source, it would be another conversion.
        if not isinstance(error, (PlanError, CorruptFileError)):
            with suppress(OutputError):
                self._flush()

    def _copy(self, block: Block) -> tuple[memoryview, memoryview, tuple[int, int]]:
        """Copies and reads back."""
        pieces = block.pieces or ()
        offset = block.offset
        for file, group in groupby(pieces, key=lambda piece: piece.file):
            with file.open() as source, self._writing:
                for piece in group:
                    self._copy_range(source, piece, offset)
                    offset += piece.length
                file.check(source)
        found = self._file.read(block.offset, block.length)
        # A sum that the source carries is compared when its entry is complete.
        if self._verify and (not block.summed or any(p.checkable is None for p in pieces)):
            expected = thread_cache.buffer("source", block.length)
            read_ranges_into(pieces, expected)
            self._file.require_same(block.entry, block.offset, expected, found)
        return found, found, count_nonfinite(found, block.stored.code)

    def _copy_range(self, source: int, piece: FileRange, offset: int) -> None:
        done = 0
        while self._copies_in_kernel and done < piece.length:
            start, target = piece.offset + done, self.descriptor
            try:
                count = os.copy_file_range(
                    source, target, piece.length - done, start, offset + done
                )
            except OSError:
                count = 0
            # File systems and kernels refuse for many reasons. Whichever it is, reads and writes
            # do without, or fail with an error that says whose it is.
            self._copies_in_kernel = count > 0
            done += count
        if done < piece.length:
            rest = FileRange(piece.file, piece.offset + done, piece.length - done)
            view = thread_cache.buffer("source", rest.length)
            read_into(source, rest, view)
            self._file.write(view, offset + done)

    def _compute(self, block: Block) -> tuple[memoryview, memoryview, tuple[int, int]]:
        """Computes, rounds, writes, and compares what stands in the file then."""
        exact = read_exact(block)
        try:
            data, found = rounded(block, exact)
        except PlanError:
            self._sources.require(block.entry.tensor)  # A damaged value may be why one overflows.
            raise
        with self._writing:
            self._file.write(data, block.offset)
        if self._verify:
            for start in range(0, len(data), BLOCK_BYTES):
                part = data[start : start + BLOCK_BYTES]
                self._file.require_same(block.entry, block.offset + start, part)
        return bytes_of(exact), data, found

    def _complete(
        self, block: Block, digest: str, found: tuple[int, int], sums: list[RangeSum]
    ) -> None:
        """Takes in what is known of a block and of all before it."""
        entry = block.entry
        for one in sums:
            append_sum(self._sums, one)
        self._nan, self._infinite = self._nan + found[0], self._infinite + found[1]
        if block.is_last:
            if self._nan or self._infinite:
                self._nonfinite.append(NonFinite(entry.name, self._nan, self._infinite))
            self._nan = self._infinite = 0
            end = entry.offset + entry.tensor.nbytes
            known = tuple(self._nonfinite), tuple(self._sums)
            self.part = WrittenPart(end, digest, self._verify, *known)
        self._unflushed += block.length
        if self._unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._unflushed = 0
            self._flushing = self._flusher.submit(self._flush)

    def _flush(self) -> None:
        """Sends what is written to the disk; then records how much of it is known to be right."""
        part = self.part
        self._file.flush()
        if part.size > self._recorded:
            self._record(part)
            self._recorded = part.size

    def _count(self, count: int) -> None:
        for _ in range(1 + self._verify):
            self._advance(count)
