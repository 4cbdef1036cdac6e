"""Arithmetic and conditions over a config: a whitelist of Python's syntax tree, never run as code.

Allowed are numbers, quoted strings, `true`, `false`, `null`, lists of these, names, dotted names
(`vision.hidden_size`), `+ - * / // %`, comparisons, `in`, `and`, `or`, `not`, parentheses, and the
functions `is_float`, `len`, `max` and `min`. Powers are not, so that numbers stay within 64 bits.

A name that the config does not have is a fault where a number or value is asked for; in a condition
it is null, and so is every part of null: configs leave out what they do not use, as in
`rope_scaling == null or rope_scaling.factor > 1`. Null counts as false, and has no order.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.names import Template, nearest

Environment: TypeAlias = Mapping[str, object]

# Numbers beyond 64 bits are no model's sizes, and Python refuses to print very long ones.
_MAX_MAGNITUDE = 2**63
_MAX_LENGTH = 500
_MAX_DEPTH = 40
_LITERALS = {"true": True, "false": False, "null": None}
_FUNCTIONS = ("is_float", "len", "max", "min")
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ORDER: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.BinOp, ast.BoolOp, ast.Compare, ast.List, ast.UnaryOp, ast.Attribute, ast.Load),
    *(ast.And, ast.Or, ast.Not, ast.USub, ast.UAdd, ast.Eq, ast.NotEq, ast.In, ast.NotIn),
    *_ARITHMETIC,
    *_ORDER,
)


class NoValueError(Exception):
    """Why an expression has no value here; whoever knows its place makes a fault of it."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression, as written, with its place."""

    text: str
    where: str
    tree: ast.expr
    names: frozenset[str]
    """First parts of the names it reads: `vision` for `vision.hidden_size`."""

    def value(self, environment: Environment) -> object:
        """Its value. Raises `MappingError` where it has none."""
        return self._evaluated(environment, absent_is_null=False)

    def integer(self, environment: Environment) -> int:
        """Its value, which must be a whole number of at least 0: a size, a count."""
        value = self.value(environment)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._error(f"is {show(value)}, expected a whole number of at least 0")
        return value

    def condition(self, environment: Environment) -> bool:
        """Whether it holds; names that are not there are null, and null is false."""
        value = self._evaluated(environment, absent_is_null=True)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._error(_not_truth(value))

    def _evaluated(self, environment: Environment, *, absent_is_null: bool) -> object:
        try:
            return _Evaluator(environment, absent_is_null).value(self.tree)
        except NoValueError as wrong:
            raise self._error(str(wrong)) from None

    def _error(self, what: str) -> MappingError:
        return MappingError(f"`{self.text}`: {what}", where=self.where)


def parse_expression(source: str | int | float | bool | None, where: str) -> Expression:
    """The expression that a YAML scalar says; numbers, booleans and null stand for themselves.

    Raises `MappingError` at `where` for anything but the language above.
    """
    if not isinstance(source, str):
        return Expression(show(source), where, ast.Constant(source), frozenset())
    text = source.strip().replace("\n", " ")
    shown = text if len(text) <= 80 else text[:80] + "…"
    if len(text) > _MAX_LENGTH:
        what = f"`{shown}` has {len(text)} characters, an expression may have {_MAX_LENGTH}"
        raise MappingError(what, where=where)
    try:
        # Backslashes make nothing that is needed here, and escapes that Python warns about.
        if "\\" in text:
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise MappingError(f"`{shown}` is not an expression", where=where) from None
    try:
        return Expression(text, where, tree, frozenset(_names(tree)))
    except NoValueError as wrong:
        advice = "Expressions are arithmetic and comparisons over config keys, nothing else."
        raise MappingError(f"`{shown}`: {wrong}", where=where, advice=advice) from None


def _names(tree: ast.expr) -> Iterator[str]:
    """The names of `tree`; raises `NoValueError` at the first thing outside the whitelist."""
    waiting: list[tuple[ast.AST, int]] = [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise NoValueError(f"is nested more than {_MAX_DEPTH} levels deep")
        children: Iterator[ast.AST] = ast.iter_child_nodes(node)
        match node:
            case ast.Constant(value=str() | int() | float() | None):
                continue
            case ast.Constant():
                raise NoValueError("has a literal that is neither a number nor a string")
            case ast.Name(id=name):
                if name not in _LITERALS:
                    yield name
                continue
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if (
                name in _FUNCTIONS
            ):
                children = iter(arguments)
            case ast.Call():
                raise NoValueError(f"the only functions are {', '.join(_FUNCTIONS)}")
            case ast.Attribute(value=value) if not isinstance(value, ast.Name | ast.Attribute):
                raise NoValueError("a dot goes between names only")
            case _ if not isinstance(node, _ALLOWED):
                raise NoValueError(f"{type(node).__name__} is not allowed")
        waiting.extend((child, depth + 1) for child in children)


class _Evaluator:
    """One walk over a whitelisted tree, which calls nothing that a name stands for."""

    def __init__(self, environment: Environment, absent_is_null: bool) -> None:
        self._environment, self._absent_is_null = environment, absent_is_null

    def value(self, node: ast.expr) -> object:
        match node:
            case ast.Constant():
                return _bounded(node.value)
            case ast.Name() if node.id in _LITERALS:
                return _LITERALS[node.id]
            case ast.Name() | ast.Attribute():
                return _bounded(self._lookup(ast.unparse(node)))
            case ast.List():
                return [self.value(item) for item in node.elts]
            case ast.UnaryOp(op=ast.Not()):
                return not self._truth(node.operand)
            case ast.UnaryOp():
                number = self._number(node.operand)
                return -number if isinstance(node.op, ast.USub) else number
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.BoolOp():
                # `or` ends at the first true part, `and` at the first false one.
                ending = isinstance(node.op, ast.Or)
                return any(self._truth(part) is ending for part in node.values) is ending
            case ast.Compare():
                lefts = [node.left, *node.comparators]
                return all(map(self._holds, lefts, node.ops, node.comparators))
            case ast.Call(func=ast.Name(id=name)):
                return self._call(name, node.args)
        raise NoValueError(f"{type(node).__name__} is not allowed")

    def _lookup(self, name: str) -> object:
        value: object = self._environment
        for depth, part in enumerate(name.split(".")):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif self._absent_is_null and (value is None or isinstance(value, Mapping)):
                return None
            else:
                raise NoValueError(_unknown(name, part, value, depth))
        return value

    def _truth(self, node: ast.expr) -> bool:
        value = self.value(node)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise NoValueError(_not_truth(value))

    def _number(self, node: ast.expr) -> int | float:
        value = self.value(node)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise NoValueError(f"`{ast.unparse(node)}` is {show(value)}, expected a number")
        return value

    def _arithmetic(self, node: ast.BinOp) -> object:
        left, right = self._number(node.left), self._number(node.right)
        try:
            return _bounded(_ARITHMETIC[type(node.op)](left, right))
        except ZeroDivisionError:
            raise NoValueError("divides by zero") from None
        except OverflowError:
            raise NoValueError("the result is too large") from None

    def _holds(self, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> bool:
        if isinstance(sign, ast.Eq | ast.NotEq):
            return same(self.value(left), self.value(right)) is isinstance(sign, ast.Eq)
        if isinstance(sign, ast.In | ast.NotIn):
            item, items = self.value(left), self.value(right)
            if not isinstance(items, list | tuple):
                raise NoValueError(f"`in` needs a list, not {show(items)}")
            return any(same(item, other) for other in items) is isinstance(sign, ast.In)
        return _ORDER[type(sign)](self._number(left), self._number(right))

    def _call(self, name: str, arguments: list[ast.expr]) -> object:
        if name in ("min", "max"):
            numbers = [self._number(argument) for argument in arguments]
            return min(numbers) if name == "min" else max(numbers)
        if len(arguments) != 1:
            raise NoValueError(f"`{name}` takes one value")
        value = self.value(arguments[0])
        if name == "is_float":
            return isinstance(value, float)
        if isinstance(value, Mapping | list | tuple):
            return len(value)
        raise NoValueError(f"`len` needs a list or table, not {show(value)}")


def _bounded(value: object) -> object:
    if isinstance(value, int | float) and not abs(value) <= _MAX_MAGNITUDE:
        raise NoValueError("a number in it is not finite or beyond 64 bits")
    return value


def _not_truth(value: object) -> str:
    return f"{show(value)} is neither true nor false"


def _unknown(name: str, part: str, value: object, depth: int) -> str:
    """Says that `name` is not known because `part` is not in `value`, and what is."""
    if not isinstance(value, Mapping):
        return f"`{name}` has no part `{part}`"
    keys = sorted(str(key) for key in value)
    near = nearest(part, keys)
    listed = ", ".join(keys[:20]) + (", …" if len(keys) > 20 else "")
    kind = "a known name" if depth == 0 else "there"
    meant = f"; did you mean `{near}`?" if near else "."
    return f"`{name}` is not {kind}{meant} Known: {listed or 'none'}"


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
    if isinstance(value, int) and abs(value) > _MAX_MAGNITUDE:
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
    containers = [isinstance(value, Mapping | list | tuple) for value in (left, right)]
    if all(containers):
        raise NoValueError("lists and tables are not compared")
    return not any(containers) and left == right
