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


def test_threads_share_it_as_long_as_one_of_them_needs_it() -> None:
    made: list[int] = []
    key, found = [1], list[int]()

    def ask() -> None:
        found.append(int(thread_cache.get(key, maker(made))))

    for _ in range(2):
        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        thread_cache.clear()
    assert found == [0, 0, 1, 1]


def test_threads_that_need_others_do_not_wait_for_each_other() -> None:
    both = threading.Barrier(2, timeout=10)

    def make() -> torch.Tensor:
        both.wait()  # Broken unless the other thread is making its own at the same time.
        return torch.ones(1)

    threads = [threading.Thread(target=thread_cache.get, args=([n], make)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.broken


def test_a_buffer_is_used_again_by_its_thread_alone() -> None:
    first = thread_cache.buffer("read", 8)
    others = [thread_cache.buffer("written", 8)]
    thread = threading.Thread(target=lambda: others.append(thread_cache.buffer("read", 8)))
    thread.start()
    thread.join()
    first[:] = b"8 bytes."
    assert bytes(thread_cache.buffer("read", 8)) == b"8 bytes."
    assert all(bytes(other) == bytes(8) for other in others)


def test_each_use_has_memory_for_its_largest_buffer_and_no_more() -> None:
    thread_cache.clear()
    sizes = [8, 3, 5, 9, 8]
    views = [thread_cache.buffer("read", size) for size in sizes]
    assert [len(view) for view in views] == sizes
    views[-1][:] = b"8 bytes."
    assert bytes(views[-2][:8]) == b"8 bytes." == bytes(thread_cache.buffer("read", 9)[:8])
    assert bytes(views[0]) == bytes(8)  # It was too small for the fourth.


def test_a_tensor_that_was_cached_for_another_is_freed() -> None:
    one, other = object(), object()
    thread_cache.use_for(one)
    alive = weakref.ref(thread_cache.get([1], lambda: torch.ones(2)))
    thread_cache.use_for(one)
    assert alive() is not None
    thread_cache.use_for(other)
    assert alive() is None
