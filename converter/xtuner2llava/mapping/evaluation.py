"""The values of whitelisted syntax trees. Nothing here calls what a name stands for."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from xtuner2llava.mapping.names import nearest
from xtuner2llava.mapping.values import MAX_MAGNITUDE, Environment, NoValueError, same, show

LITERALS = {"true": True, "false": False, "null": None}
ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
ORDER: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
EQUALITY = (ast.Eq, ast.NotEq)
MEMBERSHIP = (ast.In, ast.NotIn)
FUNCTIONS = ("is_float", "len", "max", "min")


def truth(value: object) -> bool:
    """True, false, or null as false; raises `NoValueError` for anything else."""
    if value is None or isinstance(value, bool):
        return bool(value)
    raise NoValueError(f"{show(value)} is neither true nor false")


class Evaluation:
    """One walk over a whitelisted tree; its depth was checked when it was parsed."""

    def __init__(self, environment: Environment, absent_is_null: bool) -> None:
        self._environment, self._absent_is_null = environment, absent_is_null

    def of(self, node: ast.expr) -> object:
        match node:
            case ast.Constant():
                return self._bounded(node.value)
            case ast.Name() if node.id in LITERALS:
                return LITERALS[node.id]
            case ast.Name() | ast.Attribute():
                return self._bounded(self._lookup(node))
            case ast.List():
                return [self.of(item) for item in node.elts]
            case ast.UnaryOp(op=ast.Not()):
                return not truth(self.of(node.operand))
            case ast.UnaryOp():
                number = self._number(node.operand)
                return -number if isinstance(node.op, ast.USub) else number
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.BoolOp():
                # `or` ends at the first true part, `and` at the first false one.
                ending = isinstance(node.op, ast.Or)
                return any(truth(self.of(part)) is ending for part in node.values) is ending
            case ast.Compare():
                return self._compare(node)
            case ast.Call(func=ast.Name(id=name)):
                return self._call(name, node.args)
        raise NoValueError(f"{type(node).__name__} is not allowed")

    def _lookup(self, node: ast.expr) -> object:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        assert isinstance(node, ast.Name)  # noqa: S101 - checked when it was parsed
        parts.append(node.id)
        value: object = self._environment
        for depth, part in enumerate(reversed(parts)):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif self._absent_is_null and (value is None or isinstance(value, Mapping)):
                return None
            else:
                raise NoValueError(_unknown(".".join(reversed(parts)), part, value, depth))
        return value

    def _number(self, node: ast.expr) -> int | float:
        value = self.of(node)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise NoValueError(f"`{ast.unparse(node)}` is {show(value)}, expected a number")
        return value

    def _arithmetic(self, node: ast.BinOp) -> object:
        left, right = self._number(node.left), self._number(node.right)
        try:
            return self._bounded(ARITHMETIC[type(node.op)](left, right))
        except ZeroDivisionError:
            raise NoValueError("divides by zero") from None
        except OverflowError:
            raise NoValueError("the result is too large") from None

    def _compare(self, node: ast.Compare) -> bool:
        left = node.left
        for sign, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(sign, EQUALITY):
                holds = same(self.of(left), self.of(right)) is isinstance(sign, ast.Eq)
            elif isinstance(sign, MEMBERSHIP):
                item, items = self.of(left), self.of(right)
                if not isinstance(items, list | tuple):
                    raise NoValueError(f"`in` needs a list, not {show(items)}")
                found = any(same(item, other) for other in items)
                holds = found is isinstance(sign, ast.In)
            else:
                holds = ORDER[type(sign)](self._number(left), self._number(right))
            if not holds:
                return False
            left = right
        return True

    def _call(self, name: str, arguments: list[ast.expr]) -> object:
        if name in ("min", "max"):
            numbers = [self._number(argument) for argument in arguments]
            return min(numbers) if name == "min" else max(numbers)
        if len(arguments) != 1:
            raise NoValueError(f"`{name}` takes one value")
        value = self.of(arguments[0])
        if name == "is_float":
            return isinstance(value, float)
        if isinstance(value, Mapping | list | tuple):
            return len(value)
        raise NoValueError(f"`len` needs a list or table, not {show(value)}")

    @staticmethod
    def _bounded(value: object) -> object:
        if isinstance(value, int | float) and not abs(value) <= MAX_MAGNITUDE:
            raise NoValueError("a number in it is not finite or beyond 64 bits")
        return value


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
