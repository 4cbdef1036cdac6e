"""Tensor names: with placeholders, as globs, and near misses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
_MAX_LENGTH = 500
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")
# Enough to find a slip; comparing with every name of a large model would take seconds.
_MAX_CANDIDATES = 400


@dataclass(frozen=True, slots=True)
class Template:
    """A text with placeholders such as `{i}`; `parts` alternates literals and their names."""

    text: str
    parts: tuple[str, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        return self.parts[1::2]

    def render(self, values: Mapping[str, object]) -> str:
        """The text with every placeholder replaced. Raises `KeyError` for one without value."""
        if len(self.parts) == 1:
            return self.text
        return "".join(
            str(values[part]) if index % 2 else part for index, part in enumerate(self.parts)
        )


def parse_template(text: str) -> Template:
    """Raises `ValueError` for braces that are not around a name."""
    parts = tuple(_PLACEHOLDER.split(text))
    if any("{" in literal or "}" in literal for literal in parts[::2]):
        raise ValueError(f"`{text}`: braces go around a name, as in {{i}}")
    return Template(text, parts)


def parse_name(text: str, *, glob: bool = False) -> Template:
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
    if not prefix:
        return name
    if name == prefix:
        return ""
    return name[len(prefix) + 1 :] if name.startswith(prefix + ".") else None


def matches(pattern: str, name: str) -> bool:
    """Whether the glob `pattern` covers all of `name`, in at most the product of their lengths."""

    def part(wanted: str, found: str) -> bool:
        if "*" not in wanted:
            return wanted == found
        return _covers(wanted, found, "*", str.__eq__)

    return _covers(pattern.split("."), name.split("."), "**", part)


def _covers(
    pattern: Sequence[_T], items: Sequence[_T], star: _T, equal: Callable[[_T, _T], bool]
) -> bool:
    """Wildcard matching with one step back: `star` is any number of items, others one each."""
    at = taken = 0
    last_star = -1
    retry = 0
    while taken < len(items):
        if at < len(pattern) and pattern[at] == star:
            last_star, retry = at, taken
            at += 1
        elif at < len(pattern) and equal(pattern[at], items[taken]):
            at += 1
            taken += 1
        elif last_star >= 0:
            retry += 1
            at, taken = last_star + 1, retry
        else:
            return False
    return all(item == star for item in pattern[at:])


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate most like `name`, if one is like it."""
    if len(name) > _MAX_LENGTH:
        return None
    usable = [text for text in candidates[:_MAX_CANDIDATES] if len(text) <= _MAX_LENGTH]
    found = difflib.get_close_matches(name, usable, n=1, cutoff=0.7)
    return found[0] if found else None
