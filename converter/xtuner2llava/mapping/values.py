"""Config values: looked up by dotted name, compared, and shown to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from xtuner2llava.mapping.names import Template

Environment: TypeAlias = Mapping[str, object]

# Numbers beyond 64 bits are nobody's sizes, and Python refuses to print very long ones.
MAX_MAGNITUDE = 2**63


class NoValueError(Exception):
    """Why an expression has no value here; whoever knows its place makes a fault of it."""


def lookup(environment: Environment, name: str) -> object:
    """The value of a dotted name; null where it, or what it is part of, is not there."""
    value: object = environment
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def say(template: Template, environment: Environment) -> str:
    """A text for people, with the config's values in its placeholders."""
    values = {name: lookup(environment, name) for name in template.variables}
    return template.render(
        {name: value if isinstance(value, str) else show(value) for name, value in values.items()}
    )


def show(value: object) -> str:
    """A value as YAML spells it, cut to a readable length."""
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {_brief(value[key])}" for key in [*value][:8]) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(_brief(item) for item in value[:8]) + "]"
    else:
        text = _brief(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _brief(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) > MAX_MAGNITUDE:
        return "an enormous number"
    if isinstance(value, str):
        return repr(value[:80])
    return str(value) if isinstance(value, int | float) else "…"


def same(left: object, right: object) -> bool:
    """Whether two scalars are equal; true is not 1, null equals only null.

    Raises `NoValueError` for two lists or two tables, which are not compared.
    """
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, Mapping | list | tuple) and isinstance(right, Mapping | list | tuple):
        raise NoValueError("lists and tables are not compared")
    if isinstance(left, Mapping | list | tuple) or isinstance(right, Mapping | list | tuple):
        return False
    return left == right
