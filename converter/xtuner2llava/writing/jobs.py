"""Threads: several shards at once, the stages of a pipeline, and the memory that all share."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import ParamSpec, TypeVar

from xtuner2llava.errors import Fault, UsageError, raise_faults

# Called with (bytes done, bytes in all), from one thread at a time.
OnProgress = Callable[[int, int], None]

Item = TypeVar("Item")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

DEFAULT_MEMORY = 256 * 10**6

_PROGRESS_BYTES = 16 << 20
_POLL_SECONDS = 0.2


def default_jobs() -> int:
    """How many shards are written at once: one a core, and no more than four."""
    return min(4, len(os.sched_getaffinity(0)))


class Stopped(Exception):
    """Another thread failed, or the user interrupted; that error is the one to report."""


class Work:
    """Jobs on a number of bytes; each byte counts once for each of the `passes` over it.

    Threads are enough: reading, writing, hashing and torch's arithmetic all release Python's lock.
    """

    def __init__(
        self,
        jobs: int | None,
        total: int,
        on_progress: OnProgress | None = None,
        passes: int = 1,
    ) -> None:
        self.jobs = jobs or default_jobs()
        self._total, self._on_progress, self._passes = total, on_progress, passes
        self._lock = threading.Lock()
        self._done = self._reported = 0
        self._stop = threading.Event()
        self._idle = threading.Condition()
        self._running = 0
        self._failures: list[tuple[int, BaseException]] = []

    def check(self) -> None:
        """Raises `Stopped` if the work is to end early."""
        if self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Makes `check` raise in all threads, and no other job begin."""
        with self._idle:
            self._stop.set()

    def advance(self, count: int) -> None:
        """Counts `count` bytes of one pass. Raises `Stopped`, or what the callback raises."""
        self.check()
        with self._lock:
            self._done += count
            done = self._done // self._passes
            if done - self._reported >= _PROGRESS_BYTES or done == self._total != self._reported:
                self._reported = done
                if self._on_progress:
                    self._on_progress(done, self._total)

    def run(self, job: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The results of `job` for all items, computed by `jobs` threads.

        After the first error the other jobs stop; of all errors, the one of the first item that
        has one is raised. Whatever is raised, Ctrl-C too, no job runs any more then.
        """
        with ThreadPoolExecutor(self.jobs, "shard") as threads:
            try:
                futures = [
                    threads.submit(self.guarded, place, job, item)
                    for place, item in enumerate(items)
                ]
                # A signal just before a wait without end would be noticed when that ends.
                while wait(futures, _POLL_SECONDS).not_done:
                    pass
            except BaseException:
                self.stop()
                self._await_idle()
                raise
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]
        return [future.result() for future in futures]

    def _await_idle(self) -> None:
        """Returns when no job runs any more, however often Ctrl-C is pressed meanwhile.

        It may come while a thread is started, and the pool then knows nothing of that.
        """
        while True:
            with suppress(KeyboardInterrupt), self._idle:
                self._idle.wait_for(lambda: self._running == 0)
                return

    def guarded(self, place: int, job: Callable[[Item], Result], item: Item) -> Result:
        """`job(item)`; its error stops all the work and is remembered as that of item `place`."""
        with self._idle:
            self.check()
            self._running += 1
        try:
            return job(item)
        except Stopped:
            raise
        except BaseException as error:
            self._failures.append((place, error))
            self.stop()
            raise
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()


class Stage:
    """Makes calls in order in one thread, while the `with` block runs; at most `ahead` are pending.

    What a call raises is raised by a later `put` or by `finish`, and the calls behind it, which
    build on it, are not made. Leaving the block by an error drops those that have not begun.
    """

    def __init__(self, name: str, ahead: int) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._ahead = ahead
        self._pending: deque[Future[None]] = deque()
        self._failed = False  # Of the thread alone.

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(
        self,
        call: Callable[Parameters, None],
        *arguments: Parameters.args,
        **named: Parameters.kwargs,
    ) -> None:
        """Has `call(*arguments)` made; waits while too many are pending."""
        if len(self._pending) == self._ahead:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._make, partial(call, *arguments, **named)))

    def _make(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except BaseException:
            self._failed = True
            raise

    def drop(self) -> None:
        """Returns when the call that has begun is made; the others are not."""
        for call in self._pending:
            call.cancel()
        wait(self._pending)
        self._pending.clear()

    def finish(self) -> None:
        """Returns when all calls are made."""
        while self._pending:
            self._pending.popleft().result()


class Budget:
    """`total` bytes of working buffers; a job waits until what its tensor needs is free."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    def require(self, needs: Mapping[str, int]) -> None:
        """Raises `UsageError` if one of `needs`, bytes by tensor, is more than the total."""
        most = max(needs.values(), default=0)
        raise_faults(
            UsageError,
            [
                Fault(
                    name,
                    f"needs {need:,} bytes of working memory, --max-memory allows {self._total:,}",
                    f"Give --max-memory {-(-most // 10**6)}MB.",
                )
                for name, need in needs.items()
                if need > self._total
            ],
        )

    @contextmanager
    def take(self, count: int, check: Callable[[], None]) -> Iterator[None]:
        """Holds `count` bytes for the block; `check` is called now and then while it waits."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._free >= count, _POLL_SECONDS):
                check()
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()
