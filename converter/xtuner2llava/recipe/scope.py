"""The names of a config while it is read, and which of them can no longer be trusted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from xtuner2llava.errors import CheckpointError
from xtuner2llava.recipe.values import Reference, Table, Unknown, Value

ANY_NAME = "*"  # no identifier, so it cannot clash
_WORK_LIMIT = 4_000_000  # nodes visited, items and characters made
_NESTING_LIMIT = 64
_RUNS_OR_REBINDS_ANYTHING = frozenset({"eval", "exec", "globals", "locals", "vars"})

_Container = (list, tuple, Table)


@dataclass(frozen=True, slots=True)
class _Defined(Unknown):
    """A function or class of the config: calling it may change what its body mentions."""

    mentions: frozenset[str]
    rebinds: frozenset[str]


class Scope:
    """Names and their values, with the order of work that a hostile text can ask for bounded.

    What is not followed may still change what is known: a call may change the dicts that it is
    given, a loop may bind names. `give_up` makes all of these unknown, so that a value that is
    handed out is the one that running the config would give.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._names = Table()
        # By identity, since two names may share a dict. The container is kept so that its id stays.
        self._tainted: dict[int, tuple[Value, Unknown]] = {}
        self._left = _WORK_LIMIT

    def spend(self, work: int) -> None:
        """Counts `work`; raises `CheckpointError` once it is more than any config needs."""
        self._left -= work
        if self._left < 0:
            raise CheckpointError(
                "is no config: reading it takes more work than any config needs",
                where=self._where,
            )

    def bind(self, name: str, value: Value, line: int) -> None:
        self._names.put(name, value, line)

    def unbind(self, name: str) -> None:
        self._names.pop(name, None)

    def is_bound(self, name: str) -> bool:
        return name in self._names

    def look_up(self, name: str, line: int) -> Value:
        if name in self._names:
            return self.trusted(self._names[name])
        if ANY_NAME in self._names:
            return self._names[ANY_NAME]
        if name == "torch":
            # mmengine writes a dtype into the text of a checkpoint's meta as str() gives it,
            # without an import (mmengine/config/config.py, `pretty_text`).
            return Reference("torch")
        return Unknown(f"nothing in the file gives `{name[:80]}` a value", line)

    def trusted(self, value: Value) -> Value:
        """`value`, or why it is not known any more."""
        if isinstance(value, _Container) and id(value) in self._tainted:
            return self._tainted[id(value)][1]
        return value

    def forget_all(self, reason: str, line: int) -> None:
        """After this any name may have any value: `from x import *`."""
        unknown = Unknown(reason, line)
        for name in list(self._names):
            self._names.put(name, unknown, line)
        self.spend(len(self._names))
        self._names.put(ANY_NAME, unknown, line)

    def forget_tables(self, reason: str, because: str) -> None:
        """What `_base_` does: names that are not here, and keys of dicts, come from elsewhere.

        `because` is the name whose line the unknown values bear.
        """
        unknown = Unknown(reason, self._names.lines.get(because, 1))
        line = unknown.line
        for name, value in list(self._names.items()):
            if isinstance(value, Table):
                self._names.put(name, unknown, line)
        self._names.put(ANY_NAME, unknown, line)

    def define(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    ) -> Unknown:
        """The value of a function or class, whose body is not run now."""
        mentions, rebinds = set(), set()
        for part in ast.walk(node):
            self.spend(1)
            if isinstance(part, ast.Name):
                mentions.add(part.id)
            elif isinstance(part, ast.Global):
                rebinds.update(part.names)
        reason = "a function or class of the config itself, which is never run"
        return _Defined(reason, node.lineno, frozenset(mentions), frozenset(rebinds))

    def give_up(self, node: ast.AST, reason: str, line: int) -> Unknown:
        """`node` is not followed: all that it binds, and all dicts and lists it could change, are
        unknown from here on."""
        unknown = Unknown(reason, line)
        local = {
            id(name)
            for part in ast.walk(node)
            if isinstance(part, ast.comprehension)
            for name in ast.walk(part.target)
        }
        for part in ast.walk(node):
            self.spend(1)
            for name in _bound_by(part) if id(part) not in local else ():
                self.bind(name, unknown, line)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                if part.id in self._names:
                    self.taint(self._names[part.id], unknown)
                elif part.id in _RUNS_OR_REBINDS_ANYTHING:
                    self.forget_all(reason, line)
        return unknown

    def taint(self, value: Value, unknown: Unknown) -> None:
        """Makes unknown whatever can be changed through `value`."""
        todo, seen = [value], set()
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            self.spend(1)
            if isinstance(value, _Defined):
                self.spend(len(value.mentions))
                for name in value.rebinds:
                    self.bind(name, unknown, unknown.line)
                todo += [self._names[name] for name in value.mentions if name in self._names]
            elif isinstance(value, _Container):
                if not isinstance(value, tuple):
                    self._tainted[id(value)] = (value, unknown)
                todo += value.values() if isinstance(value, Table) else value

    def result(self) -> Table:
        """All names, with what became unknown replaced; shared parts stay shared."""
        table, freezer = Table(), _Freezer(self)
        for name, value in self._names.items():
            line = self._names.lines[name]
            table.put(name, freezer.freeze(value, line), line)
        return table


def _bound_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.alias(name=name, asname=asname):
            yield asname or name.partition(".")[0]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            yield name
        case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            yield name


class _Freezer:
    """Copies values once each; a list in itself, or nested without end, becomes unknown."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._line = 1
        self._done: dict[int, tuple[Value, int]] = {}

    def freeze(self, value: Value, line: int) -> Value:
        """The copy of what is bound on `line`."""
        self._line = line
        return self._copy(value, 0)[0]

    def _copy(self, value: Value, depth: int) -> tuple[Value, int]:
        """The copy and its height: how many containers lie within each other."""
        trusted = self._scope.trusted(value)
        if not isinstance(trusted, _Container):
            return trusted, 0
        if id(value) in self._done:
            return self._done[id(value)]
        # Stands until the copy is made: whoever meets it is a part of itself.
        self._done[id(value)] = (Unknown("it is nested too deeply", self._line), 0)
        if depth >= _NESTING_LIMIT:
            return self._done[id(value)]
        parts = trusted.values() if isinstance(trusted, Table) else trusted
        copies = [self._copy(part, depth + 1) for part in parts]
        height = 1 + max((height for _, height in copies), default=0)
        if height <= _NESTING_LIMIT:
            self._done[id(value)] = (_rebuilt(trusted, [copy for copy, _ in copies]), height)
        return self._done[id(value)]


def _rebuilt(old: Table | list[Value] | tuple[Value, ...], parts: list[Value]) -> Value:
    if isinstance(old, Table):
        table = Table()
        for key, part in zip(old, parts, strict=True):
            table.put(key, part, old.lines.get(key, 1))
        return table
    return parts if isinstance(old, list) else tuple(parts)
