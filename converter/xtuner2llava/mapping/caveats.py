"""What a target cannot be, and what may differ in it: requirements, caveats and their limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xtuner2llava.errors import Fault, MappingError
from xtuner2llava.mapping.expressions import Environment, Expression, lookup, same, say, show
from xtuner2llava.mapping.names import Template
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Items, Node, Scalar

_BOUND = re.compile(r"(<=|>=|<|>) ?([0-9]{1,4}(?:\.[0-9]{1,4}){0,3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Equality:
    """A config key must have one value; a key that is not there is null."""

    where: str
    key: str
    expected: str | int | float | bool | None

    def fault(self, environment: Environment) -> Fault | None:
        found = lookup(environment, self.key)
        if same(found, self.expected):
            return None
        what = f"`{self.key}` is {show(found)}, only {show(self.expected)} can be expressed"
        return Fault(self.where, what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """An expression must hold; `because` says to people why, with the config's values in it."""

    TITLE: ClassVar = "a requirement"
    where: str
    that: Expression
    because: Template

    def fault(self, environment: Environment) -> Fault | None:
        try:
            if self.that.condition(environment):
                return None
        except MappingError as error:
            return error.faults[0]
        found = ", ".join(
            f"{name} is {show(environment.get(name))}" for name in sorted(self.that.names)
        )
        expected = f"Expected `{self.that.text}`; here {found}."
        return Fault(self.where, say(self.because, environment), expected)


Requirement = Equality | Condition


def read_requirements(reader: Reader, node: Node | None) -> tuple[Requirement, ...]:
    """Those of a table, as in `{no_bias: true}`, or of a list of `that` and `because`."""
    if isinstance(node, Items):
        found: tuple[Requirement, ...] = reader.value(tuple[Condition, ...], node, "`require`")
        return found
    equalities = []
    for key, line, value in reader.entries(node, "`require`"):
        reader.names_read.add(key.partition(".")[0])
        if isinstance(value, Scalar):
            equalities.append(Equality(reader.where(line), key, value.value))
        else:
            what = f"`{key}`: a required value is a number, a text, true, false or null"
            reader.fault(value.line, what, "Conditions are a list of `that` and `because`.")
    return tuple(equalities)


def failures(requirements: Sequence[Requirement], environment: Environment) -> list[Fault]:
    """A fault for each requirement that does not hold."""
    faults = (requirement.fault(environment) for requirement in requirements)
    return [fault for fault in faults if fault is not None]


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
            "`verify OUT --reference FILE.npz` compares them with the trained model's.",
            if_right=what,
        )

    @property
    def is_bounded(self) -> bool:
        """Whether anything is exact."""
        return not (self.tokens is None and self.transformers is None and self.if_right is None)


def _read_length(reader: Reader, node: Node) -> Expression:
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, int | float) and (isinstance(value, bool | float) or value <= 0):
        what = f"`exact_up_to` is {show(value)}, a number of tokens was expected"
        reader.fault(node.line, what)
    return reader.expression(node, "`exact_up_to`")


def _read_versions(reader: Reader, node: Node) -> str:
    text = reader.text(node, "`transformers`")
    parts = [part.strip() for part in text.split(",")]
    if text and not all(_BOUND.fullmatch(part) for part in parts):
        what = f"`{text}` is not a range of versions"
        reader.fault(node.line, what, "Write it as in `>=4.38, <5.4`.")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caveat:
    """What may differ after the conversion, under a condition on a config."""

    TITLE: ClassVar = "a caveat"
    where: str
    when: Expression | None = None
    say: Template
    exact_up_to: Annotated[Expression | None, _read_length] = None
    transformers: Annotated[str | None, _read_versions] = None

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
