"""Tensor names: with placeholders, as globs, near misses, and folded over layers in messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from typing import TypeVar

from xtuner2llava.errors import Fault

_T = TypeVar("_T")
_MAX_LENGTH = 500
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")
# A part of a name that is the number of a layer or an expert.
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")
# Enough to find a slip; comparing with every name of a large model would take seconds, and long
# names of few different letters take a hundred times as long as usual ones.
_MAX_CANDIDATES = 400
_MAX_COMPARED = 120
_MAX_SUGGESTIONS = 10
_MAX_FAULTS = 40


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A text with placeholders such as `{i}`; `parts` alternates literals and their names."""

    text: str
    parts: tuple[str, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        return self.parts[1::2]

    def render(self, values: Mapping[str, object]) -> str:
        """The text with every placeholder replaced. Raises `KeyError` for one without value."""
        found = [str(values[part]) if n % 2 else part for n, part in enumerate(self.parts)]
        return "".join(found)


def parse_template(text: str) -> TextTemplate:
    """Raises `ValueError` for braces that are not around a name."""
    parts = tuple(_PLACEHOLDER.split(text))
    if any("{" in literal or "}" in literal for literal in parts[::2]):
        raise ValueError(f"`{text}`: braces go around a name, as in {{i}}")
    return TextTemplate(text, parts)


def parse_name(text: str, *, glob: bool = False) -> TextTemplate:
    """A tensor name, or the start of one; raises `ValueError` for what cannot be one.

    Only a `glob` may hold `*` (anything within one dotted part) and `**` (any number of parts).
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"a name has {len(text)} characters, {_MAX_LENGTH} are allowed")
    if any(character.isspace() for character in text):
        raise ValueError(f"`{text}`: a tensor name has no spaces")
    if "*" in text and not glob:
        raise ValueError(f"`{text}`: only drop takes `*`, other rules name their tensors")
    if text and "" in text.split("."):
        raise ValueError(f"`{text}`: a name does not begin or end with a dot, nor double one")
    return parse_template(text)


def join(prefix: str, name: str) -> str:
    """`prefix.name`; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def below(name: str, prefix: str) -> str | None:
    """What follows `prefix` in `name`: empty if that is all, None if it does not begin so."""
    if not prefix or name == prefix:
        return name[len(prefix) :]
    return name[len(prefix) + 1 :] if name.startswith(prefix + ".") else None


def matches(pattern: str, name: str) -> bool:
    """Whether the glob `pattern` covers all of `name`, in at most the product of their lengths."""

    def covers(part: str, found: str) -> bool:
        return _covers(part, found, "*", str.__eq__)

    return _covers(pattern.split("."), name.split("."), "**", covers)


def _covers(
    pattern: Sequence[_T], items: Sequence[_T], star: _T, equal: Callable[[_T, _T], bool]
) -> bool:
    """Wildcard matching: `star` is any number of items, all else in `pattern` is one."""
    ends = {0}
    for wanted in pattern:
        if wanted == star:
            ends = {*range(min(ends), len(items) + 1)}
        else:
            ends = {end + 1 for end in ends if end < len(items) and equal(wanted, items[end])}
        if not ends:
            return False
    return len(items) in ends


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, if one is like it."""
    if len(name) > _MAX_COMPARED:
        return None
    usable = [text for text in candidates if len(text) <= _MAX_COMPARED][:_MAX_CANDIDATES]
    return next(iter(difflib.get_close_matches(name, usable, n=1, cutoff=0.7)), None)


def advice_for(name: str, known: Iterable[str], otherwise: str) -> str:
    """The advice for a name that is not one of `known`: the one that was meant, or `otherwise`."""
    near = nearest(name, known)
    return f"Did you mean `{near}`?" if near else otherwise


class Suggestions:
    """What `texts` say of the key most like a name; for ten kinds of names, as each takes long."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts
        self._found: dict[str, str | None] = {}

    def near(self, name: str) -> str | None:
        template = unnumbered(name)
        if template not in self._found and len(self._found) < _MAX_SUGGESTIONS:
            near = nearest(template, self._texts)
            self._found[template] = self._texts[near] if near else None
        return self._found.get(template)


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
    return _NUMBER.sub("{}", name)


def fold(names: Iterable[str]) -> list[Folded]:
    """`names` in the order given, those that differ only in numbers as one."""
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in _NUMBER.findall(name)]
        groups.setdefault(tuple(_NUMBER.split(name)), []).append(numbers)
    found = []
    for between, rows in groups.items():
        runs = [_runs(sorted(set(column))) for column in zip(*rows, strict=True)]
        text = "".join(chain.from_iterable(zip_longest(between, runs, fillvalue="")))
        found.append(Folded(text, "{}".join(between), len(rows)))
    return found


def _runs(numbers: Sequence[int]) -> str:
    """`{0..3,7}`; a single number stands as it is; after four runs, an ellipsis."""
    if len(numbers) == 1:
        return str(numbers[0])
    found = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        found.append(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]))
    return "{" + ",".join(found[:4]) + (",…" if len(found) > 4 else "") + "}"


class TensorFaults:
    """Collects faults that each name one tensor; those that are alike are folded."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str, str], list[str]] = {}

    def add(self, where: str, name: str, what: str, advice: str = "") -> None:
        """What is wrong with the tensor `name`, which stands behind `where`."""
        self._names.setdefault((where, what, advice), []).append(name)

    def faults(self) -> list[Fault]:
        """In the order of the first name of each, at most forty and a last one that counts."""
        return shortened(
            Fault(f"{where}, {folded}", what, advice)
            for (where, what, advice), names in self._names.items()
            for folded in fold(names)
        )


def shortened(faults: Iterable[Fault]) -> list[Fault]:
    """The first forty faults, and one that says how many more there are."""
    unique = list(dict.fromkeys(faults))
    if len(unique) > _MAX_FAULTS:
        more = Fault("", f"and {len(unique) - _MAX_FAULTS:,} more faults of this kind")
        unique[_MAX_FAULTS:] = [more]
    return unique
