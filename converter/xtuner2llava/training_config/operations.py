"""What operators, functions and methods give, for values that are known, with bounded results."""

from __future__ import annotations

import ast
import operator
import posixpath
import re
from collections.abc import Callable
from typing import Any

from xtuner2llava.training_config.names import Names
from xtuner2llava.training_config.values import (
    Key,
    Reference,
    Table,
    Unknown,
    UnreadableError,
    Value,
    is_scalar,
    known,
    limit,
    scalar,
)

_BITS_LIMIT = 1024
_NUMBER_LIMIT = 100  # characters; int() of a long text takes quadratic time
_DIGITS_LIMIT = 100
_FORMAT = re.compile(r"[<>^]?[+ ]?0?\d{0,2},?(\.\d{1,2})?[bdeEfFgGnsxX%]?", re.ASCII)
_CONVERSIONS: dict[int, Callable[[Key], Key]] = {
    -1: lambda value: value,
    ord("a"): ascii,
    ord("r"): repr,
    ord("s"): str,
}
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_NUMBER, _SCALAR = (int, float), (type(None), int, float, str)
_LISTS, _SIZED = (list, tuple), (str, list, tuple, frozenset, Table)
# By the name that a config calls, or the full path of what it imported: what computes it, and the
# types that its arguments may have. `dict` and `print` take any.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[type, ...]]] = {
    "abs": (abs, _NUMBER),
    "bool": (bool, _SCALAR),
    "float": (float, (int, float, str)),
    "int": (int, (int, float, str)),
    "len": (len, _SIZED),
    "list": (list, _LISTS),
    "max": (max, _NUMBER),
    "min": (min, _NUMBER),
    "os.path.join": (posixpath.join, (str,)),
    "round": (round, _NUMBER),
    "str": (str, _SCALAR),
    "tuple": (tuple, _LISTS),
}
_DICTS = frozenset({"dict", "mmengine.ConfigDict", "mmengine.config.ConfigDict"})
FUNCTIONS = frozenset({*_DICTS, "print", *_FUNCTIONS})
METHODS = frozenset(
    {(Table, name) for name in (".copy", ".get", ".update")}
    | {(list, name) for name in (".append", ".copy", ".extend")}
)
MUTATORS = frozenset({".append", ".extend", ".update"})


class Operations:
    """Every result is counted by `names` before it is made.

    What cannot be computed raises `UnreadableError`, or what Python raises for it.
    """

    def __init__(self, names: Names) -> None:
        self._names = names

    def function(self, name: str, positional: list[Value], named: Table) -> Value:
        """One of `FUNCTIONS`."""
        if name == "print":
            return None
        if name in _DICTS:
            table = Table()
            self._update(table, positional, named)
            return table
        compute, types = _FUNCTIONS[name]
        values = [known(value) for value in positional]
        if named or not all(isinstance(value, types) for value in values):
            raise UnreadableError(f"{name}() of these values is not read")
        for value in values:
            if isinstance(value, (str, *_LISTS)):
                self._names.make(len(value))
                if isinstance(value, str) and name in ("int", "float"):
                    limit(len(value), _NUMBER_LIMIT)
        if name in ("int", "round") and len(values) == 2:
            limit(abs(_integer(values[1])), _DIGITS_LIMIT)
        result: Value = compute(*values)
        return result

    def method(self, base: Value, name: str, positional: list[Value], named: Table) -> Value:
        """One of `METHODS`."""
        match base, name, positional:
            case Table(), ".update", _:
                self._update(base, positional, named)
                return None
            case _ if named:
                pass
            case Table(), ".copy", []:
                return self.function("dict", [base], named)
            case Table(), ".get", [key, *default] if len(default) < 2:
                return base.get(scalar(key), known(default[0]) if default else None)
            case list(), ".copy", []:
                return self.function("list", [base], named)
            case list(), ".append", [item]:
                base.append(item)
                return None
            case list(), ".extend", [items]:
                self.extend(base, items)
                return None
        raise UnreadableError(f"{name[1:]}() with these arguments is not read")

    def _update(self, table: Table, positional: list[Value], named: Table) -> None:
        if len(positional) > 1:
            raise UnreadableError("a dict was expected")
        for other in (*positional, named):
            self.merge(table, other)

    def merge(self, table: Table, other: Value) -> None:
        """`table.update(other)`."""
        if not isinstance(other := known(other), Table):
            raise UnreadableError("a dict was expected")
        self._names.make(len(other))
        table.merge(other)

    def extend(self, items: list[Value], more: Value) -> None:
        """`items.extend(more)`."""
        if not isinstance(more := known(more), (list, tuple)):
            raise UnreadableError("a list was expected")
        self._names.make(len(items) + len(more))
        items.extend(more)

    def combine(self, op: ast.operator, left: Value, right: Value) -> Value:
        """`left op right` with bounded results; raises what arithmetic raises, or Unreadable."""
        left, right = known(left), known(right)
        compute = _OPERATORS.get(type(op))
        if compute and isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
                limit(left.bit_length() * abs(right), _BITS_LIMIT)
            return self.bounded(compute(left, right))
        if isinstance(op, ast.Mult) and isinstance(left, int):
            left, right = right, left
        if isinstance(left, (str, list, tuple)):
            if isinstance(op, ast.Mult) and isinstance(right, int):
                self._names.make(len(left) * max(right, 0))
                return left * right
            if isinstance(op, ast.Add) and isinstance(right, type(left)):
                self._names.make(len(left) + len(right))
                joined: Value = operator.add(left, right)
                return joined
        raise UnreadableError(f"{type(op).__name__} of these values is not read")

    def holds(self, left: Value, op: ast.cmpop, right: Value) -> bool:
        """Whether `left op right`."""
        left, right = known(left), known(right)
        positive = isinstance(op, (ast.Is, ast.In))
        if isinstance(op, (ast.Is, ast.IsNot)) and (left is None or right is None):
            return (left is right) is positive
        if isinstance(op, (ast.In, ast.NotIn)) and is_scalar(left):
            if isinstance(left, str) and isinstance(right, str):
                self._names.make(len(right))
                return (left in right) is positive
            if isinstance(right, (list, tuple, frozenset, Table)):
                self._names.spend(len(right))
                if all(map(is_scalar, right)):
                    return (left in list(right)) is positive
        elif type(op) in _OPERATORS and is_scalar(left) and is_scalar(right):
            if isinstance(left, str) and isinstance(right, str):
                self._names.spend(min(len(left), len(right)))
            return bool(_OPERATORS[type(op)](left, right))
        raise UnreadableError("this comparison is not read")

    def sign(self, op: ast.unaryop, value: Value) -> int | float:
        """`+value`, `-value` or `~value`; `not` is not arithmetic."""
        if not isinstance(value, _NUMBER):
            raise UnreadableError("this sign is not read")
        return self.bounded(_OPERATORS[type(op)](value))

    def formatted(self, value: Value, conversion: int, spec: Value) -> str:
        """One `{value!conversion:spec}` of an f-string."""
        value = scalar(value)
        if not isinstance(spec, str) or not _FORMAT.fullmatch(spec):
            raise UnreadableError("this format is not read")
        if isinstance(value, str):
            self._names.make(len(value))
        return format(_CONVERSIONS[conversion](value), spec)

    def item(self, container: Value, key: Value) -> Value:
        """`container[key]`."""
        container, key = known(container), known(key)
        if isinstance(container, Table) and is_scalar(key):
            if key not in container:
                raise UnreadableError("the dict has no such key")
            return container[key]
        if isinstance(container, (list, tuple, str)) and isinstance(key, int):
            return container[key]
        if isinstance(container, Reference) and isinstance(key, str):
            # A ConfigDict, whose keys are its attributes (xtuner/utils/templates.py).
            self._names.spend(len(key))
            if container.path.endswith(".PROMPT_TEMPLATE") and key.isidentifier():
                return self.attribute(container, key)
            raise UnreadableError(f"an item of `{container.path[:80]}` is not read")
        raise UnreadableError("this index is not read")

    def cut(self, container: Value, bounds: list[Value]) -> Value:
        """`container[start:stop:step]`."""
        indices = [b for b in map(known, bounds) if b is None or isinstance(b, int)]
        container = known(container)
        if len(indices) < len(bounds) or not isinstance(container, (str, list, tuple)):
            raise UnreadableError("this slice is not read")
        self._names.make(len(container))
        return container[slice(*indices)]

    def attribute(self, value: Value, name: str) -> Value:
        """`value.name`."""
        value = known(value)
        if isinstance(value, Reference):
            self._names.spend(len(value.path) + len(name))
            return Reference(f"{value.path}.{name}")
        if isinstance(value, Table) and name in value:
            return value[name]
        raise UnreadableError(f"`.{name[:80]}` of this value is not read")

    def bounded(self, number: object) -> int | float:
        """A result that is a number of a size that a config may need."""
        if isinstance(number, int):
            limit(number.bit_length(), _BITS_LIMIT)
        if isinstance(number, (int, float)):
            return number
        raise UnreadableError("its result is not read")


def truth(value: Value, line: int) -> bool:
    """What `if value` does on that line."""
    value = known(value)
    if isinstance(value, Reference):
        raise UnreadableError(Unknown(f"it depends on `{value.path[:80]}`", line))
    return bool(value)


def _integer(value: Value) -> int:
    if isinstance(value, int):
        return value
    raise UnreadableError("an integer was expected")
