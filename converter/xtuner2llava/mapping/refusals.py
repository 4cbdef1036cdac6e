"""LLMs that are known to have no exact target: why, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from xtuner2llava.errors import Fault, UnsupportedError
from xtuner2llava.mapping.detection import Match, read_match
from xtuner2llava.mapping.names import Template
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.values import say
from xtuner2llava.mapping.yaml import Document, Table


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kind of LLM that no format can carry; the texts may name keys of its config."""

    where: str
    match: Match
    because: Template
    instead: Template


@dataclass(frozen=True, slots=True)
class Refusals:
    """LLMs that nothing can carry, and by format the plain classes that it cannot."""

    llms: tuple[Refusal, ...] = ()
    classes: Mapping[str, Mapping[str, Fault]] = field(default_factory=dict)

    def check(self, config: Mapping[str, object], names: Collection[str] | None) -> None:
        """Raises `UnsupportedError` with the reason if an LLM is one of `llms`."""
        for refusal in self.llms:
            if refusal.match.fits(config, names):
                raise UnsupportedError(
                    say(refusal.because, config),
                    where=refusal.where,
                    advice=say(refusal.instead, config),
                )

    def of_format(self, name: str) -> Mapping[str, Fault]:
        """The faults of the plain classes that the format `name` cannot have."""
        return self.classes.get(name, {})


def read_refusals(document: Document) -> Refusals:
    """The refusals of a file. Raises `MappingError` with all faults of the file."""
    reader = Reader(document)
    root = document.root
    reader.keys(root, ("schema", "llms", "formats"), "this file")
    llms = []
    for item in reader.items(root.entries.get("llms"), "`llms`"):
        table = reader.table(item, "a refusal")
        reader.keys(table, ("match", "because", "instead"), "a refusal")
        match = reader.table(reader.required(table, "match", "a refusal"), "`match`")
        because, instead = _sentences(reader, table)
        llms.append(Refusal(reader.where(table.line), read_match(reader, match), because, instead))
    classes: dict[str, dict[str, Fault]] = {}
    formats = reader.table(root.entries.get("formats"), "`formats`")
    for name, node in formats.entries.items():
        for plain, entry in reader.table(node, "a format").entries.items():
            table = reader.table(entry, "a refusal")
            reader.keys(table, ("because", "instead"), "a refusal")
            because, instead = _sentences(reader, table)
            fault = Fault(reader.where(table.line), because.text, instead.text)
            classes.setdefault(name, {})[plain] = fault
    reader.finish()
    return Refusals(tuple(llms), classes)


def _sentences(reader: Reader, table: Table) -> tuple[Template, Template]:
    because = reader.required(table, "because", "a refusal")
    instead = reader.required(table, "instead", "a refusal")
    return reader.sentence(because, "`because`"), reader.sentence(instead, "`instead`")
