"""YAML bound to frozen dataclasses: what is of the wrong kind becomes a fault with its line.

A dataclass says what a table may hold: its fields are the keys, and their types the kinds of value.
A field without default is required, and `where` is filled with the table's place. The key is the
field's name without an underscore at its end, or what its metadata says. `Annotated` adds what
messages call a value, or the function that reads it. Binding goes on after a fault, with an empty
value in its place, so that one error lists all that is wrong with a file.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.expressions import Expression, parse_expression, show
from xtuner2llava.mapping.names import Template, nearest, parse_name, parse_template
from xtuner2llava.mapping.yaml import Document, Items, Node, Scalar, Table

SCHEMA = 1
_T = TypeVar("_T")


class _Key(NamedTuple):
    name: str
    field: str
    kind: Any
    required: bool


@cache
def _keys_of(kind: type) -> tuple[_Key, ...]:
    """The keys of a table that is bound to the dataclass `kind`."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _Key(
            field.metadata.get("key", field.name.rstrip("_")),
            field.name,
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
        if field.init and field.name != "where"
    )


class Reader:
    """One document, the faults found in it so far, and the config keys that it looks at."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[Fault] = []
        self.names_read: set[str] = set()

    def where(self, line: int) -> str:
        return self.document.where(line)

    def fault(self, line: int, what: str, advice: str = "") -> None:
        self.faults.append(Fault(self.where(line), what, advice))

    def finish(self) -> None:
        """Raises `MappingError` with all faults, if there are any, in the order of their lines."""

        def line(fault: Fault) -> int:
            digits = fault.where.rpartition(":")[2]
            return int(digits) if digits.isdecimal() else 0

        raise_faults(MappingError, list(dict.fromkeys(sorted(self.faults, key=line))))

    def root(self, kind: type[_T], title: str) -> _T:
        """The document's table as `kind`, after its `schema`."""
        root = self.document.root
        schema = root.entries.get("schema")
        if schema is None:
            self.fault(root.line, "`schema` is missing", f"Begin the file with `schema: {SCHEMA}`.")
        elif not (isinstance(schema, Scalar) and schema.value == SCHEMA):
            found = show(schema.value) if isinstance(schema, Scalar) else "no number"
            self.fault(schema.line, f"`schema` is {found}, this version reads {SCHEMA}")
        return self.bind(kind, root, title, ("schema",))

    def bind(
        self,
        kind: type[_T],
        table: Table,
        title: str,
        besides: tuple[str, ...] = (),
        **given: object,
    ) -> _T:
        """`table` as the dataclass `kind`, whose fields `given` the table has no keys for.

        The table may also have the keys `besides`.
        """
        keys = [key for key in _keys_of(kind) if key.field not in given]  # type: ignore[arg-type]
        self.keys(table, (*besides, *(key.name for key in keys)), title)
        values: dict[str, Any] = dict(given)
        for key in keys:
            node = table.entries.get(key.name)
            if node is None and key.required:
                self.fault(table.line, f"{title} needs `{key.name}`")
            if node is not None or key.required:
                values[key.field] = self.value(key.kind, node, f"`{key.name}`")
        if any(field.name == "where" for field in fields(kind)):  # type: ignore[arg-type]
            values["where"] = self.where(table.line)
        return kind(**values)

    def value(self, kind: Any, node: Node | None, what: str) -> Any:
        """`node` as the type `kind`; what is absent, or something else, is empty."""
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            if callable(arguments[1]):
                return arguments[1](self, node)
            return self.value(arguments[0], node, arguments[1])
        if origin in (Union, types.UnionType):
            return None if node is None else self.value(arguments[0], node, what) or None
        if origin is tuple:
            return self._tuple(arguments[0], node, what)
        if origin is not None and issubclass(origin, Mapping):
            entries = self.table(node, what).entries
            return {key: self.value(arguments[1], n, f"`{key}`") for key, n in entries.items()}
        if is_dataclass(kind) and kind not in (Expression, Template):
            title = getattr(kind, "TITLE", what)
            return self.bind(kind, self.table(node, title), title)  # type: ignore[arg-type]
        readers: dict[Any, Callable[[Node | None, str], Any]] = {
            str: self.text,
            bool: self.flag,
            Expression: self.expression,
            Template: self.sentence,
            object: lambda node, _: self.constant(node),
        }
        return readers[kind](node, what)

    def _tuple(self, kind: Any, node: Node | None, what: str) -> tuple[Any, ...]:
        """The values of a list; a single text is a list of one."""
        if kind is str and node is not None and not isinstance(node, Items):
            return (self.text(node, what),)
        return tuple(self.value(kind, item, what) for item in self.items(node, what))

    def keys(self, table: Table, allowed: Collection[str], what: str) -> None:
        """Faults for the keys that `what` does not have."""
        for key, line in table.lines.items():
            if key not in allowed:
                near = nearest(key, list(allowed))
                advice = f"Did you mean `{near}`?" if near else f"It has: {', '.join(allowed)}."
                self.fault(line, f"{what} has no key `{key}`", advice)

    def table(self, node: Node | None, what: str) -> Table:
        """`node` as a table; an empty one where it is absent or something else."""
        if isinstance(node, Table):
            return node
        if node is not None:
            self.fault(node.line, f"{what} is a table of keys and values")
        return Table(node.line if node else self.document.root.line, {}, {})

    def entries(self, node: Node | None, what: str) -> Iterator[tuple[str, int, Node]]:
        """Key, line and value of each entry of a table."""
        table = self.table(node, what)
        for key, value in table.entries.items():
            yield key, table.lines[key], value

    def items(self, node: Node | None, what: str) -> tuple[Node, ...]:
        """The values of a list; none where it is absent or something else."""
        if isinstance(node, Items):
            return node.values
        if node is not None:
            self.fault(node.line, f"{what} is a list")
        return ()

    def text(self, node: Node | None, what: str) -> str:
        """A string; empty where it is absent or something else."""
        if isinstance(node, Scalar) and isinstance(node.value, str) and node.value:
            return node.value
        if node is not None:
            self.fault(node.line, f"{what} is a text")
        return ""

    def flag(self, node: Node | None, what: str) -> bool:
        if isinstance(node, Scalar) and isinstance(node.value, bool):
            return node.value
        if node is not None:
            self.fault(node.line, f"{what} is true or false")
        return False

    def constant(self, node: Node | None) -> object:
        """The value as plain data: scalars, lists and dictionaries with text keys."""
        if isinstance(node, Items):
            return [self.constant(value) for value in node.values]
        if isinstance(node, Table):
            return {key: self.constant(value) for key, value in node.entries.items()}
        return None if node is None else node.value

    def expression(self, node: Node | None, what: str) -> Expression:
        """A number or an expression; null where it is neither, or absent."""
        line = node.line if node is not None else self.document.root.line
        if isinstance(node, Scalar) and node.value is not None:
            try:
                expression = parse_expression(node.value, self.where(line))
                self.names_read |= expression.names
                return expression
            except MappingError as error:
                self.faults.extend(error.faults)
        elif node is not None:
            self.fault(line, f"{what} is a number or an expression")
        return parse_expression(None, self.where(line))

    def name(self, text: str, line: int, *, glob: bool = False) -> Template:
        """A tensor name with its placeholders; a fault at `line` where `text` cannot be one."""
        return self._template(text, line, lambda: parse_name(text, glob=glob))

    def sentence(self, node: Node | None, what: str) -> Template:
        """A text for people, with placeholders for config keys."""
        text = self.text(node, what)
        line = node.line if node is not None else self.document.root.line
        template = self._template(text, line, lambda: parse_template(text))
        self.names_read.update(name.partition(".")[0] for name in template.variables)
        return template

    def found(self, key: str, find: Callable[[str], _T]) -> _T | None:
        """What `find` gives for the name under the root's `key`; None where there is nothing.

        Faults inside the file that is named are that file's.
        """
        node = self.document.root.entries.get(key)
        if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
            return None
        try:
            return find(node.value)
        except MappingError as error:
            for fault in error.faults:
                where = fault.where or self.where(node.line)
                self.faults.append(Fault(where, fault.what, fault.advice))
            return None

    def _template(self, text: str, line: int, parse: Callable[[], Template]) -> Template:
        try:
            return parse()
        except ValueError as error:
            self.fault(line, str(error))
            return Template(text, (text,))
