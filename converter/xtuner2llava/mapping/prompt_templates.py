"""Stop words of XTuner's prompt templates."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Document


def read_stop_words(document: Document) -> Mapping[str, tuple[str, ...]]:
    """The stop words by template name. Raises `MappingError` with all faults of the file."""
    reader = Reader(document)
    reader.keys(document.root, ("schema", "stop_words"), "this file")
    table = reader.table(document.root.entries.get("stop_words"), "`stop_words`")
    words = {name: reader.texts(node, "stop words") for name, node in table.entries.items()}
    reader.finish()
    return words
