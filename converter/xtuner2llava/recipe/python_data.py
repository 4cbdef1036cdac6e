"""XTuner and mmengine configs as data: the text is parsed, never executed."""

from __future__ import annotations

import ast
import re
import warnings

from xtuner2llava.errors import CheckpointError
from xtuner2llava.recipe.arithmetic import Arithmetic
from xtuner2llava.recipe.expressions import Expressions
from xtuner2llava.recipe.functions import Unreadable
from xtuner2llava.recipe.scope import ANY_NAME, Scope
from xtuner2llava.recipe.values import Key, Reference, Table, Unknown, Value, is_scalar

TEXT_LIMIT = 4 << 20  # bytes or characters; real configs have some thousands
_WORDS_LIMIT = 400_000  # the syntax tree takes about half a kilobyte for each word or sign
_WORD = re.compile(r"\w+|[^\w\s]")
_BASE = "it comes from a base config, which is not followed"


def read_python(text: str, where: str) -> Table:
    """The top-level names of a config and their values, by reading its syntax tree.

    `text` is a config file or the text that mmengine keeps as `meta["cfg"]`; `where` names it in
    errors. Imported names become `Reference`. What only running the config could tell becomes
    `Unknown`, with its line, and fails nobody who does not ask for it. Where a star import or
    `_base_` may bring in names that the text does not show, the name `*` stands for all of them,
    and with `_base_` every dict is unknown, since mmengine merges it with one elsewhere.

    Raises `CheckpointError` for what is no Python, or larger than any config: 4 MiB, 400 000
    words and signs, 4 million steps. Deep nesting is refused by CPython's parser (3.11.4 and later
    everywhere) and by a limit of our own after it.
    """
    try:
        tree = _parse(text, where)
        scope = Scope(where)
        _Statements(scope).run(tree.body)
        if scope.is_bound("_base_"):
            scope.forget_tables(_BASE, because="_base_")
        return scope.result()
    except (RecursionError, MemoryError) as error:
        raise CheckpointError("is nested too deeply to be a config", where=where) from error


def _parse(text: str, where: str) -> ast.Module:
    advice = "An XTuner config is a Python file, or the text that mmengine stores in a checkpoint."
    if len(text) > TEXT_LIMIT:
        raise CheckpointError(
            f"has {len(text)} characters, at most {TEXT_LIMIT} were expected",
            where=where,
            advice=advice,
        )
    if sum(1 for _ in _WORD.finditer(text)) > _WORDS_LIMIT:
        raise CheckpointError(
            f"has more than {_WORDS_LIMIT} words, which is no config", where=where, advice=advice
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes such as '\d' are not our business
            return ast.parse(text)
    except SyntaxError as error:
        place = f"{where}:{error.lineno}" if error.lineno else where
        what = f"is not Python ({(error.msg or 'syntax error')[:200]})"
        raise CheckpointError(what, where=place, advice=advice) from error
    except ValueError as error:  # null bytes, lone surrogates
        what = f"is not Python ({str(error)[:200]})"
        raise CheckpointError(what, where=where, advice=advice) from error


class _Statements:
    """Follows statements in order; what binds names by running code makes them unknown."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._expressions = Expressions(scope)
        self._arithmetic = Arithmetic(scope.spend)

    def run(self, body: list[ast.stmt]) -> None:
        for node in body:
            self._scope.spend(1)
            self._statement(node)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=source):
                value = self._expressions.evaluate(source)
                for target in targets:
                    self._assign(target, value, source.lineno)
            case ast.AnnAssign(target=target, value=source):
                if source is not None:
                    self._assign(target, self._expressions.evaluate(source), source.lineno)
            case ast.AugAssign():
                self._augment(node)
            case ast.Expr(value=source) | ast.Assert(test=source):
                self._expressions.evaluate(source)
            case ast.Import(names=names):
                for alias in names:
                    root = alias.name.partition(".")[0]
                    path = alias.name if alias.asname else root
                    self._scope.bind(alias.asname or root, Reference(path), node.lineno)
            case ast.ImportFrom():
                reason = "a relative import is not followed" if node.level else ""
                self._import(node, reason)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                self._define(node)
            case ast.If(test=test, body=body, orelse=orelse):
                truth = self._expressions.truth(self._expressions.evaluate(test), test.lineno)
                if isinstance(truth, Unknown):
                    self._scope.give_up(node, truth.reason, node.lineno)
                else:
                    self.run(body if truth else orelse)
            case ast.With(items=items, body=body) if any(map(_is_read_base, items)):
                for statement in body:
                    if isinstance(statement, ast.ImportFrom):
                        self._import(statement, _BASE)
                    else:
                        self._scope.give_up(statement, _BASE, statement.lineno)
            case ast.Delete(targets=targets):
                for target in targets:
                    self._delete(target)
            case ast.Pass():
                pass
            case _:
                reason = f"a `{type(node).__name__.lower()}` statement is code, which is not run"
                self._scope.give_up(node, reason, node.lineno)

    def _assign(self, target: ast.expr, value: Value, line: int) -> None:
        match target:
            case ast.Name(id=name):
                self._scope.bind(name, value, line)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                parts = list(value) if isinstance(value, (list, tuple)) else []
                starred = any(isinstance(part, ast.Starred) for part in targets)
                if starred or len(parts) != len(targets):
                    odd = value if isinstance(value, Unknown) else None
                    unknown = odd or Unknown("this unpacking is not read", line)
                    parts = [unknown for _ in targets]
                for part, item in zip(targets, parts, strict=True):
                    self._assign(part, item, line)
            case ast.Starred(value=inner):
                self._assign(inner, value, line)
            case ast.Subscript() | ast.Attribute():
                container, key = self._place(target)
                if isinstance(container, Table) and is_scalar(key):
                    container.put(key, value, line)  # type: ignore[arg-type]
                elif isinstance(container, list) and _is_index(key, container):
                    container[key] = value  # type: ignore[index]
                else:
                    self._scope.give_up(target, "this assignment is not read", line)

    def _place(self, target: ast.Subscript | ast.Attribute) -> tuple[Value, Value]:
        """The container and the key that a target names; an unknown key where there is none."""
        container = self._expressions.evaluate(target.value)
        if isinstance(target, ast.Attribute):
            return container, target.attr
        if isinstance(target.slice, ast.Slice):
            return container, Unknown("a slice", target.lineno)
        return container, self._expressions.evaluate(target.slice)

    def _augment(self, node: ast.AugAssign) -> None:
        old = self._expressions.evaluate(node.target)
        value = self._expressions.evaluate(node.value)
        if isinstance(node.op, ast.Add) and isinstance(old, list):
            # Changes the list in place, also for those who know it by another name.
            try:
                if not isinstance(value, (list, tuple)):
                    raise Unreadable("this addition is not read")
                self._arithmetic.spend_length(len(old) + len(value))
                old.extend(value)
            except Unreadable as error:
                self._scope.give_up(node, str(error), node.lineno)
            return
        if isinstance(old, Table):
            self._scope.give_up(node, "this change of a dict is not read", node.lineno)
            self._assign(node.target, Unknown("this change is not read", node.lineno), node.lineno)
            return
        try:
            new = self._arithmetic.combine(type(node.op), old, value)
        except (Unreadable, ArithmeticError, ValueError, TypeError) as error:
            known = error.unknown if isinstance(error, Unreadable) else None
            new = known or Unknown(str(error)[:80], node.lineno)
        self._assign(node.target, new, node.lineno)

    def _delete(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._scope.unbind(target.id)
            return
        if isinstance(target, ast.Subscript):
            container, key = self._place(target)
            if isinstance(container, Table) and is_scalar(key) and key in container:
                del container[key]  # type: ignore[arg-type]
                return
        self._scope.give_up(target, "this deletion is not read", target.lineno)

    def _import(self, node: ast.ImportFrom, reason: str) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            if alias.name == ANY_NAME:
                why = reason or "a star import is not followed"
                self._scope.forget_all(why, node.lineno)
            elif reason:
                self._scope.bind(name, Unknown(reason, node.lineno), node.lineno)
            else:
                path = f"{node.module}.{alias.name}"
                self._scope.bind(name, Reference(path), node.lineno)

    def _define(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        defined = self._scope.define(node)
        for decorator in node.decorator_list:
            reason = "a decorator is code, which is not run"
            self._scope.give_up(decorator, reason, decorator.lineno)
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self._expressions.evaluate(default)
        if node.decorator_list or isinstance(node, ast.ClassDef):
            self._scope.taint(defined, Unknown(defined.reason, node.lineno))
        self._scope.bind(node.name, defined, node.lineno)


def _is_read_base(item: ast.withitem) -> bool:
    match item.context_expr:
        case ast.Call(func=ast.Name(id="read_base") | ast.Attribute(attr="read_base")):
            return True
    return False


def _is_index(key: Key | Value, container: list[Value]) -> bool:
    return isinstance(key, int) and -len(container) <= key < len(container)
