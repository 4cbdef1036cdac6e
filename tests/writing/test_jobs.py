"""No job outlives `Work.run`, at whatever moment Ctrl-C comes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from xtuner2llava.writing.jobs import Stopped, Turns, Work


class Job:
    """Works until it is stopped, which `was_stopped` tells, and then takes a moment to clean up."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.began, self.ended = threading.Event(), threading.Event()
        self.was_stopped = False

    def __call__(self, item: int) -> None:
        self.began.set()
        try:
            for _ in range(3000):  # Half a minute, so that a fault is no hang.
                self._work.check()
                time.sleep(0.01)
        except Stopped:
            self.was_stopped = True
            raise
        finally:
            time.sleep(0.1)
            self.ended.set()


def test_an_interrupt_while_a_job_runs(interrupts: None) -> None:
    work = Work(1, 1)
    job = Job(work)

    def interrupt() -> None:
        job.began.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        work.run(job, [0, 1])
    assert job.was_stopped and job.ended.is_set()


def test_an_error_of_the_items_ends_the_work() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError

    work = Work(2, 1)
    job = Job(work)
    with pytest.raises(ValueError):
        work.run(job, items())
    assert job.was_stopped


def test_results_come_in_the_order_of_the_items() -> None:
    def job(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item

    assert Work(4, 1).run(job, iter(range(50))) == list(range(50))


def test_an_interrupt_while_a_thread_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread runs, and the pool that started it does not know."""
    work = Work(1, 1)
    job = Job(work)
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        start(self)
        if self.name.startswith("job"):
            job.began.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.run(job, [0])
    assert job.was_stopped and job.ended.is_set()


def test_no_job_begins_after_a_stop() -> None:
    work = Work(2, 1)
    work.stop()
    job = Job(work)
    with pytest.raises(Stopped):
        work.run(job, [0, 1])
    assert not job.began.is_set()


def test_turns_come_in_order() -> None:
    turns, seen = Turns(), list[int]()

    def take(number: int) -> None:
        with turns.take(number):
            time.sleep(0.001)
            seen.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in (3, 1, 0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0, 1, 2, 3]


def test_no_turn_comes_behind_one_that_was_given_up() -> None:
    """It would record as right what was never looked at; those before it still come."""
    turns = Turns()
    turns.give_up(1)
    turns.give_up(3)
    with pytest.raises(Stopped), turns.take(2):
        raise AssertionError
    with turns.take(0):
        pass
    with pytest.raises(Stopped), turns.take(2):
        raise AssertionError
