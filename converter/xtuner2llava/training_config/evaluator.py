"""XTuner and mmengine configs as data: the text is parsed, never executed."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable
from typing import TypeVar

from xtuner2llava.errors import CheckpointError
from xtuner2llava.training_config.names import Names
from xtuner2llava.training_config.operations import FUNCTIONS, METHODS, MUTATORS, Operations, truth
from xtuner2llava.training_config.values import (
    ANY_NAME,
    Reference,
    Table,
    Unknown,
    UnreadableError,
    Value,
    is_scalar,
    known,
    scalar,
)

_T = TypeVar("_T")
TEXT_LIMIT = 4 << 20  # bytes or characters; real configs have some thousands
_WORDS_LIMIT = 400_000  # the syntax tree takes about half a kilobyte for each word or sign
_DEPTH_LIMIT = 80  # of expressions
_WORD = re.compile(r"\w+|[^\w\s]")
_BASE = "it comes from a base config, which is not followed"
_NO_SPEC = ast.Constant("")
_ERRORS = (ArithmeticError, ValueError, TypeError, LookupError)


def read_python(text: str, where: str) -> Table:
    """The top-level names of a config and their values, by reading its syntax tree.

    `text` is a config file or the text that mmengine keeps as `meta["cfg"]`; `where` names it in
    errors. Imported names become `Reference`. What only running the config could tell becomes
    `Unknown`, with its line, and fails only where its value is asked for. Where a star import or
    `_base_` may bring in names that the text does not show, the name `*` stands for all of them,
    and with `_base_` every dict is unknown, since mmengine merges it with one elsewhere.

    Raises `CheckpointError` for what is not Python, or larger than any config: 4 MiB, 400 000
    words and signs, 4 million steps. Deep nesting is refused by CPython's parser (3.11.4 and later
    everywhere) and by a limit of our own after it.
    """
    try:
        evaluator = _Evaluator(where)
        evaluator.run(_parse(text, where).body)
        return evaluator.names.result()
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
    """Follows statements in order and computes expressions; nothing is ever called by name.

    All operands are visited before one of them is found unknown, so that no assignment within an
    expression is overlooked.
    """

    def __init__(self, where: str) -> None:
        self.names = Names(where)
        self._operations = Operations(self.names)
        self._depth = 0

    # Statements

    def run(self, body: list[ast.stmt]) -> None:
        for node in body:
            self.names.spend(1)
            self._statement(node)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=source):
                value = self._value(source)
                for target in targets:
                    self._assign(target, value, source.lineno)
            case ast.AnnAssign(target=target, value=source):
                if source is not None:
                    self._assign(target, self._value(source), source.lineno)
            case ast.AugAssign():
                self._augment(node)
            case ast.Expr(value=source) | ast.Assert(test=source):
                self._value(source)
            case ast.Import(names=names):
                for alias in names:
                    root = alias.name.partition(".")[0]
                    path = alias.name if alias.asname else root
                    self.names.put(alias.asname or root, Reference(path), node.lineno)
            case ast.ImportFrom():
                self._import(node, "a relative import is not followed" if node.level else "")
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                self._define(node)
            case ast.If(test=test, body=body, orelse=orelse):
                try:
                    self.run(body if truth(self._value(test), test.lineno) else orelse)
                except UnreadableError as error:
                    self.names.give_up(node, str(error))
            case ast.With(items=items, body=body) if any(map(_is_read_base, items)):
                for statement in body:
                    if isinstance(statement, ast.ImportFrom):
                        self._import(statement, _BASE)
                    else:
                        self.names.give_up(statement, _BASE)
            case ast.Delete(targets=targets):
                for target in targets:
                    self._delete(target)
            case ast.Pass():
                pass
            case _:
                kind = type(node).__name__.lower()
                self.names.give_up(node, f"a `{kind}` statement is code, which is not run")

    def _assign(self, target: ast.expr, value: Value, line: int) -> None:
        match target:
            case ast.Name(id=name):
                self.names.put(name, value, line)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                parts = list(value) if isinstance(value, (list, tuple)) else []
                starred = any(isinstance(part, ast.Starred) for part in targets)
                if starred or len(parts) != len(targets):
                    parts = [_unknown(value, "this unpacking is not read", line)] * len(targets)
                for part, item in zip(targets, parts, strict=True):
                    self._assign(part, item, line)
            case ast.Starred(value=inner):
                self._assign(inner, value, line)
            case ast.Subscript() | ast.Attribute():
                container, key = self._place(target)
                if isinstance(container, Table) and is_scalar(key):
                    container.put(key, value, line)
                elif (
                    isinstance(container, list)
                    and isinstance(key, int)
                    and (-len(container) <= key < len(container))
                ):
                    container[key] = value
                else:
                    self.names.give_up(target, "this assignment is not read", line)

    def _place(self, target: ast.Subscript | ast.Attribute) -> tuple[Value, Value]:
        """The container and the key that a target names; an unknown key for a slice."""
        container = self._value(target.value)
        if isinstance(target, ast.Attribute):
            return container, target.attr
        if isinstance(target.slice, ast.Slice):
            return container, Unknown("a slice", target.lineno)
        return container, self._value(target.slice)

    def _augment(self, node: ast.AugAssign) -> None:
        old, value = self._value(node.target), self._value(node.value)
        try:
            if isinstance(node.op, ast.Add) and isinstance(old, list):
                # Changes the list in place, also for those who know it by another name.
                self._operations.extend(old, value)
                return
            if isinstance(old, Table):
                raise UnreadableError("this change of a dict is not read")
            new = self._operations.combine(node.op, old, value)
        except (UnreadableError, *_ERRORS) as error:
            if isinstance(old, (list, Table)):
                self.names.give_up(node, str(error))
            known = error.unknown if isinstance(error, UnreadableError) else None
            new = known or Unknown(str(error)[:80], node.lineno)
        self._assign(node.target, new, node.lineno)

    def _delete(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.names.pop(target.id, None)
            return
        if isinstance(target, ast.Subscript):
            container, key = self._place(target)
            if isinstance(container, Table) and is_scalar(key) and key in container:
                del container[key]
                return
        self.names.give_up(target, "this deletion is not read")

    def _import(self, node: ast.ImportFrom, reason: str) -> None:
        for alias in node.names:
            if alias.name == ANY_NAME:
                self.names.forget_all(
                    Unknown(reason or "a star import is not followed", node.lineno)
                )
                continue
            found = Unknown(reason, node.lineno) if reason else None
            value = found or Reference(f"{node.module}.{alias.name}")
            self.names.put(alias.asname or alias.name, value, node.lineno)

    def _define(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        defined = self.names.defined(node)
        for decorator in node.decorator_list:
            self.names.give_up(decorator, "a decorator is code, which is not run")
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self._value(default)
        if node.decorator_list or isinstance(node, ast.ClassDef):
            self.names.taint(defined, Unknown(defined.reason, node.lineno))
        self.names.put(node.name, defined, node.lineno)

    # Expressions

    def _value(self, node: ast.expr) -> Value:
        """The value of an expression; `Unknown`, with all that it may change, where it is code."""
        self.names.spend(1)
        if self._depth >= _DEPTH_LIMIT:
            return self.names.give_up(node, "it is nested too deeply")
        self._depth += 1
        try:
            return self.names.trusted(self._read(node))
        except UnreadableError as error:
            return error.unknown or Unknown(str(error), node.lineno)
        except _ERRORS as error:
            return Unknown(f"it cannot be computed ({str(error)[:80]})", node.lineno)
        finally:
            self._depth -= 1

    def _read(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=None | bool() | float() | str() as value):
                return value
            case ast.Constant(value=int() as value):
                return self._operations.bounded(value)
            case ast.Constant(value=value):
                raise UnreadableError(f"a constant of type {type(value).__name__} is not read")
            case ast.Name(id=name):
                return self.names.look_up(name, node.lineno)
            case ast.Attribute(value=inner, attr=attr):
                return self._operations.attribute(self._value(inner), attr)
            case ast.Subscript(value=inner, slice=ast.Slice(lower=start, upper=stop, step=step)):
                container = self._value(inner)
                bounds = [None if b is None else self._value(b) for b in (start, stop, step)]
                return self._operations.cut(container, bounds)
            case ast.Subscript(value=inner, slice=index):
                return self._operations.item(self._value(inner), self._value(index))
            case ast.List(elts=nodes):
                return self._items(nodes)
            case ast.Tuple(elts=nodes):
                return tuple(self._items(nodes))
            case ast.Set(elts=nodes):
                return frozenset(scalar(item) for item in self._items(nodes))
            case ast.Dict(keys=keys, values=values):
                return self._dict(zip(keys, values, strict=True))
            case ast.JoinedStr(values=parts):
                texts = [str(scalar(part)) for part in [*map(self._value, parts)]]
                self.names.make(sum(map(len, texts)))
                return "".join(texts)
            case ast.FormattedValue():
                shown = self._value(node.value)
                spec = self._value(node.format_spec or _NO_SPEC)
                return self._operations.formatted(shown, node.conversion, spec)
            case ast.Call():
                return self._call(node)
            case ast.Lambda():
                return self.names.defined(node)
        return self._operation(node)

    def _operation(self, node: ast.expr) -> Value:
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                return self._operations.combine(op, self._value(left), self._value(right))
            case ast.UnaryOp(op=sign, operand=operand):
                value = known(self._value(operand))
                if isinstance(sign, ast.Not):
                    return not truth(value, node.lineno)
                return self._operations.sign(sign, value)
            case ast.Compare(left=left, ops=signs, comparators=others):
                values = [self._value(part) for part in (left, *others)]
                pairs = zip(values, signs, values[1:], strict=False)
                return all(
                    [self._operations.holds(one, sign_, other) for one, sign_, other in pairs]
                )
        try:
            match node:
                case ast.BoolOp(op=op_, values=operands):
                    value = None
                    for operand in operands:
                        value = self._value(operand)
                        if truth(value, node.lineno) is isinstance(op_, ast.Or):
                            break
                    return value
                case ast.IfExp(test=test, body=body, orelse=orelse):
                    chosen = body if truth(self._value(test), node.lineno) else orelse
                    return self._value(chosen)
        except UnreadableError as error:
            # What is not looked at may still be run.
            line = error.unknown.line if error.unknown else node.lineno
            return self.names.give_up(node, str(error), line)
        return self.names.give_up(node, f"a {type(node).__name__} is code, which is not run")

    def _items(self, nodes: list[ast.expr]) -> list[Value]:
        """The values of a display or of arguments, `*names` included."""
        items: list[Value] = []
        unknown: Unknown | None = None
        for node in nodes:
            value = self._value(node.value if isinstance(node, ast.Starred) else node)
            if not isinstance(node, ast.Starred):
                items.append(value)
            elif isinstance(value, (list, tuple)):
                self._operations.extend(items, value)
            else:
                unknown = _unknown(value, "this `*` is not read", node.lineno)
        return _all_known(items, unknown)

    def _dict(
        self, entries: Iterable[tuple[ast.expr | None, ast.expr]], *, once: bool = False
    ) -> Table:
        """The dict of these keys and values; without a key, a value is a dict that is merged.

        `once` is for arguments, none of which is given twice.
        """
        table = Table()
        unknown: Unknown | None = None
        for key_node, node in entries:
            key = None if key_node is None else self._value(key_node)
            value = self._value(node)
            part = Table() if key_node is not None else value
            if key_node is not None and is_scalar(key) and isinstance(part, Table):
                part.put(key, value, key_node.lineno)
            elif key_node is not None or not isinstance(part, Table):
                odd = value if key_node is None else key
                unknown = _unknown(odd, "this key is not read", node.lineno)
                continue
            if once and any(key in table for key in part):
                unknown = Unknown("an argument is given twice", node.lineno)
            self._operations.merge(table, part)
        return _all_known(table, unknown)

    def _call(self, node: ast.Call) -> Value:
        base, name = self._callee(node.func)
        method = (type(base), name) in METHODS
        if not method and name not in FUNCTIONS:
            text = ast.unparse(node.func) if _is_dotted(node.func) else "a computed function"
            return self.names.give_up(node, f"a call of `{text[:80]}` is code, which is not run")
        try:
            positional = self._items(node.args)
            entries = [(_key(keyword), keyword.value) for keyword in node.keywords]
            named = self._dict(entries, once=True)
            if method:
                return self._operations.method(base, name, positional, named)
            return self._operations.function(name, positional, named)
        except (UnreadableError, *_ERRORS) as error:
            # A change that was not followed may still have happened.
            if name in MUTATORS:
                self.names.give_up(node, str(error)[:80])
            raise

    def _callee(self, func: ast.expr) -> tuple[Value, str]:
        """A value and its method, as `.get`; None and the full name of a function."""
        match func:
            case ast.Name(id=name) if name not in self.names:
                return None, name
            case ast.Name():
                value = self._value(func)
                return None, value.path if isinstance(value, Reference) else ""
            case ast.Attribute(value=inner, attr=attr):
                value = self._value(inner)
                if isinstance(value, Reference):
                    self.names.spend(len(value.path))
                    return None, f"{value.path}.{attr}"
                return value, f".{attr}"
        return None, ""


def _is_read_base(item: ast.withitem) -> bool:
    match item.context_expr:
        case ast.Call(func=ast.Name(id="read_base") | ast.Attribute(attr="read_base")):
            return True
    return False


def _is_dotted(node: ast.expr) -> bool:
    length = 0
    while isinstance(node, ast.Attribute) and length < _DEPTH_LIMIT:
        node, length = node.value, length + 1
    return isinstance(node, ast.Name)


def _key(keyword: ast.keyword) -> ast.expr | None:
    return None if keyword.arg is None else ast.copy_location(ast.Constant(keyword.arg), keyword)


def _unknown(value: Value, reason: str, line: int) -> Unknown:
    return value if isinstance(value, Unknown) else Unknown(reason, line)


def _all_known(made: _T, unknown: Unknown | None) -> _T:
    """`made`, after all of its parts were visited; raises where one of them is not known."""
    if unknown is not None:
        raise UnreadableError(unknown)
    return made
