"""Shards written by the workers of a `concurrent.futures.Executor`, maybe on other machines.

A worker writes an attempt: a file of its own beside the output, under a unique name.
When it is whole, flushed and verified, the process that holds the folder renames it. So a worker
that dies leaves nothing that could be taken for a shard, and one that was given up and comes back
late cannot touch what others have written since.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from xtuner2llava.errors import ConversionError, OutputError
from xtuner2llava.tensors import thread_cache
from xtuner2llava.writing.disk import disk_errors
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.jobs import POLL_SECONDS, Stopped, Work
from xtuner2llava.writing.shard_file import ShardFile, WrittenPart
from xtuner2llava.writing.shards import Shard
from xtuner2llava.writing.source_sums import SourceSums
from xtuner2llava.writing.state import ATTEMPTS

# How often a worker looks whether its file is still there.
_LOOK_BYTES = 64 << 20


class ExecutorWriter:
    """Has shards of `folder` written by `executor`, each by one thread."""

    def __init__(self, executor: Executor, folder: OutputFolder, verify: bool) -> None:
        self._executor, self._folder, self._verify = executor, folder, verify
        self._attempts = folder.state.path / f"{ATTEMPTS}{uuid4().hex}"

    def __enter__(self) -> ExecutorWriter:
        with disk_errors(self._attempts, "cannot be made"):
            for left in self._folder.state.path.glob(f"{ATTEMPTS}*"):
                shutil.rmtree(left)
            self._attempts.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._attempts, ignore_errors=True)

    def write(self, shard: Shard, work: Work) -> WrittenPart:
        """Waits until `shard` is in the folder. Raises what `ShardFile` raises, and `Stopped`.

        An engine that tries again where a worker died, as Dask does, may do so; for others, it is
        an `OutputError`.
        """
        future = self._executor.submit(write_attempt, self._attempts, shard, self._verify)
        try:
            while not wait([future], POLL_SECONDS).done:
                work.check()
            path, checked = self._result(future, shard)
        finally:
            future.cancel()
        self._folder.move_into_place(path, shard.filename)
        for _ in range(1 + self._verify):
            work.advance(shard.size)
        return checked

    def _result(
        self, future: Future[tuple[Path, WrittenPart]], shard: Shard
    ) -> tuple[Path, WrittenPart]:
        try:
            return future.result()
        except ConversionError:
            raise
        except Exception as error:
            text = (str(error).strip() or "no more is known").splitlines()[0]
            raise OutputError(
                f"the worker that wrote it failed ({type(error).__name__}: {text})",
                where=shard.filename,
                advice="Each worker needs xtuner2llava of this version, and the same paths.",
            ) from error


def write_attempt(attempts: Path, shard: Shard, verify: bool) -> tuple[Path, WrittenPart]:
    """Writes `shard` into a new file in the folder `attempts`; returns its path.

    It stops when the file is removed, and leaves none if it fails.
    """
    path = attempts / f"{uuid4().hex}-{shard.filename}"
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    looked = 0

    def advance(count: int) -> None:
        nonlocal looked
        looked += count
        if looked >= _LOOK_BYTES:
            looked = 0
            if not os.fstat(descriptor).st_nlink:
                raise Stopped

    try:
        sources = SourceSums([shard])
        file = ShardFile(path, descriptor, shard, sources, verify=verify, advance=advance)
        for number, block in file.blocks():
            file.write(number, block)
        return path, file.finish()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        thread_cache.clear()
        os.close(descriptor)
