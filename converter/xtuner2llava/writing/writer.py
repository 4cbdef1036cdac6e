"""Writing the shards of a plan, by several threads, into a folder that can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType

from blake3 import blake3

from xtuner2llava.errors import Fault, UsageError, VerificationError, raise_faults
from xtuner2llava.tensors import thread_cache
from xtuner2llava.writing.blocks import Block, working_memory
from xtuner2llava.writing.executor import ExecutorWriter
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.jobs import (
    DEFAULT_MEMORY,
    POLL_SECONDS,
    OnBytes,
    Work,
    WorkingMemory,
    fitting_jobs,
)
from xtuner2llava.writing.nonfinite import NonFinite
from xtuner2llava.writing.shard_file import ShardFile, WrittenPart, hash_start
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
    on_progress: OnBytes | None = None,
) -> Written:
    """Writes and flushes `shards` into `folder`, in order, by `jobs` threads.

    The bytes do not depend on `jobs`: by default one a core, and no more than four. There are fewer
    where `max_memory` bytes do not hold the buffers of so many; a tensor that needs more by itself
    is a `UsageError`. With `verify`, each shard is read back and compared with its sources.
    `on_progress(done, total)` counts bytes of output, half of a byte for writing it and half for
    verifying it. Raises `OutputError`, `CorruptFileError`, `PlanError` for a value that overflows
    its dtype, and `VerificationError`.

    With `deliver`, each shard is handed over when it is finished, by the thread that finished it,
    and is removed when `deliver` returns; only then is the next one begun. What is delivered counts
    as a third part of its bytes. What `deliver` raises stops all threads.

    With `executor`, its workers write the shards, as many at once as it likes, each by one thread.
    They must see the paths of the sources and of `folder`.

    torch computes with as many threads for each job as it does elsewhere; `torch.set_num_threads`
    is the caller's to set, because it changes the whole process. `computing_jobs` says how many
    jobs there will be.
    """
    needs = _working_memory(shards)
    _require_memory(needs, max_memory)
    threads = fitting_jobs(list(needs.values()), jobs, max_memory)
    total = sum(shard.size for shard in shards)
    work = Work(threads, total, on_progress, passes=1 + verify + (deliver is not None))
    finished = folder.state.finished()
    missing = [shard.size for shard in shards if shard.filename not in finished]
    at_once = len(missing) if deliver is None else 1
    folder.require_space(sum(sorted(missing, reverse=True)[:at_once]))
    with _Writing(folder, work, SourceSums(shards), verify, deliver) as writing:
        work.run(writing.keep, shards)
        left = [shard for shard in shards if shard.filename not in writing.results]
        if executor is not None:
            with ExecutorWriter(executor, folder, verify) as workers:
                work.jobs = max(1, len(left)) if deliver is None else 1  # Each only waits.
                work.run(partial(writing.have_written, workers), left)
        else:
            if _is_computed(left):
                import torch  # noqa: F401 - a second, which Ctrl-C can end here and not in a thread
            work.run(writing.write, writing.blocks(left))
        writing.sources.finish(writing.compare)
    results = [writing.results[shard.filename] for shard in shards]
    return Written(
        tuple(written for written, _ in results),
        tuple(found for _, part in results for found in part.nonfinite),
    )


def computing_jobs(
    shards: Sequence[Shard], jobs: int | None = None, max_memory: int = DEFAULT_MEMORY
) -> int:
    """How many of the jobs of `write_shards` need torch at once; 0 if all tensors are copied."""
    if not _is_computed(shards):
        return 0
    return fitting_jobs(list(_working_memory(shards).values()), jobs, max_memory)


def _is_computed(shards: Sequence[Shard]) -> bool:
    return any(e.tensor.ranges() is None for shard in shards for e in shard.entries)


def _working_memory(shards: Sequence[Shard]) -> dict[str, WorkingMemory]:
    return {e.name: working_memory(e.tensor) for shard in shards for e in shard.entries}


def _require_memory(memory: Mapping[str, WorkingMemory], max_memory: int) -> None:
    """Raises `UsageError` if a tensor needs more than `max_memory` bytes."""
    needs = {name: need.own + need.shared for name, need in memory.items()}
    most = max(needs.values(), default=0)
    raise_faults(
        UsageError,
        [
            Fault(
                name,
                f"needs {need:,} bytes of working memory, --max-memory allows {max_memory:,}",
                f"Give --max-memory {-(-most // 10**6)}MB.",
            )
            for name, need in needs.items()
            if need > max_memory
        ],
    )


class _Writing:
    """The shards that are being written, and what came of them."""

    def __init__(
        self,
        folder: OutputFolder,
        work: Work,
        sources: SourceSums,
        verify: bool,
        deliver: Deliver | None,
    ) -> None:
        self._folder, self._work, self.sources = folder, work, sources
        self._verify, self._deliver = verify, deliver
        self.results: dict[str, tuple[WrittenShard, WrittenPart]] = {}
        self._begun: dict[str, tuple[WrittenPart, blake3]] = {}
        self._open: dict[str, tuple[ShardFile, ExitStack]] = {}
        self._delivered = Event()

    def __enter__(self) -> _Writing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file, stack in self._open.values():
            with stack:
                if error is not None:
                    file.give_up(error)

    def keep(self, shard: Shard) -> None:
        """Takes over what an earlier run wrote of `shard`, if that is still there."""
        state, name = self._folder.state, shard.filename
        part = WrittenPart.from_json(state.record(name))
        ends = {entry.offset + entry.tensor.nbytes for entry in shard.entries}
        if part is None or part.size not in ends or part.verified < self._verify:
            return
        digest = hash_start(self._folder.path / name, part.size, self._work.check)
        if digest.hexdigest() != part.blake3:
            return
        if part.size < shard.size:
            self._begun[name] = part, digest
            return
        for _ in range(1 + self._verify):
            self._work.advance(shard.size)
        self._complete(shard, part, part.size)

    def have_written(self, workers: ExecutorWriter, shard: Shard) -> None:
        """Has `shard` written by a worker."""
        self._complete(shard, workers.write(shard, self._work), 0)

    def blocks(self, shards: Sequence[Shard]) -> Iterator[tuple[ShardFile, int, Block]]:
        """What is to be written of `shards`, in order."""
        for shard in shards:
            self._delivered.clear()
            file = self._create(shard)
            for number, block in file.blocks():
                yield file, number, block
            while self._deliver is not None and not self._delivered.wait(POLL_SECONDS):
                self._work.check()

    def _create(self, shard: Shard) -> ShardFile:
        name, begun = shard.filename, self._begun.pop(shard.filename, None)
        with ExitStack() as stack:
            keep = 0 if begun is None else begun[0].size
            file = ShardFile(
                self._folder.path / name,
                stack.enter_context(self._folder.create(name, keep)),
                shard,
                self.sources,
                begun=begun,
                verify=self._verify,
                record=lambda part: self._folder.state.set_record(name, part.to_json()),
                advance=self._work.advance,
            )
            self._open[name] = file, stack.pop_all()
        return file

    def write(self, place: tuple[ShardFile, int, Block]) -> None:
        """Writes a block and, when all others are written, finishes its file."""
        file, number, block = place
        file.write(number, block)
        if block.entry is file.shard.entries[-1] and block.is_last:
            thread_cache.use_for(None)  # Others go on with other tensors meanwhile.
            part = file.finish()
            self._open.pop(file.shard.filename)[1].close()
            self._complete(file.shard, part, file.begun_bytes)

    def _complete(self, shard: Shard, part: WrittenPart, kept: int) -> None:
        """Checks the sums of a shard that is whole, and records or delivers it."""
        self.sources.add(part.sums, self.compare)
        written = WrittenShard(shard.filename, shard.size, part.blake3, kept)
        if self._deliver is not None:
            self._deliver(self._folder.path / shard.filename, written, self._work.advance)
            self._folder.discard(shard.filename)
            self._delivered.set()
        else:
            self._folder.state.set_record(shard.filename, part.to_json(finished=True))
        _log.debug("%s: %d bytes, %d of them kept", shard.filename, shard.size, kept)
        self.results[shard.filename] = written, part

    def compare(self, shard: Shard) -> None:
        """Raises what is wrong with a shard whose source is right, and has it written again."""
        path = self._folder.path / shard.filename
        if not path.exists():
            return
        try:
            verify_shard(path, shard)
        except VerificationError:
            self._folder.discard(shard.filename)
            raise
