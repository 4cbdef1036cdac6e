"""What a tensor needs whole for every block of its rows, kept while it is being read.

One thing a thread, so that memory is bounded by the number of jobs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_kept = threading.local()


def keep(key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gave when this thread last asked for `key`, if it asked for nothing since."""
    found: tuple[object, torch.Tensor] | None = getattr(_kept, "value", None)
    if found is None or found[0] is not key:
        forget()
        found = _kept.value = (key, make())
    return found[1]


def forget() -> None:
    """Gives the memory of what this thread keeps free."""
    _kept.value = None
