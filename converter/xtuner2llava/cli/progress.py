"""The progress bar: bytes, rate and time left, on a terminal only."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBar:
    """Shows how far a stage is, on stderr; with `show` false it does nothing."""

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._stage = ""
        self._bar: tqdm[NoReturn] | None = None

    def update(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes of `stage` are done."""
        if not self._show:
            return
        if self._bar is None or stage != self._stage:
            from tqdm import tqdm

            self._close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, unit="B", unit_scale=True, leave=False)
        bar = self._bar
        bar.update(done - bar.n)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
