"""What a mapping says about config keys: `keep`, `derive`, `set`, and `default` for the source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from xtuner2llava.errors import Fault, MappingError
from xtuner2llava.mapping.caveats import Requirement, read_requirements
from xtuner2llava.mapping.expressions import Environment, Expression
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Node, Scalar


@dataclass(frozen=True, slots=True)
class Key:
    """How one key of the target's config comes about.

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

    keys: Mapping[str, Key] = field(default_factory=dict)
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
            {**self.nest, **child.nest},
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


def read_config_rules(reader: Reader, node: Node | None, allowed: Collection[str]) -> ConfigRules:
    """The `config` table, which has the keys `allowed`; a key is made in one way only."""
    table = reader.table(node, "`config`")
    reader.keys(table, allowed, "`config`")
    kept, derived, constants, default, nest = (
        table.entries.get(key) for key in ("keep", "derive", "set", "default", "nest")
    )
    keys: dict[str, Key] = {}

    def add(name: str, line: int, key: Key) -> None:
        if name in keys:
            reader.fault(line, f"`{name}` is already made by {keys[name].where}")
        keys.setdefault(name, key)

    keep_all = isinstance(kept, Scalar) and kept.value == "all"
    if not keep_all:
        for item in reader.items(kept, "`keep`, if it is not `all`,"):
            name = reader.text(item, "a config key")
            reader.names_read.add(name)
            add(name, item.line, Key(reader.where(item.line), keep=True))
    for name, line, value in reader.entries(derived, "`derive`"):
        add(name, line, Key(reader.where(line), derive=reader.expression(value, f"`{name}`")))
    for name, line, value in reader.entries(constants, "`set`"):
        add(name, line, Key(reader.where(line), value=reader.constant(value)))
    values = {key: reader.constant(n) for key, _, n in reader.entries(default, "`default`")}
    reader.names_read.update(values)
    requirements = read_requirements(reader, table.entries.get("require"))
    return ConfigRules(
        keys, values, keep_all, requirements, read_texts(reader, nest, "`nest`", ("llm", "vision"))
    )


def read_texts(
    reader: Reader, node: Node | None, what: str, allowed: Collection[str]
) -> dict[str, str]:
    """A table of texts with the keys `allowed`."""
    reader.keys(reader.table(node, what), allowed, what)
    return {key: reader.text(value, f"`{key}`") for key, _, value in reader.entries(node, what)}
