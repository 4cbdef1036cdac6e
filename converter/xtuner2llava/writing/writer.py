"""Writing the shards of a plan: copy or compute, checksum, flush and verify, all at once.

A job per shard writes its tensors in file order. A second thread follows it through the page cache
and computes the checksum, a third flushes what is written to disk meanwhile, and the job goes on to
verify what it wrote while both still work.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.writing.blocks import blocks
from xtuner2llava.writing.checksum import Checksum, checksum
from xtuner2llava.writing.copying import copy_ranges
from xtuner2llava.writing.disk import disk_errors, write_all
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.nonfinite import NonFinite
from xtuner2llava.writing.shards import Entry, Shard
from xtuner2llava.writing.verify import verify_shard
from xtuner2llava.writing.work import OnProgress, Tail, Work

# How often what is written is sent to disk, so that little is left to wait for at the end.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard on disk; `size` counts bytes, `kept` says that `--resume` found it finished."""

    filename: str
    size: int
    sha256: str
    kept: bool = False


# Takes a finished shard away: (its file, what it is, how to count the bytes that are away).
Deliver = Callable[[Path, WrittenShard, Callable[[int], None]], None]


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_shards` did; `nonfinite` are the tensors that hold NaN or infinity."""

    shards: tuple[WrittenShard, ...]
    nonfinite: tuple[NonFinite, ...]


def write_shards(
    folder: OutputFolder,
    shards: Sequence[Shard],
    *,
    jobs: int | None = None,
    verify: bool = True,
    deliver: Deliver | None = None,
    on_progress: OnProgress | None = None,
) -> Written:
    """Writes and flushes `shards` into `folder`, `jobs` of them at once (default: four, or less).

    The bytes do not depend on `jobs`, and memory is about 32 MB a job. With `verify`, each shard is
    read back and compared with its sources. `on_progress(done, total)` counts bytes of output, half
    of a byte for writing it and half for verifying it. Raises `OutputError`, `CorruptFileError`,
    `PlanError` for a value that overflows its dtype, and `VerificationError`.

    With `deliver`, each shard is handed over when it is finished, by the thread that wrote it, and
    is removed when `deliver` returns: there are never more than `jobs` shards in `folder`. What is
    delivered counts as a third part of its bytes. What `deliver` raises stops all jobs.

    torch computes with as many threads for each job as it does elsewhere; `torch.set_num_threads`
    is the caller's to set, because it changes the whole process.
    """
    total = sum(shard.size for shard in shards)
    work = Work(jobs, total, on_progress, passes=1 + verify + (deliver is not None))
    missing = [shard.size for shard in shards if folder.finished(shard.filename) is None]
    at_once = len(missing) if deliver is None else work.jobs
    folder.require_space(sum(sorted(missing, reverse=True)[:at_once]))
    places = range(len(shards))
    if any(entry.tensor.ranges() is None for shard in shards for entry in shard.entries):
        import torch  # noqa: F401 - a second, which Ctrl-C can end here and not in a thread
    with (
        ThreadPoolExecutor(work.jobs, "checksum") as checksums,
        ThreadPoolExecutor(1, "flush") as flushes,
    ):
        job = _Job(folder, work, checksums, flushes, verify, deliver)
        results = work.run(lambda place: job.run(place, shards[place]), places)
    return Written(
        tuple(written for written, _ in results),
        tuple(found for _, checked in results for found in checked.nonfinite),
    )


@dataclass(frozen=True, slots=True)
class _Job:
    folder: OutputFolder
    work: Work
    checksums: ThreadPoolExecutor
    flushes: ThreadPoolExecutor
    verify: bool
    deliver: Deliver | None

    def run(self, place: int, shard: Shard) -> tuple[WrittenShard, Checksum]:
        checked = self._keep(shard)
        kept = checked is not None
        if checked is None:
            checked = self._write(place, shard)
        written = WrittenShard(shard.filename, shard.size, checked.sha256, kept)
        if self.deliver is not None:
            self.deliver(self.folder.path / shard.filename, written, self.work.advance)
            self.folder.discard(shard.filename)
        elif not kept:
            self.folder.mark_finished(shard.filename, shard.size, checked.sha256)
        return written, checked

    def _keep(self, shard: Shard) -> Checksum | None:
        """The checksum of a shard that an earlier run finished, if it is still the same."""
        known = self.folder.finished(shard.filename)
        if known is None:
            return None
        path = self.folder.path / shard.filename
        with disk_errors(path, "cannot be read back"):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                checked = checksum(descriptor, shard, lambda end: self.work.check())
            finally:
                os.close(descriptor)
        if checked.sha256 != known:
            return None
        self.work.advance(shard.size)
        if self.verify:
            verify_shard(path, shard, None, self.work.advance)
        return checked

    def _write(self, place: int, shard: Shard) -> Checksum:
        path = self.folder.path / shard.filename
        with self.folder.create(shard.filename) as descriptor:
            tail = Tail(self.work)
            flushing: list[Future[None]] = []

            def follow(item: Shard) -> Checksum:
                with disk_errors(path, "cannot be read back"):
                    return checksum(descriptor, item, tail.wait)

            checking = self.checksums.submit(self.work.guarded, place, follow, shard)
            try:
                digests = self._copy(descriptor, shard, tail, flushing)
                if self.verify:
                    verify_shard(path, shard, digests, self.work.advance)
                for flush in flushing:
                    flush.result()
                return checking.result()
            except BaseException:
                self.work.stop()
                raise
            finally:
                wait([checking])  # These use the descriptor, which is closed next.
                wait(flushing)

    def _copy(
        self, descriptor: int, shard: Shard, tail: Tail, flushing: list[Future[None]]
    ) -> dict[str, list[int]]:
        """Writes the shard; returns the CRC-32 of each block that was computed."""
        write_all(descriptor, memoryview(shard.header), 0)
        self.work.advance(len(shard.header))
        tail.wrote(len(shard.header))
        digests: dict[str, list[int]] = {}
        flushed = 0
        for entry in shard.entries:
            offset = entry.offset
            for count in _write_entry(descriptor, entry, digests):
                offset += count
                tail.wrote(offset)
                self.work.advance(count)
                if offset - flushed >= _FLUSH_BYTES:
                    flushed = offset
                    flushing.append(self.flushes.submit(os.fsync, descriptor))
        flushing.append(self.flushes.submit(os.fsync, descriptor))
        return digests


def _write_entry(descriptor: int, entry: Entry, digests: dict[str, list[int]]) -> Iterator[int]:
    """Writes one tensor; yields the bytes of each step, and notes digests of what it computes.

    Copied bytes need no digest: their source can be read again.
    """
    ranges = entry.tensor.ranges()
    if ranges is not None:
        yield from copy_ranges(ranges, descriptor, entry.offset)
        return
    digest = digests.setdefault(entry.name, [])
    offset = entry.offset
    for block in blocks(entry):
        digest.append(zlib.crc32(block))
        write_all(descriptor, block, offset)
        offset += len(block)
        yield len(block)
