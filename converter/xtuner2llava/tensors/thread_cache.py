"""What a tensor needs whole for every block of its rows, cached while it is being read.

One tensor a thread, so that memory is bounded by the number of jobs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_cache = threading.local()


def get(key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gave when this thread last asked for `key`, if it asked for nothing since."""
    if getattr(_cache, "key", None) is not key:
        clear()
        _cache.value, _cache.key = make(), key
    value: torch.Tensor = _cache.value
    return value


def clear() -> None:
    """Frees what this thread has cached."""
    _cache.value = _cache.key = None
