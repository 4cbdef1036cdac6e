"""`Stage`: a thread of a pipeline, which works beside the one that hands items over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import ParamSpec

Parameters = ParamSpec("Parameters")


class Stage:
    """Makes calls in order in one thread, while the `with` block runs; at most `ahead` are pending.

    What a call raises is raised by a later `put` or by `finish`, and the calls behind it, which
    build on it, are not made. Leaving the block by an error drops those that have not begun.
    """

    def __init__(self, name: str, ahead: int) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._ahead = ahead
        self._pending: deque[Future[None]] = deque()
        self._failed = False  # Of the thread alone.

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(
        self,
        call: Callable[Parameters, None],
        *arguments: Parameters.args,
        **named: Parameters.kwargs,
    ) -> None:
        """Has `call(*arguments)` made; waits while too many are pending."""
        if len(self._pending) == self._ahead:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._make, partial(call, *arguments, **named)))

    def _make(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except BaseException:
            self._failed = True
            raise

    def drop(self) -> None:
        """Returns when the call that has begun is made; the others are not."""
        for call in self._pending:
            call.cancel()
        wait(self._pending)
        self._pending.clear()

    def finish(self) -> None:
        """Returns when all calls are made."""
        while self._pending:
            self._pending.popleft().result()
