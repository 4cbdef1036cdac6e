"""Names, and faults about them, folded over layers: a model of 80 layers has thousands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.names import nearest

_MAX_FAULTS = 40
# Each of them is a comparison with every name.
_MAX_SUGGESTIONS = 10


@dataclass(frozen=True, slots=True)
class Folded:
    """Names that differ only in numbers: `model.layers.{0..31}.mlp.up_proj.weight`; how many."""

    text: str
    template: str
    count: int

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" ({self.count:,} tensors)" if self.count > 1 else "")


def unnumbered(name: str) -> str:
    """`name` with `{}` for each of its parts that is a number."""
    return ".".join("{}" if _is_number(part) else part for part in name.split("."))


def fold(names: Iterable[str]) -> list[Folded]:
    """`names` in the order given, those that differ only in numbers as one."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(part) for part in name.split(".") if _is_number(part)]
        groups.setdefault(unnumbered(name), []).append(numbers)
    return [
        Folded(_with_numbers(template, rows), template, len(rows))
        for template, rows in groups.items()
    ]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= 9


def _with_numbers(template: str, rows: list[list[int]]) -> str:
    slots = [_runs(sorted(set(column))) for column in zip(*rows, strict=True)]
    pieces = template.split("{}")
    return pieces[0] + "".join(slot + piece for slot, piece in zip(slots, pieces[1:], strict=False))


def _runs(numbers: list[int]) -> str:
    """`{0..3,7}`; a single number stands as it is; after four runs, an ellipsis."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    shown = ["..".join(str(end) for end in run) for run in runs[:4]]
    return "{" + ",".join(shown) + (",…" if len(runs) > 4 else "") + "}"


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


class Suggestions:
    """What `texts` say of the template most like a name; for ten kinds of names."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts
        self._found: dict[str, str | None] = {}

    def near(self, name: str) -> str | None:
        template = unnumbered(name)
        if template not in self._found and len(self._found) < _MAX_SUGGESTIONS:
            near = nearest(template, list(self._texts))
            self._found[template] = self._texts[near] if near else None
        return self._found.get(template)
