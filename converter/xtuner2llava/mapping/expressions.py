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
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeAlias

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.names import TextTemplate, nearest

Environment: TypeAlias = Mapping[str, object]

# No size of a model is beyond 64 bits, and Python refuses to print very long numbers.
_MAX_MAGNITUDE = 2**63
_MAX_LENGTH = 500
_MAX_DEPTH = 40
_LITERALS = {"true": True, "false": False, "null": None}
# A number that goes on as a word, as in `1or 2`: Python takes it for two, and warns.
_NUMBER_AND_WORD = re.compile(r"(?<!\w)[0-9][\w.]*?(and|else|for|i[fns]|not|or)\b", re.ASCII)
_MAX_SHOWN = 80


class NoValueError(Exception):
    """Why an expression has no value; the caller that knows its place makes it a fault."""


class _Scope(NamedTuple):
    """The names that an expression knows, and whether others are null or faults."""

    environment: Environment
    absent_is_null: bool

    def find(self, container: object, key: str, node: ast.expr) -> object:
        """The value of `key` in `container`, which `node` asks for."""
        if isinstance(container, Mapping) and key in container:
            return _bounded(container[key])
        if self.absent_is_null and (container is None or isinstance(container, Mapping)):
            return None
        if not isinstance(container, Mapping):
            raise NoValueError(f"`{ast.unparse(node)}` has no part `{key}`")
        keys = sorted(map(str, container))
        near = nearest(key, keys)
        meant = f"; did you mean `{near}`?" if near else "."
        known = ", ".join(keys[:20]) + (", …" if len(keys) > 20 else "") or "none"
        kind = "a known name" if container is self.environment else "there"
        raise NoValueError(f"`{ast.unparse(node)}` is not {kind}{meant} Known: {known}")


# A part of an expression, as a function.
_Part: TypeAlias = Callable[[_Scope], object]


def _truth(value: object) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise NoValueError(f"{show(value)} is neither true nor false")


def _is_in(value: object, values: object) -> bool:
    if not isinstance(values, list | tuple):
        raise NoValueError(f"`in` needs a list, not {show(values)}")
    return any(same(value, one) for one in values)


def _length(value: object) -> int:
    if not isinstance(value, Mapping | list | tuple):
        raise NoValueError(f"`len` needs a list or table, not {show(value)}")
    return len(value)


_OF_NUMBERS: Mapping[type[ast.AST] | str, Callable[..., object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    "min": lambda *numbers: min(numbers),
    "max": lambda *numbers: max(numbers),
}
_OPERATIONS: Mapping[type[ast.AST] | str, Callable[..., object]] = {
    **_OF_NUMBERS,
    ast.List: lambda *items: [*items],
    ast.Not: lambda value: not _truth(value),
    ast.Eq: lambda left, right: same(left, right),
    ast.NotEq: lambda left, right: not same(left, right),
    ast.In: _is_in,
    ast.NotIn: lambda value, values: not _is_in(value, values),
    "is_float": lambda value: isinstance(value, float),
    "len": _length,
}
_FUNCTIONS = ("is_float", "len", "max", "min")


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression, as written, with its place."""

    text: str
    where: str
    names: frozenset[str]
    """First parts of the names it reads: `vision` for `vision.hidden_size`."""
    compute: _Part

    def value(
        self,
        environment: Environment,
        convert: Callable[[object], object] = lambda value: value,
        absent_is_null: bool = False,
    ) -> object:
        """Its value, through `convert`. Raises `MappingError` where it has none."""
        try:
            return convert(self.compute(_Scope(environment, absent_is_null)))
        except NoValueError as wrong:
            raise MappingError(f"`{self.text}`: {wrong}", where=self.where) from None

    def integer(self, environment: Environment) -> int:
        """Its value, which must be a whole number of at least 0: a size, a count."""
        value = self.value(environment, _size)
        assert isinstance(value, int)  # noqa: S101
        return value

    def condition(self, environment: Environment) -> bool:
        """Whether it holds; names that are not there are null, and null is false."""
        return bool(self.value(environment, _truth, absent_is_null=True))


def parse_expression(source: str | int | float | bool | None, where: str) -> Expression:
    """The expression in a YAML scalar; numbers, booleans and null stand for themselves.

    Raises `MappingError` at `where` for anything but the language above.
    """
    text = source.strip().replace("\n", " ") if isinstance(source, str) else show(source)
    shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
    if len(text) > _MAX_LENGTH:
        what = f"`{shown}` has {len(text)} characters, an expression may have {_MAX_LENGTH}"
        raise MappingError(what, where=where)
    names: set[str] = set()
    try:
        # Backslashes make nothing that is needed here, and escapes that Python warns about.
        if "\\" in text or _NUMBER_AND_WORD.search(text):
            raise ValueError
        is_text = isinstance(source, str)
        tree = ast.parse(text, mode="eval").body if is_text else ast.Constant(source)
        compute = _compile(tree, names)
        return Expression(text, where, frozenset(names), compute)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise MappingError(f"`{shown}` is not an expression", where=where) from None
    except NoValueError as wrong:
        advice = "Expressions are arithmetic and comparisons over config keys, nothing else."
        raise MappingError(f"`{shown}`: {wrong}", where=where, advice=advice) from None


def _compile(node: ast.expr, names: set[str], depth: int = 1) -> _Part:
    """`node` as a function of a scope; adds to `names` the first parts of the names in it.

    Raises `NoValueError` for all syntax that is not listed here.
    """
    if depth > _MAX_DEPTH:
        raise NoValueError(f"is nested more than {_MAX_DEPTH} levels deep")
    match node:
        case ast.Constant(value=str() | int() | float() | None as constant):
            _bounded(constant)
            return lambda scope: constant
        case ast.Constant():
            raise NoValueError("has a literal that is neither a number nor a string")
        case ast.Name(id=name) if name in _LITERALS:
            return lambda scope: _LITERALS[name]
        case ast.Name(id=name):
            names.add(name)
            return lambda scope: scope.find(scope.environment, name, node)
        case ast.Attribute(value=ast.Name() | ast.Attribute() as owner, attr=name):
            container = _compile(owner, names, depth + 1)
            return lambda scope: scope.find(container(scope), name, node)
        case ast.Attribute():
            raise NoValueError("a dot goes between names only")
        case ast.BoolOp(op=word, values=values):
            # `or` ends at the first true part, `and` at the first false one.
            parts = [_compile(value, names, depth + 1) for value in values]
            ending = isinstance(word, ast.Or)
            return lambda scope: any(_truth(part(scope)) is ending for part in parts) is ending
        case ast.Compare(left=left, ops=[_, _, *_] as signs, comparators=rights):
            pairs = zip([left, *rights], signs, rights, strict=False)
            links: list[ast.expr] = [ast.Compare(one, [sign], [two]) for one, sign, two in pairs]
            return _compile(ast.BoolOp(ast.And(), links), names, depth)
        case ast.List(elts=operands):
            return _operation(ast.List, operands, names, depth + 1)
        case ast.UnaryOp(op=sign, operand=operand):
            return _operation(type(sign), [operand], names, depth + 1)
        case (
            ast.BinOp(left=left, op=sign, right=right)
            | ast.Compare(left=left, ops=[sign], comparators=[right])
        ):
            return _operation(type(sign), [left, right], names, depth + 1)
        case ast.Call(func=ast.Name(id=name), args=[_, *more] as operands, keywords=[]) if (
            name in _FUNCTIONS
        ):
            if more and name not in _OF_NUMBERS:
                raise NoValueError(f"`{name}` takes one value")
            return _operation(name, operands, names, depth + 1)
        case ast.Call():
            raise NoValueError(f"the only functions are {', '.join(_FUNCTIONS)}")
    raise NoValueError(f"{type(node).__name__} is not allowed")


def _operation(
    kind: type[ast.AST] | str, operands: Sequence[ast.expr], names: set[str], depth: int
) -> _Part:
    if kind not in _OPERATIONS:
        raise NoValueError(f"{getattr(kind, '__name__', kind)} is not allowed")
    parts = [_compile(operand, names, depth) for operand in operands]

    def compute(scope: _Scope) -> object:
        values = [part(scope) for part in parts]
        for operand, value in zip(operands, values, strict=True) if kind in _OF_NUMBERS else ():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise NoValueError(f"`{ast.unparse(operand)}` is {show(value)}, expected a number")
        try:
            return _bounded(_OPERATIONS[kind](*values))
        except ZeroDivisionError:
            raise NoValueError("divides by zero") from None
        except OverflowError:
            raise NoValueError("the result is too large") from None

    return compute


def _size(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        return _size(int(value))
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NoValueError(f"is {show(value)}, expected a whole number of at least 0")
    return value


def _bounded(value: object) -> object:
    if isinstance(value, int | float) and not abs(value) <= _MAX_MAGNITUDE:
        raise NoValueError("a number in it is not finite or beyond 64 bits")
    return value


def equality(name: str, value: object, where: str) -> Expression:
    """That a key, or a part such as `rope.type`, has a value; one that is not there is null."""
    names = frozenset([name.partition(".")[0]])
    text = f"{name} == {show(value)}"
    return Expression(text, where, names, lambda s: same(_lookup(s.environment, name), value))


def say(template: TextTemplate, environment: Environment) -> str:
    """A text for people, with the values of the config in its placeholders."""
    return template.render({k: visible(_lookup(environment, k)) for k in template.variables})


def visible(value: object) -> str:
    """A text as it is, if it is short and on one line; else, and all others, as `show` has it."""
    plain = isinstance(value, str) and len(value) <= _MAX_SHOWN and value.isprintable()
    return str(value) if plain else show(value)


def _lookup(value: object, name: str) -> object:
    """The value of a dotted name; null where it, or what it is part of, is not there."""
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def show(value: object, inside: bool = False) -> str:
    """A value as YAML spells it, cut to a readable length; `inside` a list or table."""
    match value:
        case None | bool():
            text = "null" if value is None else str(value).lower()
        case str():
            text = repr(value[:_MAX_SHOWN])
        case int() if abs(value) > _MAX_MAGNITUDE:
            text = "an enormous number"
        case int() | float():
            text = str(value)
        case Mapping() if not inside:
            pairs = (f"{key}: {show(value[key], True)}" for key in islice(value, 8))
            text = "{" + ", ".join(pairs) + "}"
        case list() | tuple() if not inside:
            text = "[" + ", ".join(show(item, True) for item in value[:8]) + "]"
        case _:
            text = "…"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


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
