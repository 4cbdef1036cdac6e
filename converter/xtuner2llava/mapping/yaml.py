"""YAML text as a tree of values that know their lines; nothing else of YAML comes through.

PyYAML's loaders take the last of duplicate keys silently, read `no` as false and `1e-5` as a
string, and `yaml.compose` follows aliases, so that a few bytes can become gigabytes. So the tree is
built from the parser's events, and scalars are resolved by the core schema of YAML 1.2: `true`,
`false`, `null`, integers and floats; all else is a string.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import yaml

from xtuner2llava.errors import Fault, MappingError, raise_faults

# A family is a few kilobytes. The bounds keep a hostile file to a fraction of a second and to a
# few megabytes, and the depth keeps recursion over the tree harmless.
MAX_BYTES = 1 << 20
_MAX_VALUES = 50_000
_MAX_DEPTH = 20
_MAX_NUMBER_LENGTH = 40

_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
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
    if len(data) > MAX_BYTES:
        raise MappingError(
            f"has {len(data):,} bytes, a mapping may have {MAX_BYTES:,}",
            where=name,
            advice="Mappings are short: is this the right file?",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MappingError("is not UTF-8 text", where=f"{name}:{line}") from error
    composer = _Composer(text, name)
    root = composer.root()
    if not isinstance(root, Table) and not composer.faults:
        composer.fault(root.line, "is not a table of keys and values")
    raise_faults(MappingError, composer.faults)
    assert isinstance(root, Table)  # noqa: S101 - else there was a fault
    return Document(name, hashlib.sha256(data).hexdigest(), root)


class _TooLarge(Exception):
    pass


class _Composer:
    """Builds the first document of a text and collects what is wrong with it."""

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name = text, name
        # libyaml, where PyYAML has it, is ten times faster.
        self._events: Iterator[yaml.Event] = yaml.parse(
            text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        self._count, self._line = 0, 1
        self.faults: list[Fault] = []

    def fault(self, line: int, what: str, advice: str = "") -> None:
        self.faults.append(Fault(f"{self._name}:{line}", what, advice))

    def root(self) -> Node:
        """The document's value; an empty list where there is none."""
        root: Node = Items(1, ())
        documents = 0
        try:
            while not isinstance(event := self._next(), yaml.StreamEndEvent):
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        self.fault(self._line, "a second document begins here, a mapping is one")
                        break
                elif isinstance(event, yaml.NodeEvent):
                    root = self._node(event, 0)
        except _TooLarge as error:
            self.fault(self._line, f"has more than {error}, mappings have few")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.fault(mark.line + 1 if mark else 1, f"is not YAML: {error.problem}")
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            self.fault(line, f"is not YAML: {error.reason}")
        return root

    def _next(self) -> yaml.Event:
        event = next(self._events)
        self._line = event.start_mark.line + 1 if event.start_mark else 1
        self._count += 1
        if self._count > _MAX_VALUES:
            raise _TooLarge(f"{_MAX_VALUES:,} values")
        return event

    def _node(self, event: yaml.Event, depth: int, *, key: bool = False) -> Node:
        """The value that begins with `event`; the scalars of a `key` stay strings."""
        line = self._line
        if isinstance(event, yaml.AliasEvent):
            self.fault(line, f"`*{event.anchor}` is an alias, which mappings do not have")
            return Scalar(line, None)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:
            self.fault(line, f"`&{anchor}` is an anchor, which mappings do not have")
        if tag is not None:
            self.fault(line, f"`{tag}` is a tag, which mappings do not have")
        if isinstance(event, yaml.ScalarEvent):
            resolves = event.implicit[0] and not key
            return self._resolve(event.value, line) if resolves else Scalar(line, event.value)
        if depth == _MAX_DEPTH:
            raise _TooLarge(f"{_MAX_DEPTH} levels")
        if isinstance(event, yaml.MappingStartEvent):
            return self._table(line, depth)
        values: list[Node] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            values.append(self._node(event, depth + 1))
        return Items(line, tuple(values))

    def _table(self, line: int, depth: int) -> Table:
        table = Table(line, {}, {})
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event, depth + 1, key=True)
            text = key.value if isinstance(key, Scalar) and isinstance(key.value, str) else ""
            if not isinstance(key, Scalar):
                self.fault(key.line, "a list or table cannot be a key")
            value = self._node(self._next(), depth + 1)
            if text in table.entries:
                what = f"`{text}` is already given in line {table.lines[text]}"
                self.fault(key.line, what, "Keep one of them.")
                continue
            table.entries[text], table.lines[text] = value, key.line
        return table

    def _resolve(self, text: str, line: int) -> Scalar:
        if text in _CONSTANTS:
            return Scalar(line, _CONSTANTS[text])
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
