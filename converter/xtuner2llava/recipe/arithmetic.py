"""Arithmetic and comparisons between constants of a config, with bounded results."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from xtuner2llava.recipe.functions import Unreadable
from xtuner2llava.recipe.values import Table, Unknown, Value, is_scalar

_BITS_LIMIT = 1024
_LENGTH_LIMIT = 1_000_000  # characters or items of one computed value

_ARITHMETIC: dict[type[ast.operator], Callable[..., object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[..., object]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}
_ORDER: dict[type[ast.cmpop], Callable[..., object]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class Arithmetic:
    """The operators. `spend` is told how many characters or items a result takes."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend

    def combine(self, kind: type[ast.operator], left: Value, right: Value) -> Value:
        """`left kind right` with bounded results; raises what arithmetic raises, or Unreadable."""
        left, right = known(left), known(right)
        if kind not in _ARITHMETIC:
            raise Unreadable(f"{kind.__name__} is not read")
        if _is_number(left) and _is_number(right):
            if kind is ast.Pow and isinstance(left, int) and isinstance(right, int):
                _limit(left.bit_length() * abs(right), _BITS_LIMIT)
            result = _ARITHMETIC[kind](left, right)
            if isinstance(result, int):
                _limit(result.bit_length(), _BITS_LIMIT)
            if isinstance(result, (int, float)):
                return result
        elif kind is ast.Add:
            for sequence in (str, list, tuple):
                if isinstance(left, sequence) and isinstance(right, sequence):
                    self.spend_length(len(left) + len(right))
                    return left + right  # type: ignore[operator]
        elif kind is ast.Mult:
            if isinstance(left, int):
                left, right = right, left
            if isinstance(left, (str, list, tuple)) and isinstance(right, int):
                self.spend_length(len(left) * max(right, 0))
                return left * right
        raise Unreadable(f"{kind.__name__} of these values is not read")

    def sign(self, kind: type[ast.unaryop], value: Value) -> Value:
        """`+value`, `-value` or `~value`; `not` is not arithmetic."""
        if not _is_number(value) or kind not in _UNARY:
            raise Unreadable("this sign is not read")
        result = _UNARY[kind](value)
        if isinstance(result, (int, float)):
            return result
        raise Unreadable("this sign is not read")

    def holds(self, left: Value, kind: type[ast.cmpop], right: Value) -> bool:
        left, right = known(left), known(right)
        if kind in (ast.Is, ast.IsNot) and (left is None or right is None):
            return (left is right) is (kind is ast.Is)
        if kind in (ast.In, ast.NotIn) and is_scalar(left):
            if isinstance(right, (list, tuple, frozenset, Table)):
                self._spend(len(right))
                parts = list(right)
                if not all(map(is_scalar, parts)):
                    raise Unreadable("this comparison is not read")
                return (left in parts) is (kind is ast.In)
            if isinstance(left, str) and isinstance(right, str):
                self.spend_length(len(right))
                return (left in right) is (kind is ast.In)
        if kind in _ORDER and is_scalar(left) and is_scalar(right):
            if isinstance(left, str) and isinstance(right, str):
                self._spend(min(len(left), len(right)))
            return bool(_ORDER[kind](left, right))
        raise Unreadable("this comparison is not read")

    def limit_bits(self, number: int) -> None:
        _limit(number.bit_length(), _BITS_LIMIT)

    def spend_length(self, length: int) -> None:
        """Counts what a result takes; raises Unreadable for more than a million."""
        _limit(length, _LENGTH_LIMIT)
        self._spend(length)


def known(value: Value) -> Value:
    if isinstance(value, Unknown):
        raise Unreadable(value)
    return value


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float))


def _limit(size: int, limit: int) -> None:
    if size > limit:
        raise Unreadable("it is larger than any config needs")
