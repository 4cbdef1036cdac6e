"""Values that a target can express; where another is found, the conversion is refused and told why.

Written as a table, `require: {no_bias: true}`, or as a list of `{that: expression, because: text}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xtuner2llava.errors import Fault, MappingError
from xtuner2llava.mapping.expression import Expression
from xtuner2llava.mapping.names import Template
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.values import Environment, lookup, same, say, show
from xtuner2llava.mapping.yaml import Items, Node, Scalar


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


@dataclass(frozen=True, slots=True)
class Condition:
    """An expression must hold; `because` says to people why, with the config's values in it."""

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
        return Fault(
            self.where,
            say(self.because, environment),
            f"Expected `{self.that.text}`; here {found}.",
        )


Requirement = Equality | Condition


def read_requirements(reader: Reader, node: Node | None) -> tuple[Requirement, ...]:
    found: list[Requirement] = []
    if not isinstance(node, Items):
        table = reader.table(node, "`require`")
        for key, value in table.entries.items():
            line = table.lines[key]
            reader.names_read.add(key.partition(".")[0])
            if isinstance(value, Scalar):
                found.append(Equality(reader.where(line), key, value.value))
            else:
                what = f"`{key}`: a required value is a number, a text, true, false or null"
                reader.fault(value.line, what, "Conditions are a list of `that` and `because`.")
        return tuple(found)
    for item in node.values:
        entry = reader.table(item, "a requirement")
        reader.keys(entry, ("that", "because"), "a requirement")
        that = reader.required(entry, "that", "a requirement")
        because = reader.required(entry, "because", "a requirement")
        if that is not None and because is not None:
            where = reader.where(entry.line)
            expression = reader.expression(that, "`that`")
            found.append(Condition(where, expression, reader.sentence(because, "`because`")))
    return tuple(found)


def failures(requirements: Sequence[Requirement], environment: Environment) -> list[Fault]:
    """A fault for each requirement that does not hold."""
    faults = (requirement.fault(environment) for requirement in requirements)
    return [fault for fault in faults if fault is not None]
