"""The stages of a conversion or a check: their wall time, and a line of the log for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunningStage:
    """A stage that has begun; `nbytes` is what it read or wrote, where that is counted."""

    nbytes: int | None = None


class Stages:
    """Wall time of the stages that ended, in seconds, each since the end of the one before.

    So they add up to the whole, with the imports and callbacks between them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._end = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[RunningStage]:
        """Logs "name: bytes, seconds" when it ends without an exception."""
        stage = RunningStage()
        yield stage
        start, self._end = self._end, time.perf_counter()
        seconds = self.seconds[name] = round(self._end - start, 3)
        amount = "" if stage.nbytes is None else f"{stage.nbytes} bytes, "
        _log.info("%s: %s%.3f s", name, amount, seconds)
