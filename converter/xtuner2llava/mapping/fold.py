"""Faults about tensors, folded over layers: a model of 80 layers has thousands of names."""

from __future__ import annotations

from collections.abc import Sequence

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.names import fold

_MAX_FAULTS = 40


class TensorFaults:
    """Collects faults that each name one tensor; what else they say alike is said once."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str, str], list[str]] = {}

    def add(self, where: str, name: str, what: str, advice: str = "") -> None:
        """A fault at `where` that reads: the name, a space, `what`."""
        self._names.setdefault((where, what, advice), []).append(name)

    def faults(self) -> list[Fault]:
        """In the order of the first name of each, at most forty and a last one that counts."""
        return shortened(
            [
                Fault(where, f"{folded} {what}", advice)
                for (where, what, advice), names in self._names.items()
                for folded in fold(names)
            ]
        )


def shortened(faults: Sequence[Fault]) -> list[Fault]:
    """The first forty faults, and one that says how many more there are."""
    unique = list(dict.fromkeys(faults))
    if len(unique) <= _MAX_FAULTS:
        return unique
    more = Fault("", f"and {len(unique) - _MAX_FAULTS:,} more faults of this kind")
    return [*unique[:_MAX_FAULTS], more]
