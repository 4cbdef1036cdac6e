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
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.expressions import Expression, parse_expression, show
from xtuner2llava.mapping.names import TextTemplate, advice_for, parse_name, parse_template
from xtuner2llava.mapping.yaml import Document, Node

SCHEMA = 1
# What a key that a table does not have is read from.
ABSENT = Node(1, 1, None)
# The metadata of a field that has no key: the caller of `bind` gives it, or it keeps its default.
GIVEN: Mapping[str, None] = {"key": None}
_T = TypeVar("_T")
# What the types of plain values are in YAML and JSON, and what messages call them.
KINDS: Mapping[type, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    list: ((list,), "a list"),
    dict: ((dict,), "a table of keys and values"),
}


def key(name: str) -> Mapping[str, str]:
    """The metadata of a field that YAML calls `name`."""
    return {"key": name}


@cache
def _keys_of(kind: Any) -> Mapping[str, tuple[Field[Any], Any]]:
    """The fields of the dataclass `kind` and their types, by the keys of a table bound to it."""
    hints = get_type_hints(kind, include_extras=True)
    keys = {each.metadata.get("key", each.name.rstrip("_")): each for each in fields(kind)}
    return {
        name: (each, hints[each.name]) for name, each in keys.items() if name not in (None, "where")
    }


class Reader:
    """One document, the faults found in it so far, and the config keys that it looks at.

    `variables` are those of the loops around what is being read, and `used` the ones that names
    have mentioned.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.where = document.where
        self.faults: list[Fault] = []
        self.names_read: set[str] = set()
        self.variables: frozenset[str] = frozenset()
        self.used: set[str] = set()

    def fault(self, line: int, what: str, advice: str = "") -> None:
        self.faults.append(Fault(self.where(line), what, advice))

    def finish(self) -> None:
        """Raises `MappingError` with all faults, if there are any, in the order of their lines."""
        lines = {fault: fault.where.rpartition(":")[2] for fault in self.faults}
        in_order = sorted(lines, key=lambda f: int(lines[f]) if lines[f].isdecimal() else 0)
        raise_faults(MappingError, in_order)

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
        every = _keys_of(kind)  # type: ignore[arg-type]
        keys = {name: found for name, found in every.items() if found[0].name not in given}
        table = self.table(node, title, (*besides, *keys))
        values: dict[str, Any] = dict(given)
        if "where" in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            values["where"] = self.where(node.line)
        for name, (each, hint) in keys.items():
            required = each.default is MISSING and each.default_factory is MISSING
            if required and name not in table:
                self.fault(node.line, f"{title} needs `{name}`")
            if required or name in table:
                values[each.name] = self.value(hint, table.get(name, ABSENT), f"`{name}`")
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
            items = [node] if single else self.plain(list, node, what)
            return tuple(self.value(arguments[0], item, what) for item in items)
        if origin is not None and issubclass(origin, Mapping):
            entries = self.table(node, what).items()
            return {key: self.value(arguments[1], value, f"`{key}`") for key, value in entries}
        if kind in KINDS:
            return self.plain(kind, node, what)
        readers: dict[Any, Callable[[Node, str], Any]] = {
            Expression: self.expression,
            TextTemplate: self.sentence,
            object: lambda node, _: node.data,
        }
        if kind in readers:
            return readers[kind](node, what)
        return self.bind(kind, node, getattr(kind, "TITLE", what))

    def plain(self, kind: type[_T], node: Node, what: str) -> _T:
        """A text that is not empty, a number, a list and so on; empty where it is another."""
        kinds, title = KINDS[kind]
        if type(node.value) in kinds and node.value != "":
            return kind(node.value)  # type: ignore[call-arg]
        if node is not ABSENT:
            self.fault(node.line, f"{what} is {title}")
        return kind()

    def table(
        self, node: Node, what: str, allowed: Collection[str] | None = None
    ) -> dict[str, Node]:
        """The entries of a table, with faults for keys that are not among those `allowed`."""
        table = self.plain(dict, node, what)
        for key, value in table.items():
            if allowed is not None and key not in allowed:
                advice = advice_for(key, [*allowed], f"It has: {', '.join(allowed)}.")
                self.fault(value.key_line, f"{what} has no key `{key}`", advice)
        return table

    def texts(self, node: Node, what: str, allowed: Collection[str]) -> dict[str, str]:
        """A table of texts with the keys `allowed`."""
        table = self.table(node, what, allowed)
        return {key: self.plain(str, value, f"`{key}`") for key, value in table.items()}

    def expression(self, node: Node, what: str) -> Expression:
        """A number or an expression; null where it is something else."""
        if not isinstance(node.value, list | dict | None):
            try:
                expression = parse_expression(node.value, self.where(node.line))
                self.names_read |= expression.names
                return expression
            except MappingError as error:
                self.faults.extend(error.faults)
        elif node is not ABSENT:
            self.fault(node.line, f"{what} is a number or an expression")
        return parse_expression(None, self.where(node.line))

    def sentence(self, node: Node, what: str) -> TextTemplate:
        """A text for people, with placeholders for config keys."""
        template = self._template(node.line, parse_template, self.plain(str, node, what))
        self.names_read.update(name.partition(".")[0] for name in template.variables)
        return template

    def name(self, text: str, line: int, *, glob: bool = False) -> TextTemplate:
        """A tensor name, whose placeholders are loop variables."""
        name = self._template(line, lambda text: parse_name(text, glob=glob), text)
        for variable in sorted({*name.variables} - self.variables):
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
        name = self.plain(str, node, f"`{key}`")
        try:
            return find(name) if name else None
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
