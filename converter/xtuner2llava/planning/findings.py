"""What planning finds on the way: faults, which are raised together, and notes for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from xtuner2llava.errors import ConversionError, Fault, PlanError, raise_faults

_T = TypeVar("_T")


class Findings:
    """Faults and notes in the order in which they were found."""

    def __init__(self, faults: Iterable[Fault], notes: Iterable[str]) -> None:
        self.faults: list[Fault] = list(faults)
        self._notes: list[str] = list(notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """Each note once."""
        return tuple(dict.fromkeys(self._notes))

    def note(self, *sentences: str | None) -> None:
        self._notes.extend(sentence for sentence in sentences if sentence is not None)

    def attempt(self, step: Callable[[], _T]) -> _T | None:
        """The result of a step, or None with its faults noted, so that other steps go on."""
        try:
            return step()
        except ConversionError as error:
            self.faults.extend(error.faults)
            return None

    def stop(self) -> None:
        """Raises `PlanError` with all faults, each once, if there are any."""
        raise_faults(PlanError, self.faults)
