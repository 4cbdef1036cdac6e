"""What a thread uses again for the next block: buffers, and a tensor that all blocks need whole.

One tensor a thread, so that memory is bounded by the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class _Cache(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, bytearray] = {}
        self.owner: object = None
        self.key: object = None
        self.value: torch.Tensor | None = None


_cache = _Cache()


def use_for(owner: object) -> None:
    """Frees what this thread has cached for another owner."""
    if _cache.owner is not owner:
        clear()
        _cache.owner = owner


def buffer(use: str, count: int) -> bytearray:
    """`count` bytes of memory, which this thread's next call for the same use overwrites.

    New memory for each block costs more than reading it.
    """
    found = _cache.buffers.get(use)
    if found is None or len(found) != count:
        found = None
        _cache.buffers.pop(use, None)
        found = _cache.buffers[use] = bytearray(count)
    return found


def get(key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gave when this thread last asked for `key`, if it asked for nothing since."""
    if _cache.value is None or _cache.key is not key:
        _cache.value = None
        _cache.value, _cache.key = make(), key
    return _cache.value


def clear() -> None:
    """Frees what this thread has cached."""
    _cache.buffers, _cache.value = {}, None
