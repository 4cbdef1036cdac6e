"""`Follower`: a thread that works on what another one hands over, a few items behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Follower(Generic[Item]):
    """Calls `handle` for each item in order, in a thread of its own, while the `with` block runs.

    At most `ahead` items wait. What `handle` raises is raised by the next `put` or by `finish`;
    later items are let pass, so that nobody waits for ever. Leaving the block ends the thread.
    """

    def __init__(self, name: str, handle: Callable[[Item], None], ahead: int) -> None:
        self._handle = handle
        self._items: Queue[tuple[Item] | None] = Queue(ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name)

    def __enter__(self) -> Follower[Item]:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._error is None:
            self._error = error  # What still waits need not be done.
        self._end()

    def put(self, item: Item) -> None:
        """Hands `item` over; waits while too many are waiting."""
        if self._error is not None:
            raise self._error
        self._items.put((item,))

    def finish(self) -> None:
        """Returns when everything is handled."""
        self._end()
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        if self._thread.is_alive():
            self._items.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._handle(*item)
                except BaseException as error:
                    self._error = error
