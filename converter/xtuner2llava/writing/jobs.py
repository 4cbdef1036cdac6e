"""Threads that share the work, and the order in which they let each other through."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

# Called with (bytes done, bytes in all), from one thread at a time.
OnBytes = Callable[[int, int], None]

Item = TypeVar("Item")
Result = TypeVar("Result")

DEFAULT_MEMORY = 256 * 10**6

_PROGRESS_BYTES = 16 << 20
POLL_SECONDS = 0.2


def default_jobs() -> int:
    """How many threads work: one a core, and no more than four."""
    return min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class WorkingMemory:
    """What a tensor takes that is written in `blocks`: bytes of each thread's own, and `shared`."""

    own: int
    shared: int = 0
    blocks: int = 1


def fitting_jobs(
    needs: Sequence[WorkingMemory], jobs: int | None = None, max_memory: int = DEFAULT_MEMORY
) -> int:
    """`jobs`, or as many as `max_memory` bytes are enough for; at least one.

    Threads take the blocks of the tensors in order, and finish them in order, so that the blocks
    in work follow each other.
    """
    own = max((need.own for need in needs), default=0)

    def fits(count: int) -> bool:
        shared = 0
        for first, need in enumerate(needs):
            others, total = count - 1, need.shared
            for following in needs[first + 1 : first + count]:
                if others <= 0:
                    break
                total += following.shared
                others -= following.blocks
            shared = max(shared, total)
        return count * own + shared <= max_memory

    return next(filter(fits, range(jobs or default_jobs(), 1, -1)), 1)


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
        on_progress: OnBytes | None = None,
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

    def run(self, job: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results of `job` for all items; `jobs` threads take them one after the other.

        After the first error no other job begins; of all errors, the one of the first item that
        has one is raised. Whatever is raised, Ctrl-C too, no job runs any more then.
        """
        handing, remaining = threading.Lock(), iter(items)
        results: dict[int, Result] = {}
        handed = 0

        def take_jobs() -> None:
            nonlocal handed
            place = 0
            try:
                while True:
                    with handing:
                        self.check()
                        place, handed = handed, handed + 1
                        try:
                            item = next(remaining)
                        except StopIteration:
                            return
                    results[place] = job(item)
            except Stopped:
                return
            except BaseException as error:
                self._failures.append((place, error))
                self.stop()

        with ThreadPoolExecutor(self.jobs, "job") as threads:
            try:
                futures = [threads.submit(self._counted, take_jobs) for _ in range(self.jobs)]
                # A signal just before a wait without end would be noticed when that ends.
                while wait(futures, POLL_SECONDS).not_done:
                    pass
            except BaseException:
                self.stop()
                self._await_idle()
                raise
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]
        self.check()
        return [results[place] for place in sorted(results)]

    def _counted(self, call: Callable[[], None]) -> None:
        with self._idle:
            self._running += 1
        try:
            call()
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _await_idle(self) -> None:
        """Returns when no job runs any more, however often Ctrl-C is pressed meanwhile.

        It may come while a thread is started, and the pool then knows nothing of that.
        """
        while True:
            with suppress(KeyboardInterrupt), self._idle:
                self._idle.wait_for(lambda: self._running == 0)
                return


class Turns:
    """Lets threads through one at a time, in the order of the numbers that they have."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Condition] = {}
        self._next = 0
        self._broken: int | None = None

    @contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Waits for all numbers below. Raises `Stopped` where one of these was given up."""
        with self._lock:
            while self._next != number:
                if self._broken is not None and self._broken < number:
                    raise Stopped
                # One for each: only the thread whose turn it is wakes up.
                self._waiting.setdefault(number, threading.Condition(self._lock)).wait()
        yield
        with self._lock:
            self._next += 1
            if waiting := self._waiting.pop(self._next, None):
                waiting.notify()

    def give_up(self, number: int) -> None:
        """Says that `number` will not come, nor those behind it."""
        with self._lock:
            self._broken = number if self._broken is None else min(number, self._broken)
            for waiting in self._waiting.values():
                waiting.notify()
