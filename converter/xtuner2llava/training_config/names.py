"""The names of a config while it is read, and which of them can no longer be trusted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from xtuner2llava.errors import CheckpointError
from xtuner2llava.training_config.values import (
    ANY_NAME,
    Reference,
    Table,
    Unknown,
    Value,
    limit,
)

_WORK_LIMIT = 4_000_000  # nodes visited, items and characters made
_LENGTH_LIMIT = 1_000_000  # characters or items of one computed value
_NESTING_LIMIT = 64  # of values
_BASE = "it comes from a base config, which is not followed"
_RUNS_OR_REBINDS_ANYTHING = frozenset({"eval", "exec", "globals", "locals", "vars"})


@dataclass(frozen=True, slots=True)
class _Defined(Unknown):
    """A function or class of the config: calling it may change what its body mentions."""

    mentions: frozenset[str]
    rebinds: frozenset[str]


class Names(Table):
    """Names and their values, with the order of work that a hostile text can ask for bounded.

    What is not followed may still change what is known: a call may change the dicts that it is
    given, a loop may bind names. `give_up` makes all of these unknown, so that a value that is
    handed out is the one that running the config would give.
    """

    __slots__ = ("_copies", "_left", "_tainted", "_where")

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        # By identity, since two names may share a dict. The container is kept so that its id stays.
        self._tainted: dict[int, tuple[Value, Unknown]] = {}
        self._copies: dict[int, tuple[Value, int]] = {}
        self._left = _WORK_LIMIT

    def spend(self, work: int) -> None:
        """Counts `work`; raises `CheckpointError` once it is more than any config needs."""
        self._left -= work
        if self._left < 0:
            what = "is not a config: reading it takes more work than any config needs"
            raise CheckpointError(what, where=self._where)

    def make(self, length: int) -> None:
        """Counts the characters or items of a value before it is made."""
        limit(length, _LENGTH_LIMIT)
        self.spend(length)

    def look_up(self, name: str, line: int) -> Value:
        """What `name` stands for on that line."""
        if name in self or ANY_NAME in self:
            return self.get(name, self.get(ANY_NAME))
        if name == "torch":
            # mmengine writes a dtype into the text of a checkpoint's meta as str() gives it,
            # without an import (mmengine/config/config.py, `pretty_text`).
            return Reference("torch")
        return Unknown(f"nothing in the file gives `{name[:80]}` a value", line)

    def trusted(self, value: Value) -> Value:
        """`value`, or why it is not known any more."""
        if isinstance(value, (list, tuple, Table)) and id(value) in self._tainted:
            return self._tainted[id(value)][1]
        return value

    def defined(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    ) -> Unknown:
        """The value of a function or class, whose body is not run now."""
        parts = list(ast.walk(node))
        self.spend(len(parts))
        return _Defined(
            "a function or class of the config itself, which is never run",
            node.lineno,
            frozenset(part.id for part in parts if isinstance(part, ast.Name)),
            frozenset(n for part in parts if isinstance(part, ast.Global) for n in part.names),
        )

    def give_up(self, node: ast.expr | ast.stmt, reason: str, line: int | None = None) -> Unknown:
        """`node` is not followed: all that it binds, and all dicts and lists it could change, are
        unknown from here on."""
        unknown = Unknown(reason, line or node.lineno)
        parts = list(ast.walk(node))
        self.spend(len(parts))
        local = {
            id(name)
            for part in parts
            if isinstance(part, ast.comprehension)
            for name in ast.walk(part.target)
        }
        for part in parts:
            for name in _bound_by(part) if id(part) not in local else ():
                if name == ANY_NAME:
                    self.forget_all(unknown)
                self.put(name, unknown, unknown.line)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                if part.id in self:
                    self.taint(self[part.id], unknown)
                elif part.id in _RUNS_OR_REBINDS_ANYTHING:
                    self.forget_all(unknown)
        return unknown

    def forget_all(self, unknown: Unknown) -> None:
        """After this any name may have any value: `from x import *`."""
        self.spend(len(self))
        for name in (*self, ANY_NAME):
            self.put(name, unknown, unknown.line)

    def taint(self, value: Value, unknown: Unknown) -> None:
        """Makes unknown whatever can be changed through `value`."""
        todo, seen = [value], set[int]()
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            self.spend(1)
            if isinstance(value, _Defined):
                self.spend(len(value.mentions))
                for name in value.rebinds:
                    self.put(name, unknown, unknown.line)
                todo += [self[name] for name in value.mentions if name in self]
            elif isinstance(value, (list, tuple, Table)):
                if not isinstance(value, tuple):
                    self._tainted[id(value)] = (value, unknown)
                todo += value.values() if isinstance(value, Table) else value

    def result(self) -> Table:
        """All names, with what became unknown replaced; shared parts stay shared."""
        if "_base_" in self:
            unknown = Unknown(_BASE, self.lines["_base_"])
            for name, value in self.items():
                if isinstance(value, Table):
                    self.put(name, unknown, unknown.line)
            self.put(ANY_NAME, unknown, unknown.line)
        table = Table()
        for name, value in self.items():
            line = self.lines[name]
            table.put(name, self._copy(value, line, 0)[0], line)
        return table

    def _copy(self, value: Value, line: int, depth: int) -> tuple[Value, int]:
        """A copy without what is not known any more, and how deeply containers lie in it.

        Each is copied once. A list in itself, or nested without end, becomes unknown, on `line`.
        """
        value = self.trusted(value)
        if not isinstance(value, (list, tuple, Table)):
            return value, 0
        if id(value) in self._copies:
            return self._copies[id(value)]
        # Stands until the copy is made: whoever meets it is a part of itself.
        self._copies[id(value)] = (Unknown("it is nested too deeply", line), 0)
        if depth >= _NESTING_LIMIT:
            return self._copies[id(value)]
        parts = value.values() if isinstance(value, Table) else value
        copies = [self._copy(part, line, depth + 1) for part in parts]
        height = 1 + max((height for _, height in copies), default=0)
        if height <= _NESTING_LIMIT:
            made: list[Value] = [copy for copy, _ in copies]
            whole: Value = tuple(made) if isinstance(value, tuple) else made
            if isinstance(value, Table):
                whole = Table()
                for key, copy in zip(value, made, strict=True):
                    whole.put(key, copy, value.lines.get(key, 1))
            self._copies[id(value)] = (whole, height)
        return self._copies[id(value)]


def _bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    # Of functions, classes, exception handlers, patterns and imports.
    names = [getattr(node, field, None) for field in ("asname", "name", "rest")]
    yield from [name.partition(".")[0] for name in names if isinstance(name, str)][:1]
