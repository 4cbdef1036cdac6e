"""No job outlives `Work.run`, at whatever moment Ctrl-C comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from xtuner2llava.writing.jobs import Stage, Stopped, Work


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


class InterruptedItems(list[int]):
    """Ctrl-C comes when the job of the first item has begun, before the second is handed out."""

    def __init__(self, job: Job) -> None:
        super().__init__([0, 1])
        self._job = job

    def __iter__(self) -> Iterator[int]:
        yield 0
        self._job.began.wait()
        raise KeyboardInterrupt


def test_an_interrupt_while_jobs_are_handed_out() -> None:
    work = Work(1, 1)
    job = Job(work)
    with pytest.raises(KeyboardInterrupt):
        work.run(job, InterruptedItems(job))
    assert job.was_stopped and job.ended.is_set()


def test_an_interrupt_while_a_thread_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread runs, and the pool that started it does not know."""
    work = Work(1, 1)
    job = Job(work)
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        start(self)
        if self.name.startswith("shard"):
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


def test_calls_behind_one_that_failed_are_not_made() -> None:
    """They would record as right what was never looked at."""
    made: list[int] = []

    def call(number: int) -> None:
        if number == 1:
            raise ValueError
        made.append(number)

    with Stage("check", 4) as stage:
        for number in range(4):
            stage.put(call, number)
        with pytest.raises(ValueError):
            stage.finish()
        stage.drop()
    assert made == [0]
