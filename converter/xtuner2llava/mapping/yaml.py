"""YAML text as a tree of values that know their lines; nothing else of YAML comes through.

PyYAML's own loaders cannot be used as they are: they take the last of duplicate keys silently, read
`no` as false and `1e-5` as a string, and follow aliases, so that a few bytes can become gigabytes.
So this reads the parser's events, without recursion, and resolves scalars by the core schema of
YAML 1.2: `true`, `false`, `null`, integers and floats; all else is a string.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from xtuner2llava.errors import Fault, MappingError, raise_faults

# A family is a few kilobytes. The bounds keep a hostile file to a fraction of a second and to a
# few megabytes, and the depth keeps later recursion over the tree harmless.
_MAX_BYTES = 1 << 20
_MAX_VALUES = 50_000
_MAX_DEPTH = 20
_MAX_NUMBER_LENGTH = 40

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Scalar:
    """A string, number, boolean or null, and the line that it begins on, counted from 1."""

    line: int
    value: str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Items:
    """A list of values."""

    line: int
    values: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Values by key, in the file's order; `lines` says where each key stands."""

    line: int
    entries: dict[str, Node]
    lines: dict[str, int]


Node: TypeAlias = "Scalar | Items | Table"


@dataclass(frozen=True, slots=True)
class Document:
    """A whole file: how errors call it, the SHA-256 of its bytes, and its table."""

    name: str
    sha256: str
    root: Table

    def where(self, line: int) -> str:
        return f"{self.name}:{line}"


def read_document(data: bytes, name: str) -> Document:
    """The table that the YAML text `data` is; `name` stands in errors, as in `qwen.yaml:12`.

    Raises `MappingError` with all faults of the text. A syntax error ends the reading, so it is
    the last one.
    """
    if len(data) > _MAX_BYTES:
        raise MappingError(
            f"has {len(data):,} bytes, a mapping may have {_MAX_BYTES:,}",
            where=name,
            advice="Mappings are short: is this the right file?",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MappingError("is not UTF-8 text", where=f"{name}:{line}") from error
    composer = _Composer(name)
    root = composer.compose(text)
    if not isinstance(root, Table) and not composer.faults:
        composer.fault(root.line, "is not a table of keys and values")
    raise_faults(MappingError, composer.faults)
    assert isinstance(root, Table)  # noqa: S101 - else there was a fault
    return Document(name, hashlib.sha256(data).hexdigest(), root)


@dataclass(slots=True)
class _Open:
    """A list or table whose end has not been read; `keys` is None for a list."""

    line: int
    values: list[Node] = field(default_factory=list)
    keys: list[tuple[str, int]] | None = None

    def wants_key(self) -> bool:
        return self.keys is not None and len(self.keys) == len(self.values)


class _TooLarge(Exception):
    pass


class _Composer:
    """Builds nodes from events and collects what is wrong with them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.faults: list[Fault] = []

    def fault(self, line: int, what: str, advice: str = "") -> None:
        self.faults.append(Fault(f"{self._name}:{line}", what, advice))

    def compose(self, text: str) -> Node:
        """The first document of `text`; an empty list if there is none."""
        nothing = Items(1, ())
        root: Node | None = None
        opened: list[_Open] = []
        count = 0
        try:
            for event in _events(text):
                line = event.start_mark.line + 1 if event.start_mark else 1
                if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                    self.fault(line, "a second document begins here, a mapping is one")
                    break
                node = self._node(event, line, opened)
                count += 1
                if count > _MAX_VALUES or len(opened) > _MAX_DEPTH:
                    raise _TooLarge
                if node is None:
                    continue
                if not opened:
                    root = node
                elif opened[-1].wants_key():
                    self._key(opened[-1], node)
                else:
                    opened[-1].values.append(node)
        except _TooLarge:
            what = "values" if count > _MAX_VALUES else "levels"
            limit = _MAX_VALUES if count > _MAX_VALUES else _MAX_DEPTH
            self.fault(line, f"has more than {limit:,} {what}, mappings have few")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.fault(mark.line + 1 if mark else 1, f"is not YAML: {error.problem}")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.fault(line, f"is not YAML: {error.reason}")
        return nothing if root is None else root

    def _node(self, event: yaml.Event, line: int, opened: list[_Open]) -> Node | None:
        """What `event` completes: a scalar, or the list or table that it ends."""
        if isinstance(event, yaml.AliasEvent):
            self.fault(line, f"`*{event.anchor}` is an alias, which mappings do not have")
            return Scalar(line, None)
        if isinstance(event, yaml.NodeEvent):
            self._plain(event, line)
        if isinstance(event, yaml.ScalarEvent):
            if event.implicit[0] and not (opened and opened[-1].wants_key()):
                return self._resolve(event.value, line)
            return Scalar(line, event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            opened.append(_Open(line))
        elif isinstance(event, yaml.MappingStartEvent):
            opened.append(_Open(line, keys=[]))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = opened.pop()
            if done.keys is None:
                return Items(done.line, tuple(done.values))
            return self._table(done)
        return None

    def _plain(self, event: yaml.NodeEvent, line: int) -> None:
        if event.anchor is not None:
            self.fault(line, f"`&{event.anchor}` is an anchor, which mappings do not have")
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.fault(line, f"`{tag}` is a tag, which mappings do not have")

    def _key(self, table: _Open, node: Node) -> None:
        assert table.keys is not None  # noqa: S101 - only tables want keys
        if isinstance(node, Scalar) and isinstance(node.value, str):
            table.keys.append((node.value, node.line))
        else:
            if not isinstance(node, Scalar):
                self.fault(node.line, "a list or table cannot be a key")
            table.keys.append(("", node.line))

    def _table(self, done: _Open) -> Table:
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for (key, line), value in zip(done.keys or (), done.values, strict=True):
            if key in entries:
                first = lines[key]
                self.fault(line, f"`{key}` is already given in line {first}", "Keep one of them.")
                continue
            entries[key] = value
            lines[key] = line
        return Table(done.line, entries, lines)

    def _resolve(self, text: str, line: int) -> Scalar:
        if text in _NULL:
            return Scalar(line, None)
        if text in _BOOL:
            return Scalar(line, _BOOL[text])
        number: int | float | None = None
        if len(text) <= _MAX_NUMBER_LENGTH:
            if _INTEGER.fullmatch(text):
                number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            elif _FLOAT.fullmatch(text):
                number = float(text)
        if (number is not None and not math.isfinite(number)) or _NOT_FINITE.fullmatch(text):
            self.fault(line, f"`{text}` is not a finite number")
            return Scalar(line, 0)
        return Scalar(line, text if number is None else number)


def _events(text: str) -> Iterator[yaml.Event]:
    """The parser's events, from libyaml where PyYAML has it: that is ten times faster."""
    loader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    yield from yaml.parse(text, Loader=loader)
