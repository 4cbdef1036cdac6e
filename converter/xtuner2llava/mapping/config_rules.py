"""What a mapping says about config keys: `keep`, `derive`, `set`, and `default` for the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.errors import Fault, MappingError
from xtuner2llava.mapping.expression import Expression
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.values import Environment
from xtuner2llava.mapping.yaml import Scalar, Table


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

    keys: Mapping[str, Key]
    default: Mapping[str, object]
    keep_all: bool = False

    def under(self, child: ConfigRules) -> ConfigRules:
        """These rules where the file that extends this one has none of its own."""
        return ConfigRules(
            {**self.keys, **child.keys},
            {**self.default, **child.default},
            self.keep_all or child.keep_all,
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


def read_config_rules(reader: Reader, table: Table) -> ConfigRules:
    """`keep`, `derive`, `set` and `default` of a `config` table; a key is made in one way only."""
    keys: dict[str, Key] = {}

    def add(name: str, line: int, key: Key) -> None:
        if name in keys:
            reader.fault(line, f"`{name}` is already made by {keys[name].where}")
        keys.setdefault(name, key)

    kept = table.entries.get("keep")
    keep_all = isinstance(kept, Scalar) and kept.value == "all"
    if not keep_all:
        for node in reader.items(kept, "`keep`, if it is not `all`,"):
            name = reader.text(node, "a config key")
            reader.names_read.add(name)
            add(name, node.line, Key(reader.where(node.line), keep=True))
    derived = reader.table(table.entries.get("derive"), "`derive`")
    for name, expression in reader.formulas(table.entries.get("derive"), "`derive`"):
        line = derived.lines[name]
        add(name, line, Key(reader.where(line), derive=expression))
    for name, line, value in reader.constants(table.entries.get("set"), "`set`"):
        add(name, line, Key(reader.where(line), value=value))
    default = {k: v for k, _, v in reader.constants(table.entries.get("default"), "`default`")}
    reader.names_read.update(default)
    return ConfigRules(keys, default, keep_all)
