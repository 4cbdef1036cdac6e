"""XTuner's prompt templates: how training put a conversation into text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.mapping.schema import ABSENT, Reader
from xtuner2llava.mapping.yaml import Document


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One template, with the fields of XTuner's `PROMPT_TEMPLATE` (`xtuner/utils/templates.py`).

    `instruction` has the placeholder `{input}` and may have `{round}`, `system` has `{system}`.
    `name` is None for a template that a config writes out.
    """

    name: str | None
    instruction: str
    system: str = ""
    suffix: str = ""
    suffix_as_eos: bool = False
    sep: str = ""
    stop_words: tuple[str, ...] = ()


def read_prompt_templates(document: Document) -> Mapping[str, PromptTemplate]:
    """The templates by name. Raises `MappingError` with all faults of the file."""
    reader = Reader(document)
    table, title = document.table, "a prompt template"
    reader.keys(table, ("schema", "templates"), "this file")
    found = {
        name: reader.bind(PromptTemplate, node, title, name=name)
        for name, node in reader.table(table.get("templates", ABSENT), "`templates`").items()
    }
    reader.finish()
    return found
