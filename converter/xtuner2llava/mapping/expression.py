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
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.evaluation import (
    ARITHMETIC,
    EQUALITY,
    FUNCTIONS,
    LITERALS,
    MEMBERSHIP,
    ORDER,
    Evaluation,
    truth,
)
from xtuner2llava.mapping.values import Environment, NoValueError, show

_MAX_LENGTH = 500
_MAX_DEPTH = 40
_STRUCTURE = (
    ast.BinOp,
    ast.BoolOp,
    ast.Compare,
    ast.Constant,
    ast.List,
    ast.Name,
    ast.Attribute,
    ast.UnaryOp,
    ast.Call,
)
_OPERATORS = (
    *ARITHMETIC,
    *ORDER,
    *EQUALITY,
    *MEMBERSHIP,
    ast.And,
    ast.Or,
    ast.Not,
    ast.USub,
    ast.UAdd,
    ast.Load,
)


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
        return self._guarded(environment, absent_is_null=False)

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
        value = self._guarded(environment, absent_is_null=True)
        try:
            return truth(value)
        except NoValueError as wrong:
            raise self._error(str(wrong)) from None

    def _guarded(self, environment: Environment, *, absent_is_null: bool) -> object:
        try:
            return Evaluation(environment, absent_is_null).of(self.tree)
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
        names = frozenset(_names(tree))
    except NoValueError as wrong:
        advice = "Expressions are arithmetic and comparisons over config keys, nothing else."
        raise MappingError(f"`{shown}`: {wrong}", where=where, advice=advice) from None
    return Expression(text, where, tree, names)


def _names(tree: ast.expr) -> Iterator[str]:
    """The names of `tree`; raises `NoValueError` at the first thing outside the whitelist."""
    waiting: list[tuple[ast.AST, int]] = [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise NoValueError(f"is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, str | int | float | None):
                raise NoValueError("has a literal that is no number and no string")
            continue
        if isinstance(node, ast.Name):
            if node.id not in LITERALS:
                yield node.id
            continue
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
            if not known or node.keywords or not node.args:
                raise NoValueError(f"the only functions are {', '.join(FUNCTIONS)}")
            waiting.extend((child, depth + 1) for child in node.args)
            continue
        if isinstance(node, ast.Attribute) and not isinstance(node.value, ast.Name | ast.Attribute):
            raise NoValueError("a dot goes between names only")
        if not isinstance(node, _STRUCTURE + _OPERATORS):
            raise NoValueError(f"{type(node).__name__} is not allowed")
        waiting.extend((child, depth + 1) for child in ast.iter_child_nodes(node))
