"""The expressions of mapping files, evaluated a second time, apart from `mapping/`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from xtuner2llava.errors import MappingError

_OPERATIONS: dict[type[ast.AST], Callable[[object, object], object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Lt: operator.lt,  # type: ignore[dict-item]
    ast.LtE: operator.le,  # type: ignore[dict-item]
    ast.Gt: operator.gt,  # type: ignore[dict-item]
    ast.GtE: operator.ge,  # type: ignore[dict-item]
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda item, items: item in items,  # type: ignore[operator]
    ast.NotIn: lambda item, items: item not in items,  # type: ignore[operator]
}
_WORDS: Mapping[str, object] = {"true": True, "false": False, "null": None}
_FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "len": len,
    "max": max,
    "min": min,
    "is_float": lambda value: isinstance(value, float),
}
_MAX_DEPTH = 50


def evaluate(text: object, names: Mapping[str, object], *, missing_is_null: bool = False) -> object:
    """The value of an expression over `names`; what is no text stands for itself.

    Raises `MappingError` for anything that the mapping language does not have, and for names that
    are not there, unless these are to be null, as in conditions.
    """
    if not isinstance(text, str):
        return text
    try:
        return _Evaluation(names, missing_is_null).of(ast.parse(text.strip(), mode="eval").body, 0)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise MappingError(f"`{text[:80]}` has no value: {error}") from error


def whole_number(text: object, names: Mapping[str, object]) -> int:
    """The value of an expression that must be a size or a count. Raises `MappingError`."""
    value = evaluate(text, names)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise MappingError(f"`{text}` is {value!r}, expected a whole number")
    return int(value)


class _Evaluation:
    def __init__(self, names: Mapping[str, object], missing_is_null: bool) -> None:
        self._names, self._missing_is_null = names, missing_is_null

    def of(self, node: ast.expr, depth: int) -> object:
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")

        def inner(child: ast.expr) -> object:
            return self.of(child, depth + 1)

        match node:
            case ast.Constant(value=int() | float() | str()):
                return node.value
            case ast.Name(id=name):
                return _WORDS[name] if name in _WORDS else self._part(self._names, name)
            case ast.Attribute(value=value, attr=name):
                return self._part(inner(value), name)
            case ast.List(elts=items):
                return [inner(item) for item in items]
            case ast.UnaryOp(op=ast.Not(), operand=value):
                return not inner(value)
            case ast.UnaryOp(op=ast.USub(), operand=value):
                return _OPERATIONS[ast.Sub](0, inner(value))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return _OPERATIONS[type(op)](inner(left), inner(right))
            case ast.BoolOp(op=ast.And(), values=values):
                return all(inner(value) for value in values)
            case ast.BoolOp(values=values):
                return any(inner(value) for value in values)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _OPERATIONS[type(op)](inner(left), inner(right))
            case ast.Compare(left=left, ops=ops, comparators=rest):
                pairs = zip([left, *rest], ops, rest, strict=False)
                return all(_OPERATIONS[type(op)](inner(a), inner(b)) for a, op, b in pairs)
            case ast.Call(func=ast.Name(id=name), args=values, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*[inner(value) for value in values])
        raise ValueError(f"{type(node).__name__} is not allowed")

    def _part(self, values: object, name: str) -> object:
        if isinstance(values, Mapping) and name in values:
            return values[name]
        if self._missing_is_null and (values is None or isinstance(values, Mapping)):
            return None
        raise ValueError(f"`{name}` is not known")
