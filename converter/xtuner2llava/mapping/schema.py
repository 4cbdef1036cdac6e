"""Checked access to a document: what is of the wrong kind becomes a fault with its line.

Readers go on after a fault, with an empty value in its place, so that one error lists all that is
wrong with a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.expression import Expression, parse_expression
from xtuner2llava.mapping.names import Template, nearest, parse_name, parse_template
from xtuner2llava.mapping.values import show
from xtuner2llava.mapping.yaml import Document, Items, Node, Scalar, Table

SCHEMA = 1
_T = TypeVar("_T")


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

    def root(self, kind: str, keys: Collection[str]) -> Table:
        """The document's table, whose `schema`, `kind` and keys have been checked."""
        root = self.document.root
        self.keys(root, ("schema", kind, *keys), f"a {kind}")
        schema = root.entries.get("schema")
        if schema is None:
            self.fault(root.line, "`schema` is missing", f"Begin the file with `schema: {SCHEMA}`.")
        elif not (isinstance(schema, Scalar) and schema.value == SCHEMA):
            found = show(schema.value) if isinstance(schema, Scalar) else "no number"
            self.fault(schema.line, f"`schema` is {found}, this version reads {SCHEMA}")
        return root

    def keys(self, table: Table, allowed: Collection[str], what: str) -> None:
        """Faults for the keys that `what` does not have."""
        for key, line in table.lines.items():
            if key not in allowed:
                near = nearest(key, list(allowed))
                advice = f"Did you mean `{near}`?" if near else f"It has: {', '.join(allowed)}."
                self.fault(line, f"{what} has no key `{key}`", advice)

    def required(self, table: Table, key: str, what: str) -> Node | None:
        node = table.entries.get(key)
        if node is None:
            self.fault(table.line, f"{what} needs `{key}`")
        return node

    def table(self, node: Node | None, what: str) -> Table:
        """`node` as a table; an empty one where it is absent or something else."""
        if isinstance(node, Table):
            return node
        if node is not None:
            self.fault(node.line, f"{what} is a table of keys and values")
        return Table(node.line if node else self.document.root.line, {}, {})

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

    def texts(self, node: Node | None, what: str) -> tuple[str, ...]:
        """One text, or a list of them."""
        if isinstance(node, Items):
            return tuple(self.text(value, what) for value in node.values)
        return (self.text(node, what),) if node is not None else ()

    def flag(self, node: Node | None, what: str) -> bool:
        if isinstance(node, Scalar) and isinstance(node.value, bool):
            return node.value
        if node is not None:
            self.fault(node.line, f"{what} is true or false")
        return False

    def constant(self, node: Node) -> object:
        """The value as plain data: scalars, lists and dictionaries with text keys."""
        if isinstance(node, Scalar):
            return node.value
        if isinstance(node, Items):
            return [self.constant(value) for value in node.values]
        return {key: self.constant(value) for key, value in node.entries.items()}

    def constants(self, node: Node | None, what: str) -> Iterator[tuple[str, int, object]]:
        """Key, line and value of each entry of a table."""
        table = self.table(node, what)
        for key, value in table.entries.items():
            yield key, table.lines[key], self.constant(value)

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

    def expressions(self, node: Node | None, what: str) -> tuple[Expression, ...]:
        return tuple(self.expression(value, what) for value in self.items(node, what))

    def formulas(self, node: Node | None, what: str) -> Iterator[tuple[str, Expression]]:
        """Key and expression of each entry of a table."""
        table = self.table(node, what)
        for key, value in table.entries.items():
            yield key, self.expression(value, f"`{key}`")

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

    def found(self, table: Table, key: str, find: Callable[[str], _T]) -> _T | None:
        """What `find` gives for the name under `key`; None where there is no such thing.

        Faults inside the file that is named are that file's.
        """
        node = table.entries.get(key)
        name = self.text(node, f"`{key}`")
        if node is None or not name:
            return None
        try:
            return find(name)
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
