"""The value of an expression of a config, as far as it follows from constants."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from xtuner2llava.recipe.arithmetic import Arithmetic, known
from xtuner2llava.recipe.functions import FUNCTIONS, METHODS, MUTATORS, Arguments, Unreadable
from xtuner2llava.recipe.scope import Scope
from xtuner2llava.recipe.values import Key, Reference, Table, Unknown, Value, is_scalar

_DEPTH_LIMIT = 80
_FORMAT = re.compile(r"[<>^]?[+ ]?0?\d{0,2},?(\.\d{1,2})?[bdeEfFgGnsxX%]?", re.ASCII)


class Expressions:
    """Evaluates expressions by walking their syntax tree; nothing is ever called by name.

    `evaluate` never raises for what it cannot follow: that becomes `Unknown`, together with what
    it might have changed. All operands are visited before one of them is found unknown, so that
    no assignment within an expression is overlooked.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._arithmetic = Arithmetic(scope.spend)
        self._depth = 0
        self._kinds: dict[type[ast.AST], Callable[..., Value]] = {
            ast.Constant: self._constant,
            ast.Name: self._name,
            ast.Attribute: self._attribute,
            ast.Subscript: self._subscript,
            ast.List: self._list,
            ast.Tuple: self._tuple,
            ast.Set: self._set,
            ast.Dict: self._dict,
            ast.BinOp: self._binary,
            ast.UnaryOp: self._unary,
            ast.BoolOp: self._bool,
            ast.Compare: self._compare,
            ast.IfExp: self._conditional,
            ast.JoinedStr: self._joined,
            ast.FormattedValue: self._formatted,
            ast.Call: self._call,
            ast.Lambda: self._scope.define,
        }

    def evaluate(self, node: ast.expr) -> Value:
        self._scope.spend(1)
        read = self._kinds.get(type(node))
        if read is None:
            kind = type(node).__name__
            return self._scope.give_up(node, f"a {kind} is code, which is not run", node.lineno)
        if self._depth >= _DEPTH_LIMIT:
            return self._scope.give_up(node, "it is nested too deeply", node.lineno)
        self._depth += 1
        try:
            return self._scope.trusted(read(node))
        except Unreadable as error:
            return error.unknown or Unknown(str(error), node.lineno)
        except (ArithmeticError, ValueError, TypeError, LookupError) as error:
            return Unknown(f"it cannot be computed ({str(error)[:80]})", node.lineno)
        finally:
            self._depth -= 1

    def truth(self, value: Value, line: int) -> bool | Unknown:
        """What `if value` on that line does."""
        if isinstance(value, Unknown):
            return value
        if isinstance(value, Reference):
            return Unknown(f"it depends on `{value.path[:80]}`", line)
        return bool(value)

    def _item(self, container: Value, key: Value) -> Value:
        """`container[key]`; raises Unreadable or LookupError."""
        container, key = known(container), known(key)
        if isinstance(container, Table) and is_scalar(key):
            if key not in container:
                raise Unreadable("the dict has no such key")
            return container[key]  # type: ignore[index]
        if isinstance(container, (list, tuple, str)) and isinstance(key, int):
            return container[key]
        if isinstance(container, Reference) and isinstance(key, str):
            # A ConfigDict, whose keys are its attributes (xtuner/utils/templates.py).
            self._scope.spend(len(key))
            if not (container.path.endswith(".PROMPT_TEMPLATE") and key.isidentifier()):
                raise Unreadable(f"an item of `{container.path[:80]}` is not read")
            return self._named(container, key)
        raise Unreadable("this index is not read")

    def _named(self, reference: Reference, name: str) -> Reference:
        self._scope.spend(len(reference.path) + len(name))
        return Reference(f"{reference.path}.{name}")

    def _constant(self, node: ast.Constant) -> Value:
        if node.value is None or isinstance(node.value, (bool, float, str)):
            return node.value
        if isinstance(node.value, int):
            self._arithmetic.limit_bits(node.value)
            return node.value
        raise Unreadable(f"a constant of type {type(node.value).__name__} is not read")

    def _name(self, node: ast.Name) -> Value:
        return self._scope.look_up(node.id, node.lineno)

    def _attribute(self, node: ast.Attribute) -> Value:
        value = known(self.evaluate(node.value))
        if isinstance(value, Reference):
            return self._named(value, node.attr)
        if isinstance(value, Table) and node.attr in value:
            return value[node.attr]
        raise Unreadable(f"`.{node.attr[:80]}` of this value is not read")

    def _subscript(self, node: ast.Subscript) -> Value:
        container = self.evaluate(node.value)
        if not isinstance(node.slice, ast.Slice):
            return self._item(container, self.evaluate(node.slice))
        bounds = [
            None if bound is None else self.evaluate(bound)
            for bound in (node.slice.lower, node.slice.upper, node.slice.step)
        ]
        start, stop, step = map(_bound, bounds)
        if not isinstance(known(container), (list, tuple, str)):
            raise Unreadable("this slice is not read")
        self._arithmetic.spend_length(len(container))  # type: ignore[arg-type]
        return container[start:stop:step]  # type: ignore[index]

    def _items(self, nodes: list[ast.expr]) -> list[Value]:
        """The values of a display or of arguments, `*names` included."""
        items: list[Value] = []
        unknown: Unknown | None = None
        for node in nodes:
            value = self.evaluate(node.value if isinstance(node, ast.Starred) else node)
            if not isinstance(node, ast.Starred):
                items.append(value)
            elif isinstance(value, (list, tuple)):
                self._arithmetic.spend_length(len(value))
                items += value
            else:
                unknown = _unknown(value, "this `*` is not read", node.lineno)
        if unknown is not None:
            raise Unreadable(unknown)
        return items

    def _list(self, node: ast.List) -> Value:
        return self._items(node.elts)

    def _tuple(self, node: ast.Tuple) -> Value:
        return tuple(self._items(node.elts))

    def _set(self, node: ast.Set) -> Value:
        return frozenset(_scalar(item) for item in self._items(node.elts))

    def _dict(self, node: ast.Dict) -> Value:
        table, unknown = Table(), None
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            key = self.evaluate(key_node) if key_node is not None else None
            value = self.evaluate(value_node)
            if key_node is not None and is_scalar(key):
                table.put(_scalar(key), value, key_node.lineno)
            elif key_node is None and isinstance(value, Table):
                self._arithmetic.spend_length(len(value))
                table.merge(value)
            else:
                odd = value if key_node is None else key
                unknown = _unknown(odd, "this key is not read", value_node.lineno)
        if unknown is not None:
            raise Unreadable(unknown)
        return table

    def _binary(self, node: ast.BinOp) -> Value:
        return self._arithmetic.combine(
            type(node.op), self.evaluate(node.left), self.evaluate(node.right)
        )

    def _unary(self, node: ast.UnaryOp) -> Value:
        value = known(self.evaluate(node.operand))
        if isinstance(node.op, ast.Not):
            return not _known_truth(self.truth(value, node.lineno))
        return self._arithmetic.sign(type(node.op), value)

    def _bool(self, node: ast.BoolOp) -> Value:
        value: Value = None
        for operand in node.values:
            value = self.evaluate(operand)
            truth = self.truth(value, node.lineno)
            if isinstance(truth, Unknown):
                return self._scope.give_up(node, truth.reason, truth.line)
            if truth is isinstance(node.op, ast.Or):
                return value
        return value

    def _compare(self, node: ast.Compare) -> Value:
        values = [self.evaluate(part) for part in (node.left, *node.comparators)]
        pairs = zip(values, node.ops, values[1:], strict=False)
        return all([self._arithmetic.holds(left, type(op), right) for left, op, right in pairs])

    def _conditional(self, node: ast.IfExp) -> Value:
        truth = self.truth(self.evaluate(node.test), node.lineno)
        if isinstance(truth, Unknown):
            return self._scope.give_up(node, truth.reason, truth.line)
        return self.evaluate(node.body if truth else node.orelse)

    def _joined(self, node: ast.JoinedStr) -> Value:
        parts = [str(_scalar(part)) for part in [self.evaluate(value) for value in node.values]]
        self._arithmetic.spend_length(sum(map(len, parts)))
        return "".join(parts)

    def _formatted(self, node: ast.FormattedValue) -> Value:
        value = self.evaluate(node.value)
        spec = "" if node.format_spec is None else self.evaluate(node.format_spec)
        value = _scalar(value)
        if not isinstance(spec, str) or not _FORMAT.fullmatch(spec):
            raise Unreadable("this format is not read")
        if isinstance(value, str):
            self._arithmetic.spend_length(len(value))
        if node.conversion in (ord("r"), ord("a")):
            value = repr(value) if node.conversion == ord("r") else ascii(value)
        return format(str(value) if node.conversion == ord("s") else value, spec)

    def _call(self, node: ast.Call) -> Value:
        apply = self._callee(node.func)
        if apply is None:
            name = ast.unparse(node.func) if _is_dotted(node.func) else "a computed function"
            reason = f"a call of `{name[:80]}` is code, which is not run"
            return self._scope.give_up(node, reason, node.lineno)
        try:
            positional = self._items(node.args)
            named = self._keywords(node.keywords)
            return apply(Arguments(positional, named, node.lineno, self._arithmetic.spend_length))
        except (Unreadable, ArithmeticError, ValueError, TypeError, LookupError) as error:
            # A change that was not followed may still have happened.
            if isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                self._scope.give_up(node, str(error)[:80], node.lineno)
            raise

    def _keywords(self, keywords: list[ast.keyword]) -> Table:
        table, unknown = Table(), None
        for keyword in keywords:
            value = self.evaluate(keyword.value)
            if keyword.arg is not None:
                part = Table()
                part.put(keyword.arg, value, keyword.lineno)
            elif isinstance(value, Table):
                part = value
            else:
                unknown = _unknown(value, "this `**` is not read", keyword.value.lineno)
                continue
            self._arithmetic.spend_length(len(part))
            if any(key in table for key in part):
                unknown = Unknown("an argument is given twice", keyword.value.lineno)
            table.merge(part)
        if unknown is not None:
            raise Unreadable(unknown)
        return table

    def _callee(self, func: ast.expr) -> Callable[[Arguments], Value] | None:
        if isinstance(func, ast.Name) and not self._scope.is_bound(func.id):
            return FUNCTIONS.get(func.id)
        if isinstance(func, ast.Attribute):
            base = self.evaluate(func.value)
            if isinstance(base, Reference):
                return FUNCTIONS.get(f"{base.path}.{func.attr}")
            method = METHODS.get((type(base), func.attr))
            return None if method is None else lambda arguments: method(base, arguments)
        if isinstance(func, ast.Name):
            value = self.evaluate(func)
            return FUNCTIONS.get(value.path) if isinstance(value, Reference) else None
        return None


def _is_dotted(node: ast.expr) -> bool:
    length = 0
    while isinstance(node, ast.Attribute) and length < _DEPTH_LIMIT:
        node, length = node.value, length + 1
    return isinstance(node, ast.Name)


def _unknown(value: Value, reason: str, line: int) -> Unknown:
    return value if isinstance(value, Unknown) else Unknown(reason, line)


def _bound(value: Value) -> int | None:
    value = known(value)
    if value is None or isinstance(value, int):
        return value
    raise Unreadable("this slice is not read")


def _known_truth(truth: bool | Unknown) -> bool:
    if isinstance(truth, Unknown):
        raise Unreadable(truth)
    return truth


def _scalar(value: Value) -> Key:
    value = known(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise Unreadable(f"a {type(value).__name__} is not read here")
