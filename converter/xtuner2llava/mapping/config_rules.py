"""What a mapping says about config keys: how they are made, and what a config must be."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeAlias

from xtuner2llava.errors import Fault, MappingError
from xtuner2llava.mapping.expressions import Environment, Expression, equality, say, show
from xtuner2llava.mapping.names import TextTemplate
from xtuner2llava.mapping.schema import ABSENT, Reader
from xtuner2llava.mapping.yaml import Node


@dataclass(frozen=True, slots=True)
class Requirement:
    """An expression must hold; `because` says to people why, with the config's values in it."""

    TITLE: ClassVar = "a requirement"
    where: str
    that: Expression
    because: TextTemplate

    def fault(self, environment: Environment) -> Fault | None:
        """Why it does not hold. An expression that has no value does not."""
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


def read_requirements(reader: Reader, node: Node) -> tuple[Requirement, ...]:
    """Those of a table, as in `{no_bias: true}`, or of a list of `that` and `because`."""
    if isinstance(node.value, list):
        return tuple(reader.value(tuple[Requirement, ...], node, "`require`"))
    found = []
    for key, value in reader.table(node, "`require`").items():
        that = equality(key, value.data, reader.where(value.key_line))
        reader.names_read |= that.names
        if isinstance(value.value, list | dict):
            what = f"`{key}`: a required value is a number, a text, true, false or null"
            reader.fault(value.line, what, "Conditions are a list of `that` and `because`.")
        because = f"`{key}` has a value that cannot be expressed"
        found.append(Requirement(that.where, that, TextTemplate(because, (because,))))
    return tuple(found)


Requirements: TypeAlias = Annotated[tuple[Requirement, ...], read_requirements]


def failures(requirements: Sequence[Requirement], environment: Environment) -> list[Fault]:
    """A fault for each requirement that does not hold."""
    faults = (requirement.fault(environment) for requirement in requirements)
    return [fault for fault in faults if fault is not None]


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """How one key of the target's config is made.

    With `derive` it is the value of the expression; with `keep`, that of the same key of the
    source, if it is there; else the constant `value`.
    """

    where: str
    derive: Expression | None = None
    keep: bool = False
    value: object = None


@dataclass(frozen=True, slots=True)
class ConfigRules:
    """The keys that are made, by name; `keep_all` keeps all others that the target has."""

    keys: Mapping[str, ConfigKey] = field(default_factory=dict)
    default: Mapping[str, object] = field(default_factory=dict)
    keep_all: bool = False
    requirements: tuple[Requirement, ...] = ()
    nest: Mapping[str, str] = field(default_factory=dict)

    def under(self, child: ConfigRules) -> ConfigRules:
        """These rules where the file that extends this one has none of its own."""
        return ConfigRules(
            {**self.keys, **child.keys},
            {**self.default, **child.default},
            self.keep_all or child.keep_all,
            (*self.requirements, *child.requirements),
        )

    def make(self, environment: Environment, faults: list[Fault]) -> dict[str, object]:
        """The keys and their values; an expression without value adds to `faults`."""
        values: dict[str, object] = {}
        for name, key in self.keys.items():
            if key.derive is not None:
                try:
                    values[name] = key.derive.value(environment)
                except MappingError as error:
                    faults.extend(error.faults)
            elif not key.keep:
                values[name] = key.value
            elif name in environment:
                values[name] = environment[name]
        return values


def read_config_rules(reader: Reader, node: Node, allowed: Collection[str]) -> ConfigRules:
    """The `config` table, which has the keys `allowed`; a key is made in one way only."""
    table = reader.table(node, "`config`", allowed)
    keys: dict[str, ConfigKey] = {}

    def add(name: str, line: int, **made: Any) -> None:
        if name in keys:
            reader.fault(line, f"`{name}` is already made by {keys[name].where}")
        keys.setdefault(name, ConfigKey(reader.where(line), **made))

    def entries(key: str) -> Iterable[tuple[str, Node]]:
        return reader.table(table.get(key, ABSENT), f"`{key}`").items()

    kept = table.get("keep", ABSENT)
    if kept.value != "all":
        for item in reader.plain(list, kept, "`keep`, if it is not `all`,"):
            add(reader.plain(str, item, "a config key"), item.line, keep=True)
    reader.names_read.update(keys)
    for name, value in entries("derive"):
        add(name, value.key_line, derive=reader.expression(value, f"`{name}`"))
    for name, value in entries("set"):
        add(name, value.key_line, value=value.data)
    default = {name: value.data for name, value in entries("default")}
    reader.names_read.update(default)
    requirements = read_requirements(reader, table.get("require", ABSENT))
    nest = reader.texts(table.get("nest", ABSENT), "`nest`", ("llm", "vision"))
    return ConfigRules(keys, default, kept.value == "all", requirements, nest)
