"""XTuner and mmengine configs as data: the text is parsed, never executed."""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from xtuner2llava.errors import CheckpointError
from xtuner2llava.training_config.values import (
    ANY_NAME,
    Key,
    Reference,
    Table,
    Unknown,
    Value,
    is_scalar,
)

TEXT_LIMIT = 4 << 20  # bytes or characters; real configs have some thousands
_WORDS_LIMIT = 400_000  # the syntax tree takes about half a kilobyte for each word or sign
_WORK_LIMIT = 4_000_000  # nodes visited, items and characters made
_LENGTH_LIMIT = 1_000_000  # characters or items of one computed value
_BITS_LIMIT = 1024  # of a computed integer
_NESTING_LIMIT = 64  # of values
_WORD = re.compile(r"\w+|[^\w\s]")
_BASE = "it comes from a base config, which is not followed"
_OWN = "a function or class of the config itself, which is never run"
_TOO_LARGE = "it is larger than any config needs"
_RUNS_OR_REBINDS_ANYTHING = frozenset({"eval", "exec", "globals", "locals", "vars"})
_DICTS = frozenset({"dict", "mmengine.ConfigDict", "mmengine.config.ConfigDict"})
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
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def read_python(text: str, where: str) -> Table:
    """The top-level names of a config and their values, by reading its syntax tree.

    `text` is a config file or the text that mmengine keeps as `meta["cfg"]`; `where` names it in
    errors. Imported names become `Reference`. What only running the config could tell becomes
    `Unknown`, with its line, and fails only where its value is asked for. Where a star import or
    `_base_` may bring in names that the text does not show, the name `*` stands for all of them,
    and with `_base_` every dict is unknown, since mmengine merges it with one elsewhere.

    Raises `CheckpointError` for what is not Python, or larger than any config: 4 MiB, 400 000
    words and signs, 4 million steps. Deep nesting is refused by CPython's parser (3.11.4 and later
    everywhere), and by its limit of recursion after that.
    """
    try:
        evaluator = _Evaluator(where)
        evaluator.run(_parse(text, where).body)
        return evaluator.result()
    except (RecursionError, MemoryError) as error:
        raise CheckpointError("is nested too deeply to be a config", where=where) from error


def _parse(text: str, where: str) -> ast.Module:
    what = ""
    if len(text) > TEXT_LIMIT:
        what = f"has {len(text)} characters, at most {TEXT_LIMIT} were expected"
    elif sum(1 for _ in _WORD.finditer(text)) > _WORDS_LIMIT:
        what = f"has more than {_WORDS_LIMIT} words, which is not a config"
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes such as '\d' are the author's
                return ast.parse(text)
        except SyntaxError as error:
            where = f"{where}:{error.lineno}" if error.lineno else where
            what = f"is not Python ({(error.msg or 'syntax error')[:200]})"
        except ValueError as error:  # null bytes, lone surrogates
            what = f"is not Python ({str(error)[:200]})"
    advice = "An XTuner config is a Python file, or the text that mmengine stores in a checkpoint."
    raise CheckpointError(what, where=where, advice=advice)


class _Evaluator:
    """Follows assignments, imports and constant conditions; all else is code, which is not run.

    Code may rebind the names that it binds, and change the lists and dicts that it can reach from
    the names that it mentions: `_forget` makes all of these unknown, so that a value that is
    returned is the one that running the config would give.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._names = Table()
        # What functions of the config rebind and mention: any code that is not run may call them.
        self._rebound: set[str] = set()
        self._mentioned: set[str] = set()
        # By identity, since two names may share a dict. The container is kept so that its id stays.
        # A tuple stays as it is: what it holds has changed.
        self._changed: dict[int, tuple[Value, Value]] = {}
        self._copies: dict[int, tuple[Value, int]] = {}
        self._left = _WORK_LIMIT

    def run(self, body: list[ast.stmt]) -> None:
        for node in body:
            self._spend(1)
            match node:
                case ast.Assign(targets=targets, value=source) if all(
                    isinstance(target, ast.Name) for target in targets
                ):
                    value = self._value(source)
                    for name in _bound_by(*targets):
                        self._names.put(name, value, source.lineno)
                case ast.AugAssign(target=ast.Name(id=name)):
                    self._names.put(name, self._value(node), node.lineno)
                case ast.Expr(value=source) | ast.Assert(test=source):
                    self._value(source)
                case ast.Import(names=aliases):
                    for alias in aliases:
                        root = alias.name.partition(".")[0]
                        path = alias.name if alias.asname else root
                        self._names.put(alias.asname or root, Reference(path), node.lineno)
                case ast.ImportFrom(level=level, module=module, names=aliases):
                    if level or aliases[0].name == ANY_NAME:
                        kind = "relative" if level else "star"
                        self._forget(node, f"a {kind} import is not followed")
                        continue
                    for alias in aliases:
                        path = f"{module}.{alias.name}"
                        self._names.put(alias.asname or alias.name, Reference(path), node.lineno)
                case ast.If(test=test, body=then, orelse=orelse):
                    chosen = self._value(test)
                    if isinstance(chosen, (Unknown, Reference)):
                        self._forget(node, f"it depends on {self._quoted(test)}")
                    else:
                        self.run(then if chosen else orelse)
                case ast.FunctionDef(
                    name=name, decorator_list=[], args=ast.arguments(defaults=[], kw_defaults=words)
                ) if not any(words):
                    self._names.put(name, self._function(node), node.lineno)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    self._forget(node, _OWN)
                case ast.With() if "read_base" in ast.unparse(node):
                    self._forget(node, _BASE)
                case ast.Pass():
                    pass
                case _:
                    kind = type(node).__name__.lower()
                    self._forget(node, f"a `{kind}` statement is code, which is not run")

    def result(self) -> Table:
        """All names, with what became unknown replaced; shared parts stay shared."""
        if "_base_" in self._names:
            unknown = Unknown(_BASE, self._names.lines["_base_"])
            merged = [name for name, value in self._names.items() if isinstance(value, Table)]
            for name in (*merged, ANY_NAME):
                self._names.put(name, unknown, unknown.line)
        table = Table()
        for name, value in self._names.items():
            line = self._names.lines[name]
            table.put(name, self._copy(value, line, 0)[0], line)
        return table

    def _value(self, node: ast.expr | ast.AugAssign) -> Value:
        """The value of an expression, all of whose parts are visited; `Unknown` where it is code.

        A list that `+=` extends is the same list afterwards, under all its names.
        """
        self._spend(1)
        try:
            value = self._read(node)
        except (ArithmeticError, ValueError, TypeError, LookupError) as error:
            return Unknown(f"it cannot be computed ({str(error)[:80]})", node.lineno)
        return self._changed.get(id(value), (None, value))[1]

    def _read(self, node: ast.expr | ast.AugAssign) -> Value:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as constant):
                return self._bounded(constant, node)
            case ast.Name(id=name) if name in self._names or ANY_NAME in self._names:
                return self._names.get(name, self._names.get(ANY_NAME))
            case ast.Name(id="torch"):
                # mmengine writes a dtype into the text of a checkpoint's meta as str() gives it,
                # without an import (mmengine/config/config.py, `pretty_text`).
                return Reference("torch")
            case ast.Name(id=name):
                return Unknown(f"nothing in the file gives `{name[:80]}` a value", node.lineno)
            case ast.Attribute(value=inner, attr=attr):
                return self._attribute(self._value(inner), attr, node)
            case ast.Subscript(value=inner, slice=index) if not isinstance(index, ast.Slice):
                return self._item(self._value(inner), self._value(index), node)
            case ast.List(elts=nodes) | ast.Tuple(elts=nodes) if not any(
                isinstance(part, ast.Starred) for part in nodes
            ):
                items = [*map(self._value, nodes)]
                return items if isinstance(node, ast.List) else tuple(items)
            case ast.Dict(keys=keys, values=nodes):
                return self._table(zip(keys, nodes, strict=True), node)
            case ast.Call():
                return self._call(node)
            case (
                ast.BinOp(left=left, op=op, right=right)
                | ast.AugAssign(target=left, op=op, value=right)
            ):
                return self._operate(node, op, self._value(left), self._value(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._operate(node, op, self._value(left), self._value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return self._operate(node, op, self._value(operand))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                chosen = self._value(test)
                if is_scalar(chosen):
                    return self._value(body if chosen else orelse)
                return self._forget(node, f"it depends on {self._quoted(test)}")
            case ast.JoinedStr(values=parts):
                texts = [*map(self._value, parts)]
                if all(isinstance(text, str) for text in texts):
                    return self._bounded("".join(map(str, texts)), node)
                return self._unread(node, *texts)
            case ast.FormattedValue(value=inner, conversion=-1, format_spec=None):
                text = self._value(inner)
                if isinstance(text, (str, int, float)):
                    return self._bounded(str(text), node)
                return self._unread(node, text)
            case ast.Lambda():
                return self._function(node)
        return self._forget(node, f"a {type(node).__name__} is code, which is not run")

    def _attribute(self, value: Value, name: str, node: ast.expr) -> Value:
        if isinstance(value, Reference):
            self._spend(len(value.path) + len(name))
            return Reference(f"{value.path}.{name}")
        return self._unread(node, value)

    def _item(self, container: Value, key: Value, node: ast.expr) -> Value:
        match container, key:
            case Table(), _ if is_scalar(key):
                return container[key]
            case list() | tuple(), int():
                return container[key]
            case Reference(), str() if container.path.endswith(".PROMPT_TEMPLATE"):
                # A ConfigDict, whose keys are its attributes (xtuner/utils/templates.py).
                return self._attribute(container, key, node)
        return self._unread(node, container, key)

    def _table(self, entries: Iterable[tuple[Key | ast.expr, ast.expr]], node: ast.expr) -> Value:
        """The dict of these keys and values; without a key, a value is a dict that is merged."""
        table = Table()
        unread: list[Value] = []
        for key_node, value_node in entries:
            line = key_node.lineno if isinstance(key_node, ast.expr) else value_node.lineno
            key = self._value(key_node) if isinstance(key_node, ast.expr) else key_node
            value = self._value(value_node)
            self._spend(len(value) if isinstance(value, Table) else 1)
            if key_node is None and isinstance(value, Table):
                table.update(value)
                table.lines.update(value.lines)
            elif key_node is not None and is_scalar(key):
                table.put(key, value, line)
            else:
                unread += [key, value]
        return self._unread(node, *unread) if unread else table

    def _call(self, node: ast.Call) -> Value:
        """A dict, or an integer; any other call is code."""
        name, called = "", "a computed function"
        if isinstance(node.func, ast.Name) and node.func.id not in self._names:
            name = node.func.id
        elif isinstance(function := self._value(node.func), Reference):
            name = function.path
        match node:
            case ast.Call(args=[] | [_] as args, keywords=keywords) if name in _DICTS:
                words = [(word.arg, word.value) for word in keywords]
                return self._table([*((None, arg) for arg in args), *words], node)
            case ast.Call(args=[arg], keywords=[]) if name == "int":
                number = self._value(arg)
                if isinstance(number, (int, float)):
                    return self._bounded(int(number), node)
                return self._unread(node, number)
            case ast.Call(func=ast.Name() | ast.Attribute() as func):
                called = self._quoted(func)
        return self._forget(node, f"a call of {called} is code, which is not run")

    def _operate(self, node: ast.expr | ast.AugAssign, op: ast.AST, *values: Any) -> Value:
        """The result of an operator on plain values, or the sum of two texts, lists or tuples."""
        kinds: tuple[type, ...] = (bool, int, float, str, type(None))
        if isinstance(op, ast.operator):
            kinds = (int, float)
        elif isinstance(op, (ast.Is, ast.IsNot)):
            kinds = (bool, type(None))
        match op, values:
            case ast.Add(), (str() | list() | tuple() as left, right) if type(left) is type(right):
                self._spend(len(left) + len(right))
                if len(left) + len(right) > _LENGTH_LIMIT:
                    return Unknown(_TOO_LARGE, node.lineno)
                if isinstance(node, ast.AugAssign) and isinstance(left, list):
                    left.extend(right)
                    return left
                total: Value = operator.add(left, right)
                return total
            case ast.Pow(), (int(base), int() | float() as power) if (
                base.bit_length() * abs(power) > _BITS_LIMIT
            ):
                return Unknown(_TOO_LARGE, node.lineno)
        if type(op) in _OPERATORS and all(isinstance(value, kinds) for value in values):
            return self._bounded(_OPERATORS[type(op)](*values), node)
        if isinstance(node, ast.AugAssign):
            return self._forget(node, "this change is not read")
        return self._unread(node, *values)

    def _bounded(self, value: Any, node: ast.expr | ast.AugAssign) -> Value:
        """A plain value of a size that a config may need."""
        large = isinstance(value, int) and value.bit_length() > _BITS_LIMIT
        large |= isinstance(value, float) and not math.isfinite(value)  # Not a number of JSON.
        if large or (isinstance(value, str) and len(value) > _LENGTH_LIMIT):
            return Unknown(_TOO_LARGE, node.lineno)
        self._spend(len(value) if isinstance(value, str) else 0)
        return value if is_scalar(value) else Unknown("its result is not read", node.lineno)

    def _unread(self, node: ast.expr, *values: Value) -> Unknown:
        """Why an expression of `values`, all of which were visited, is not known."""
        found = next((value for value in values if isinstance(value, Unknown)), None)
        return found or Unknown(f"{self._quoted(node)} is not read", node.lineno)

    def _quoted(self, node: ast.expr) -> str:
        """The text of `node`, shortened."""
        self._spend(sum(1 for _ in ast.walk(node)))
        return f"`{ast.unparse(node)[:80]}`"

    def _function(self, node: ast.FunctionDef | ast.Lambda) -> Unknown:
        parts = list(ast.walk(node))
        self._spend(len(parts))
        for part in parts:
            self._rebound.update(part.names if isinstance(part, ast.Global) else ())
        self._mentioned.update(part.id for part in parts if isinstance(part, ast.Name))
        return Unknown(_OWN, node.lineno)

    def _forget(self, node: ast.expr | ast.stmt, reason: str) -> Unknown:
        """`node` is not followed: what it may bind or change is unknown from here on."""
        unknown = Unknown(reason, node.lineno)
        own = list(ast.walk(node))
        self._spend(len(own) + len(self._rebound) + len(self._mentioned))
        for name in (*_bound_by(*own), *self._rebound):
            if name != ANY_NAME:
                self._names.put(name, unknown, unknown.line)
        used = {part.id for part in own if isinstance(part, ast.Name)} | self._mentioned
        if ANY_NAME in _bound_by(*own) or (used - self._names.keys()) & _RUNS_OR_REBINDS_ANYTHING:
            self._spend(len(self._names))
            for known in (*self._names, ANY_NAME):
                self._names.put(known, unknown, unknown.line)
        todo = [self._names[name] for name in used if name in self._names]
        while todo:
            value = todo.pop()
            if id(value) in self._changed or not isinstance(value, (list, tuple, Table)):
                continue  # What lies in it is unknown already, and nothing is added to it.
            self._spend(1 + len(value))
            self._changed[id(value)] = (value, value if isinstance(value, tuple) else unknown)
            todo += value.values() if isinstance(value, Table) else value
        return unknown

    def _spend(self, work: int) -> None:
        """Counts `work`; raises `CheckpointError` once it is more than any config needs."""
        self._left -= work
        if self._left < 0:
            what = "is not a config: reading it takes more work than any config needs"
            raise CheckpointError(what, where=self._where)

    def _copy(self, value: Value, line: int, depth: int) -> tuple[Value, int]:
        """A copy without what is not known any more, and how deeply containers lie in it.

        Each is copied once. A list in itself, or nested without end, becomes unknown, on `line`.
        """
        value = self._changed.get(id(value), (None, value))[1]
        if not isinstance(value, (list, tuple, Table)):
            return value, 0
        if id(value) not in self._copies:
            # Stands until the copy is made: a container that contains itself finds it.
            self._copies[id(value)] = (Unknown("it is nested too deeply", line), 0)
            parts = value.values() if isinstance(value, Table) else value
            deeper = [self._copy(part, line, depth + 1) for part in parts if depth < _NESTING_LIMIT]
            height = 1 + max((height for _, height in deeper), default=0)
            if depth < _NESTING_LIMIT and height <= _NESTING_LIMIT:
                copies = [copy for copy, _ in deeper]
                whole: Value = tuple(copies) if isinstance(value, tuple) else copies
                if isinstance(value, Table):
                    whole = Table()
                    for key, copy in zip(value, copies, strict=True):
                        whole.put(key, copy, value.lines.get(key, 1))
                self._copies[id(value)] = (whole, height)
        return self._copies[id(value)]


def _bound_by(*nodes: ast.AST) -> Iterator[str]:
    """Names that these nodes, without those in them, bind or delete."""
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        # Of functions, classes, exception handlers, patterns and imports.
        names = [getattr(node, field, None) for field in ("asname", "name", "rest")]
        yield from [name.partition(".")[0] for name in names if isinstance(name, str)][:1]
