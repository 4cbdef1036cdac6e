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
    found: tuple[object, torch.Tensor] | None = getattr(_cache, "value", None)
    if found is None or found[0] is not key:
        clear()
        found = _cache.value = (key, make())
    return found[1]


def clear() -> None:
    """Frees what this thread has cached."""
    _cache.value = None
