"""Writing the shards of a plan, several at once, into a folder that can be resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from xtuner2llava.errors import VerificationError
from xtuner2llava.writing.blocks import working_bytes
from xtuner2llava.writing.executor import ExecutorWriter
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.jobs import DEFAULT_MEMORY, Budget, OnProgress, Work, default_jobs
from xtuner2llava.writing.nonfinite import NonFinite
from xtuner2llava.writing.shard_file import WrittenPart, hash_start, write_shard
from xtuner2llava.writing.shards import Shard
from xtuner2llava.writing.source_sums import SourceSums
from xtuner2llava.writing.verify import verify_shard

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard on disk; of its `size` bytes, `kept_bytes` are of an interrupted run."""

    filename: str
    size: int
    blake3: str
    kept_bytes: int = 0

    @property
    def kept(self) -> bool:
        """Whether an interrupted run had finished it."""
        return self.kept_bytes == self.size


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
    max_memory: int = DEFAULT_MEMORY,
    verify: bool = True,
    executor: Executor | None = None,
    deliver: Deliver | None = None,
    on_progress: OnProgress | None = None,
) -> Written:
    """Writes and flushes `shards` into `folder`, `jobs` of them at once (default: four, or less).

    The bytes do not depend on `jobs`. All jobs together use `max_memory` bytes for their buffers
    and wait for each other if need be; a tensor that needs more by itself is a `UsageError`. With
    `verify`, each shard is read back and compared with its sources. `on_progress(done, total)`
    counts bytes of output, half of a byte for writing it and half for verifying it. Raises
    `OutputError`, `CorruptFileError`, `PlanError` for a value that overflows its dtype, and
    `VerificationError`.

    With `deliver`, each shard is handed over when it is finished, by the thread that wrote it, and
    is removed when `deliver` returns: there are never more than `jobs` shards in `folder`. What is
    delivered counts as a third part of its bytes. What `deliver` raises stops all jobs.

    With `executor`, its workers write the shards, as many at once as it likes, each with
    `max_memory` of its own. They must see the paths of the sources and of `folder`.

    torch computes with as many threads for each job as it does elsewhere; `torch.set_num_threads`
    is the caller's to set, because it changes the whole process. `computing_jobs` says how many
    jobs there will be.
    """
    total = sum(shard.size for shard in shards)
    if executor is not None:
        jobs = max(1, len(shards))  # Each only waits.
    work = Work(jobs, total, on_progress, passes=1 + verify + (deliver is not None))
    missing = [shard.size for shard in shards if folder.state.finished(shard.filename) is None]
    at_once = len(missing) if deliver is None else work.jobs
    folder.require_space(sum(sorted(missing, reverse=True)[:at_once]))
    budget = Budget(max_memory)
    budget.require({e.name: working_bytes(e.tensor) for s in shards for e in s.entries})
    with ExitStack() as stack:
        workers: ExecutorWriter | None = None
        if executor is not None:
            workers = stack.enter_context(ExecutorWriter(executor, folder, verify, max_memory))
        elif computing_jobs(shards, jobs):
            import torch  # noqa: F401 - a second, which Ctrl-C can end here and not in a thread
        job = _Job(folder, work, budget, SourceSums(shards), verify, workers, deliver)
        results = work.run(job.run, shards)
        job.sources.finish(job.compare)
    return Written(
        tuple(written for written, _ in results),
        tuple(found for _, checked in results for found in checked.nonfinite),
    )


def computing_jobs(shards: Sequence[Shard], jobs: int | None = None) -> int:
    """How many of the jobs of `write_shards` need torch at once; 0 if all tensors are copied."""
    computed = sum(any(e.tensor.ranges() is None for e in shard.entries) for shard in shards)
    return min(jobs or default_jobs(), computed)


@dataclass(frozen=True, slots=True)
class _Job:
    folder: OutputFolder
    work: Work
    budget: Budget
    sources: SourceSums
    verify: bool
    workers: ExecutorWriter | None
    deliver: Deliver | None

    def run(self, shard: Shard) -> tuple[WrittenShard, WrittenPart]:
        start = time.perf_counter()
        part, kept = self._keep(shard) or self._write(shard)
        self.sources.add(part.sums, self.compare)
        written = WrittenShard(shard.filename, shard.size, part.blake3, kept)
        if self.deliver is not None:
            self.deliver(self.folder.path / shard.filename, written, self.work.advance)
            self.folder.discard(shard.filename)
        else:
            self.folder.state.set_finished(shard.filename, part.to_json())
        seconds = time.perf_counter() - start
        _log.debug(
            "%s: %d bytes, %d of them kept, %.3f s", shard.filename, shard.size, kept, seconds
        )
        return written, part

    def compare(self, shard: Shard) -> None:
        """Raises what is wrong with a shard whose source is right, and has it written again."""
        path = self.folder.path / shard.filename
        if not path.exists():
            return
        try:
            verify_shard(path, shard)
        except VerificationError:
            self.folder.discard(shard.filename)
            raise

    def _keep(self, shard: Shard) -> tuple[WrittenPart, int] | None:
        """What an earlier run finished, if the file is still the same."""
        part = WrittenPart.from_json(self.folder.state.finished(shard.filename))
        if part is None or part.size != shard.size or part.verified < self.verify:
            return None
        path = self.folder.path / shard.filename
        if hash_start(path, part.size, self.work.check).hexdigest() != part.blake3:
            return None
        for _ in range(1 + self.verify):
            self.work.advance(shard.size)
        return part, part.size

    def _begun(self, shard: Shard) -> tuple[WrittenPart, blake3] | None:
        """What an earlier run wrote of it, if that is still there, and the hasher behind that."""
        part = WrittenPart.from_json(self.folder.state.progress(shard.filename))
        ends = {entry.offset + entry.tensor.nbytes for entry in shard.entries}
        if part is None or part.size not in ends or part.verified < self.verify:
            return None
        digest = hash_start(self.folder.path / shard.filename, part.size, self.work.check)
        return (part, digest) if digest.hexdigest() == part.blake3 else None

    def _write(self, shard: Shard) -> tuple[WrittenPart, int]:
        if self.workers is not None:
            return self.workers.write(shard, self.work), 0
        name = shard.filename
        begun = self._begun(shard)
        kept = 0 if begun is None else begun[0].size
        with self.folder.create(name, kept) as descriptor:
            part = write_shard(
                self.folder.path / name,
                descriptor,
                shard,
                self.budget,
                self.sources,
                begun=begun,
                verify=self.verify,
                record=lambda part: self.folder.state.set_progress(name, part.to_json()),
                advance=self.work.advance,
            )
        return part, kept
