"""YAML bound to frozen dataclasses: what is of the wrong kind becomes a fault with its line.

A dataclass says what a table may hold: its fields are the keys, and their types the kinds of value.
A field without default is required, and `where` is filled with the table's place. The key is the
field's name without an underscore at its end, or what `key` names; `GIVEN` ones have none.
`Annotated` adds what messages call a value, or the function that reads it. Binding goes on after a
fault, with an empty value in its place, so that one error lists all that is wrong with a file.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.expressions import Expression, parse_expression, show
from xtuner2llava.mapping.names import TextTemplate, advice_for, parse_name, parse_template
from xtuner2llava.mapping.yaml import Document, Node

SCHEMA = 1
# What a key that a table does not have is read from.
ABSENT = Node(1, 1, None)
_T = TypeVar("_T")


# The metadata of a field that has no key: the caller of `bind` gives it, or it keeps its default.
GIVEN: Mapping[str, None] = {"key": None}


def key(name: str) -> Mapping[str, str]:
    """The metadata of a field that YAML calls `name`."""
    return {"key": name}


class _Key(NamedTuple):
    name: str
    field: str
    kind: Any
    required: bool


@cache
def _keys_of(kind: Any) -> tuple[_Key, ...]:
    """The keys of a table that is bound to the dataclass `kind`."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _Key(
            name,
            field.name,
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
        if (name := field.metadata.get("key", field.name.rstrip("_"))) and field.name != "where"
    )


class Reader:
    """One document, the faults found in it so far, and the config keys that it looks at.

    `variables` are those of the loops around what is being read, and `used` the ones that names
    have mentioned.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[Fault] = []
        self.names_read: set[str] = set()
        self.variables: frozenset[str] = frozenset()
        self.used: set[str] = set()

    def where(self, line: int) -> str:
        return self.document.where(line)

    def fault(self, line: int, what: str, advice: str = "") -> None:
        self.faults.append(Fault(self.where(line), what, advice))

    def finish(self) -> None:
        """Raises `MappingError` with all faults, if there are any, in the order of their lines."""

        def line(fault: Fault) -> int:
            digits = fault.where.rpartition(":")[2]
            return int(digits) if digits.isdecimal() else 0

        raise_faults(MappingError, sorted(self.faults, key=line))

    def root(
        self, kind: type[_T], title: str, besides: Collection[str] = (), **given: object
    ) -> _T:
        """The document's table as `kind`, after its `schema`; see `bind`."""
        root = Node(self.document.line, self.document.line, self.document.table)
        schema = self.document.table.get("schema")
        if schema is None:
            self.fault(root.line, "`schema` is missing", f"Begin the file with `schema: {SCHEMA}`.")
        elif schema.value != SCHEMA:
            found = "not a number" if isinstance(schema.value, list | dict) else show(schema.value)
            self.fault(schema.line, f"`schema` is {found}, this version reads {SCHEMA}")
        return self.bind(kind, root, title, ("schema", *besides), **given)

    def bind(
        self, kind: type[_T], node: Node, title: str, besides: Collection[str] = (), **given: object
    ) -> _T:
        """A table as the dataclass `kind`, whose fields `given` have no keys in it.

        It may also have the keys `besides`.
        """
        table = self.table(node, title)
        keys = [key for key in _keys_of(kind) if key.field not in given]  # type: ignore[arg-type]
        self.keys(table, (*besides, *(key.name for key in keys)), title)
        values: dict[str, Any] = dict(given)
        if "where" in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            values["where"] = self.where(node.line)
        for key in keys:
            if key.required and key.name not in table:
                self.fault(node.line, f"{title} needs `{key.name}`")
            if key.required or key.name in table:
                found = table.get(key.name, ABSENT)
                values[key.field] = self.value(key.kind, found, f"`{key.name}`")
        return kind(**values)

    def value(self, kind: Any, node: Node, what: str) -> Any:
        """`node` as the type `kind`; what is absent, or something else, is empty."""
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            if callable(arguments[1]):
                return arguments[1](self, node)
            return self.value(arguments[0], node, arguments[1])
        if origin in (Union, types.UnionType):
            return None if node is ABSENT else self.value(arguments[0], node, what) or None
        if origin is tuple:
            # A single text is a list of one.
            single = arguments[0] is str and node is not ABSENT and not isinstance(node.value, list)
            items = [node] if single else self.items(node, what)
            return tuple(self.value(arguments[0], item, what) for item in items)
        if origin is not None and issubclass(origin, Mapping):
            entries = self.table(node, what).items()
            return {key: self.value(arguments[1], value, f"`{key}`") for key, value in entries}
        readers: dict[Any, Callable[[Node, str], Any]] = {
            str: self.text,
            bool: self.flag,
            float: self.number,
            Expression: self.expression,
            TextTemplate: self.sentence,
            object: lambda node, _: self.constant(node),
        }
        if kind in readers:
            return readers[kind](node, what)
        return self.bind(kind, node, getattr(kind, "TITLE", what))

    def keys(self, table: Mapping[str, Node], allowed: Collection[str], what: str) -> None:
        """Faults for the keys that `what` does not have."""
        for key, node in table.items():
            if key not in allowed:
                advice = advice_for(key, [*allowed], f"It has: {', '.join(allowed)}.")
                self.fault(node.key_line, f"{what} has no key `{key}`", advice)

    def table(self, node: Node, what: str) -> dict[str, Node]:
        if isinstance(node.value, dict):
            return node.value
        self._wrong(node, f"{what} is a table of keys and values")
        return {}

    def items(self, node: Node, what: str) -> list[Node]:
        if isinstance(node.value, list):
            return node.value
        self._wrong(node, f"{what} is a list")
        return []

    def text(self, node: Node, what: str) -> str:
        """A text that is not empty."""
        if isinstance(node.value, str) and node.value:
            return node.value
        self._wrong(node, f"{what} is a text")
        return ""

    def flag(self, node: Node, what: str) -> bool:
        if isinstance(node.value, bool):
            return node.value
        self._wrong(node, f"{what} is true or false")
        return False

    def number(self, node: Node, what: str) -> float:
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return float(node.value)
        self._wrong(node, f"{what} is a number")
        return 0.0

    def constant(self, node: Node) -> object:
        """The value as plain data: scalars, lists and dictionaries with text keys."""
        if isinstance(node.value, list):
            return [self.constant(item) for item in node.value]
        if isinstance(node.value, dict):
            return {key: self.constant(value) for key, value in node.value.items()}
        return node.value

    def texts(self, node: Node, what: str, allowed: Collection[str]) -> dict[str, str]:
        """A table of texts with the keys `allowed`."""
        table = self.table(node, what)
        self.keys(table, allowed, what)
        return {key: self.text(value, f"`{key}`") for key, value in table.items()}

    def expression(self, node: Node, what: str) -> Expression:
        """A number or an expression; null where it is something else."""
        if not isinstance(node.value, list | dict | None):
            try:
                expression = parse_expression(node.value, self.where(node.line))
                self.names_read |= expression.names
                return expression
            except MappingError as error:
                self.faults.extend(error.faults)
        else:
            self._wrong(node, f"{what} is a number or an expression")
        return parse_expression(None, self.where(node.line))

    def sentence(self, node: Node, what: str) -> TextTemplate:
        """A text for people, with placeholders for config keys."""
        template = self._template(node.line, parse_template, self.text(node, what))
        self.names_read.update(name.partition(".")[0] for name in template.variables)
        return template

    def name(self, text: str, line: int, *, glob: bool = False) -> TextTemplate:
        """A tensor name, whose placeholders are loop variables."""
        name = self._template(line, lambda text: parse_name(text, glob=glob), text)
        for variable in name.variables:
            if variable not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none here"
                what = f"`{text}`: `{variable}` is not a loop variable"
                self.fault(line, what, f"Known loop variables: {known}.")
        self.used.update(name.variables)
        return name

    def found(self, key: str, find: Callable[[str], _T]) -> _T | None:
        """What `find` gives for the name under the root's `key`; None where there is nothing.

        Faults inside the file that is named are that file's.
        """
        node = self.document.table.get(key, ABSENT)
        name = self.text(node, f"`{key}`")
        if not name:
            return None
        try:
            return find(name)
        except MappingError as error:
            for fault in error.faults:
                where = fault.where or self.where(node.line)
                self.faults.append(Fault(where, fault.what, fault.advice))
            return None

    def _template(self, line: int, parse: Callable[[str], TextTemplate], text: str) -> TextTemplate:
        try:
            return parse(text)
        except ValueError as error:
            self.fault(line, str(error))
            return TextTemplate(text, (text,))

    def _wrong(self, node: Node, what: str) -> None:
        if node is not ABSENT:
            self.fault(node.line, what)
