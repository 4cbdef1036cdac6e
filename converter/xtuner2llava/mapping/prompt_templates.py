"""XTuner's prompt templates: how training put a conversation into text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.mapping.schema import Reader
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
    reader.keys(document.root, ("schema", "templates"), "this file")
    templates = reader.table(document.root.entries.get("templates"), "`templates`")
    found: dict[str, PromptTemplate] = {}
    for name, node in templates.entries.items():
        table = reader.table(node, "a prompt template")
        keys = [key for key in PromptTemplate.__slots__ if key != "name"]
        reader.keys(table, keys, "a prompt template")
        reader.required(table, "instruction", "a prompt template")
        get = table.entries.get
        found[name] = PromptTemplate(
            name,
            reader.text(get("instruction"), "`instruction`"),
            reader.text(get("system"), "`system`"),
            reader.text(get("suffix"), "`suffix`"),
            reader.flag(get("suffix_as_eos"), "`suffix_as_eos`"),
            reader.text(get("sep"), "`sep`"),
            reader.texts(get("stop_words"), "`stop_words`"),
        )
    reader.finish()
    return found
