"""Several shards at once: threads, progress, and stopping all of them when one fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

# Called with (bytes done, bytes in all), from one thread at a time.
OnProgress = Callable[[int, int], None]

Item = TypeVar("Item")
Result = TypeVar("Result")

_PROGRESS_BYTES = 16 << 20
_POLL_SECONDS = 0.2


def default_jobs() -> int:
    """How many shards are written at once: one a core, and no more than four."""
    return min(4, len(os.sched_getaffinity(0)))


class Stopped(Exception):
    """Another thread failed, or the user interrupted; that error is the one to tell."""


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
        self._done = self._told = 0
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
            if done - self._told >= _PROGRESS_BYTES or done == self._total != self._told:
                self._told = done
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
                # A signal just before a wait without end would be heeded when that ends.
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
