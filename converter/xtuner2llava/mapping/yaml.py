"""YAML text as a tree of values that know their lines; nothing else of YAML is accepted.

PyYAML's loaders take the last of duplicate keys silently, read `no` as false and `1e-5` as a
string, and `yaml.compose` follows aliases, so that a few bytes can become gigabytes. So the tree is
built from the parser's events, and scalars are resolved by the core schema of YAML 1.2: `true`,
`false`, `null`, integers and floats; all else is a string.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import TypeAlias

import yaml

from xtuner2llava.errors import Fault, MappingError

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
# The parser compares each with all before it.
_DIRECTIVE = re.compile(r"(?:\A|[\n\r\x85\u2028\u2029])%")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a list, or a table in the file's order.

    `line` is the one that it begins on, counted from 1, and `key_line` that of its key: the two are
    the same for the items of a list.
    """

    line: int
    key_line: int
    value: Scalar | list[Node] | dict[str, Node]

    @property
    def data(self) -> object:
        """The value as plain data: scalars, lists, and dictionaries with text keys."""
        if isinstance(self.value, list):
            return [item.data for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.data for key, item in self.value.items()}
        return self.value


@dataclass(frozen=True, slots=True)
class Document:
    """A whole file: its name in errors and records, the SHA-256 of its bytes, and its table."""

    name: str
    sha256: str
    line: int
    table: dict[str, Node]

    def where(self, line: int) -> str:
        return f"{self.name}:{line}"


def read_document(data: bytes, name: str) -> Document:
    """The table in the YAML text `data`; errors name the file as in `qwen.yaml:12`.

    Raises `MappingError` with all faults of the text. A syntax error ends the reading, so it is
    the last one.
    """
    if len(data) > MAX_BYTES:
        raise MappingError(
            f"has {len(data):,} bytes, expected at most {MAX_BYTES:,}",
            where=name,
            advice="Is this the right file?",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MappingError("is not UTF-8 text", where=f"{name}:{line}") from error
    if found := _DIRECTIVE.search(text):
        line = text.count("\n", 0, found.end()) + 1
        what = "`%` begins a directive, which is not read here"
        raise MappingError(what, where=f"{name}:{line}")
    composer = _Composer(text, name)
    root = composer.root()
    if isinstance(root.value, dict) and not composer.faults:
        return Document(name, hashlib.sha256(data).hexdigest(), root.line, root.value)
    if not composer.faults:
        composer.fault(root.line, "is not a table of keys and values")
    raise MappingError.from_faults(composer.faults)


class _TooLarge(Exception):
    pass


class _Composer:
    """Builds the first document of a text and collects what is wrong with it."""

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name = text, name
        # libyaml, where PyYAML has it, is ten times faster.
        self._events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self._count, self._line = 0, 1
        self.faults: list[Fault] = []

    def fault(self, line: int, what: str, advice: str = "") -> None:
        self.faults.append(Fault(f"{self._name}:{line}", what, advice))

    def root(self) -> Node:
        """The document's value; null where there is none."""
        root: Node | None = None
        try:
            while not isinstance(event := self._next(), yaml.StreamEndEvent):
                if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                    self.fault(self._line, "a second document begins here, expected one")
                    break
                if isinstance(event, yaml.NodeEvent):
                    root = self._node(event, 0)
        except _TooLarge as error:
            self.fault(self._line, f"has more than {error}")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.fault(mark.line + 1 if mark else 1, f"is not YAML: {error.problem}")
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            self.fault(line, f"is not YAML: {error.reason}")
        return root or Node(1, 1, None)

    def _next(self) -> yaml.Event:
        event = next(self._events)
        self._line = event.start_mark.line + 1 if event.start_mark else 1
        self._count += 1
        if self._count > _MAX_VALUES:
            raise _TooLarge(f"{_MAX_VALUES:,} values")
        return event

    def _node(self, event: yaml.Event, depth: int, key_line: int = 0) -> Node:
        """The value that begins with `event`."""
        line = self._line
        key_line = key_line or line
        if isinstance(event, yaml.AliasEvent):
            self.fault(line, f"`*{event.anchor}` is an alias, which is not read here")
            return Node(line, key_line, None)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:
            self.fault(line, f"`&{anchor}` is an anchor, which is not read here")
        if tag is not None:
            self.fault(line, f"`{tag}` is a tag, which is not read here")
        if isinstance(event, yaml.ScalarEvent):
            value = self._resolve(event.value, line) if event.implicit[0] else event.value
            return Node(line, key_line, value)
        if depth == _MAX_DEPTH:
            raise _TooLarge(f"{_MAX_DEPTH} levels")
        if isinstance(event, yaml.MappingStartEvent):
            return Node(line, key_line, self._table(depth))
        items: list[Node] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return Node(line, key_line, items)

    def _table(self, depth: int) -> dict[str, Node]:
        table: dict[str, Node] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            line = self._line
            # Keys stay texts as written.
            key = self._node(event, depth + 1)
            text = event.value if isinstance(event, yaml.ScalarEvent) else ""
            if isinstance(key.value, list | dict):
                self.fault(line, "a list or table cannot be a key")
            value = self._node(self._next(), depth + 1, line)
            if text in table:
                what = f"`{text}` is already given in line {table[text].key_line}"
                self.fault(line, what, "Keep one of them.")
            else:
                table[text] = value
        return table

    def _resolve(self, text: str, line: int) -> Scalar:
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        number: int | float | None = None
        if len(text) <= _MAX_NUMBER_LENGTH:
            if _INTEGER.fullmatch(text):
                number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            elif _FLOAT.fullmatch(text):
                number = float(text)
        if (number is not None and not math.isfinite(number)) or _NOT_FINITE.fullmatch(text):
            self.fault(line, f"`{text}` is not a finite number")
            return 0
        return text if number is None else number
