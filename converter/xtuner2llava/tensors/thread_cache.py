"""What a thread uses again for the next block of a tensor.

Buffers are its own. A tensor that all blocks need whole is shared with the other threads that need
it at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    import torch


class _Cache(threading.local):
    def __init__(self) -> None:
        self.owner: object = None
        self.buffers: dict[str, bytearray] = {}
        self.key: object = None
        self.value: torch.Tensor | None = None


_cache = _Cache()
# By the id of a key, which lives as long as a thread holds its tensor, or the lock to make it.
_shared: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
_making: WeakValueDictionary[int, threading.Lock] = WeakValueDictionary()
_asking = threading.Lock()


def use_for(owner: object) -> None:
    """Frees the tensor that this thread has cached for another owner."""
    if _cache.owner is not owner:
        _cache.owner, _cache.value = owner, None


def buffer(use: str, count: int) -> memoryview:
    """`count` bytes of memory, which this thread's next call for the same use overwrites.

    New memory for each block costs more than reading it.
    """
    found = _cache.buffers.pop(use, bytearray())
    if len(found) < count:
        found = bytearray()  # Frees what there was.
        found = bytearray(count)
    _cache.buffers[use] = found
    return memoryview(found)[:count]


def get(key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gave for `key`, as long as a thread has asked for nothing else since."""
    if _cache.value is None or _cache.key is not key:
        _cache.value = None
        with _asking:
            making = _making.setdefault(id(key), threading.Lock())
        with making:
            _cache.value = _shared.get(id(key))
            if _cache.value is None:
                _cache.value = _shared[id(key)] = make()
        _cache.key = key
    return _cache.value


def clear() -> None:
    """Frees what this thread has cached."""
    _cache.buffers, _cache.value = {}, None
