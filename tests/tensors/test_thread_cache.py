"""What is made once for all blocks of a tensor, and freed for the next."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from xtuner2llava.tensors import thread_cache


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    yield
    thread_cache.clear()


def maker(made: list[int]) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        made.append(len(made))
        return torch.tensor(made[-1])

    return make


def test_it_is_made_once_until_another_is_asked_for() -> None:
    made: list[int] = []
    # Equal, as tensors of the same values are, and not the same.
    one, other = [1], [1]
    found = [int(thread_cache.get(key, maker(made))) for key in (one, one, other, other, one)]
    assert found == [0, 0, 1, 1, 2]
    thread_cache.clear()
    assert int(thread_cache.get(one, maker(made))) == 3


def test_the_one_before_is_freed_before_the_next_is_made() -> None:
    alive = weakref.ref(thread_cache.get([1], lambda: torch.ones(2)))

    def make() -> torch.Tensor:
        gc.collect()
        assert alive() is None
        return torch.ones(3)

    thread_cache.get([2], make)


def test_each_thread_has_its_own() -> None:
    made: list[int] = []
    key = [1]
    thread_cache.get(key, maker(made))
    thread = threading.Thread(target=thread_cache.get, args=(key, maker(made)))
    thread.start()
    thread.join()
    assert int(thread_cache.get(key, maker(made))) == 0
    assert made == [0, 1]
