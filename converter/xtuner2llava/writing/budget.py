"""`Budget`: working memory that all jobs share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from xtuner2llava.errors import Fault, UsageError, raise_faults
from xtuner2llava.writing.blocks import working_bytes
from xtuner2llava.writing.shards import Shard

DEFAULT_BYTES = 256 * 10**6
_POLL_SECONDS = 0.2


class Budget:
    """`total` bytes of working buffers; a job waits until what its tensor needs is free."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    def require(self, shards: Sequence[Shard]) -> None:
        """Raises `UsageError` if a tensor needs more than the total, by itself."""
        needs = {
            entry.name: working_bytes(entry.tensor) for shard in shards for entry in shard.entries
        }
        most = max(needs.values(), default=0)
        raise_faults(
            UsageError,
            [
                Fault(
                    name,
                    f"needs {need:,} bytes of working memory, --max-memory allows {self._total:,}",
                    f"Give --max-memory {-(-most // 10**6)}MB.",
                )
                for name, need in needs.items()
                if need > self._total
            ],
        )

    @contextmanager
    def take(self, count: int, check: Callable[[], None]) -> Iterator[None]:
        """Holds `count` bytes for the block; `check` is called now and then while it waits."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._free >= count, _POLL_SECONDS):
                check()
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()
