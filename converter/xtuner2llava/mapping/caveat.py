"""What may differ after a conversion, and the limit within which nothing does, as data.

A caveat that names no limit says that nothing is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.expression import Expression
from xtuner2llava.mapping.names import Template
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.values import Environment, say, show
from xtuner2llava.mapping.yaml import Node, Scalar

_KEYS = ("when", "say", "exact_up_to", "transformers")
_BOUND = re.compile(r"(<=|>=|<|>) ?([0-9]{1,4}(?:\.[0-9]{1,4}){0,3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Limit:
    """A caveat that holds: its sentence, and within what the target is exact all the same.

    `tokens` counts those of one sequence, an image as its patches; `transformers` is a range of
    versions such as `>=4.38, <5.4`; `if_right` is what must be right, such as the user's own file.
    Without any of them, the target is not exact.
    """

    text: str
    tokens: int | None = None
    transformers: str | None = None
    if_right: str | None = None

    @classmethod
    def unproven(cls, what: str) -> Limit:
        """That the result depends on `what`, which is the user's word for it and has no proof."""
        return cls(
            f"Exact if {what} is right; its logits were not compared. "
            "`verify --logits --reference FILE.npz` compares them with those of the trained model.",
            if_right=what,
        )

    @property
    def is_bounded(self) -> bool:
        """Whether anything is exact."""
        return not (self.tokens is None and self.transformers is None and self.if_right is None)


@dataclass(frozen=True, slots=True)
class Caveat:
    """What may differ after the conversion, under a condition on a config."""

    where: str
    when: Expression | None
    say: Template
    exact_up_to: Expression | None
    transformers: str | None

    def limit(self, environment: Environment) -> Limit | None:
        """What it says of a config; None where it does not hold. Raises `MappingError`."""
        if self.when is not None and not self.when.condition(environment):
            return None
        tokens = None if self.exact_up_to is None else self.exact_up_to.integer(environment)
        if tokens == 0:
            raise MappingError(
                "`exact_up_to` is 0, a number of tokens was expected",
                where=self.where,
                advice="Where nothing is exact, leave it out.",
            )
        return Limit(say(self.say, environment), tokens, self.transformers)


def read_caveats(reader: Reader, node: Node | None) -> tuple[Caveat, ...]:
    caveats = []
    for item in reader.items(node, "`caveats`"):
        table = reader.table(item, "a caveat")
        reader.keys(table, _KEYS, "a caveat")
        entries = table.entries
        sentence = reader.sentence(reader.required(table, "say", "a caveat"), "`say`")
        when, length = entries.get("when"), entries.get("exact_up_to")
        if isinstance(length, Scalar) and not _may_be_length(length.value):
            what = f"`exact_up_to` is {show(length.value)}, a number of tokens was expected"
            reader.fault(length.line, what)
        caveats.append(
            Caveat(
                reader.where(table.line),
                None if when is None else reader.expression(when, "`when`"),
                sentence,
                None if length is None else reader.expression(length, "`exact_up_to`"),
                _versions(reader, entries.get("transformers")),
            )
        )
    return tuple(caveats)


def limits(caveats: Sequence[Caveat], environment: Environment) -> list[Limit]:
    """What those of `caveats` say that hold. Raises `MappingError`."""
    found = (caveat.limit(environment) for caveat in caveats)
    return [limit for limit in found if limit is not None]


def in_range(version: str, versions: str) -> bool:
    """Whether `version`, such as `4.45.2` or `5.0.0.dev0`, is one of `versions`."""
    numbers = _numbers(version)
    for sign, bound in _BOUND.findall(versions):
        other = _numbers(bound)
        width = max(len(numbers), len(other))
        left, right = (list(n) + [0] * (width - len(n)) for n in (numbers, other))
        holds = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}
        if not holds[sign]:
            return False
    return True


def _numbers(version: str) -> list[int]:
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version, re.ASCII)
    return [int(part) for part in found[0].split(".")] if found else []


def _versions(reader: Reader, node: Node | None) -> str | None:
    if node is None:
        return None
    text = reader.text(node, "`transformers`")
    parts = [part.strip() for part in text.split(",")]
    if text and not all(_BOUND.fullmatch(part) for part in parts):
        what = f"`{text}` is no range of versions"
        reader.fault(node.line, what, "Write it as in `>=4.38, <5.4`.")
    return ", ".join(parts)


def _may_be_length(value: str | int | float | bool | None) -> bool:
    """Whether a scalar is a length, or an expression, whose faults are told elsewhere."""
    if isinstance(value, bool | float):
        return False
    return not isinstance(value, int) or value > 0
