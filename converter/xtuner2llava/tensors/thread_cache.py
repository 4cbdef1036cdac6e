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
        self.buffers: dict[str, dict[int, bytearray]] = {}
        self.key: object = None
        self.value: torch.Tensor | None = None


_cache = _Cache()
# By the id of a key, which lives as long as a thread holds its tensor.
_shared: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
_making = threading.Lock()


def use_for(owner: object) -> None:
    """Frees the tensor that this thread has cached for another owner."""
    if _cache.owner is not owner:
        _cache.owner, _cache.value = owner, None


def buffer(use: str, count: int) -> bytearray:
    """`count` bytes of memory, which this thread's next call for the same use overwrites.

    New memory for each block costs more than reading it. A tensor has blocks of two sizes, of which
    one is the last; tensors of one shape have the same.
    """
    sizes = _cache.buffers.setdefault(use, {})
    found = sizes.pop(count, None)
    if found is None:
        if len(sizes) == 2:
            del sizes[next(iter(sizes))]
        found = bytearray(count)
    sizes[count] = found
    return found


def get(key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gave for `key`, as long as a thread has asked for nothing else since."""
    if _cache.value is None or _cache.key is not key:
        _cache.value = None
        with _making:
            _cache.value = _shared.get(id(key))
            if _cache.value is None:
                _cache.value = _shared[id(key)] = make()
        _cache.key = key
    return _cache.value


def clear() -> None:
    """Frees what this thread has cached."""
    _cache.buffers, _cache.value = {}, None
