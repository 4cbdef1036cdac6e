"""Tokens added to a tokenizer's vocabulary, as its files describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.storage.json_file import Json, text

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in a text before anything else is done to it.

    `special` ones are left out when a text is decoded without special tokens. The flags are those
    of huggingface/tokenizers `AddedToken`.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    normalized: bool = False
    rstrip: bool = False
    single_word: bool = False

    @classmethod
    def of(cls, index: int, values: Json) -> AddedToken | None:
        """The token that an entry of `added_tokens_decoder` or `added_tokens` describes."""
        if index < 0:
            return None
        if isinstance(values, str):
            return cls(values, index)
        content = text(values, "content") if isinstance(values, Mapping) else None
        if content is None or not isinstance(values, Mapping):
            return None
        flags = {key: values.get(key) is True for key in _FLAGS}
        return cls(content, index, values.get("special") is True, **flags)

    @property
    def in_config(self) -> dict[str, Json]:
        """As an entry of `added_tokens_decoder` in tokenizer_config.json."""
        flags: dict[str, Json] = {key: getattr(self, key) for key in _FLAGS}
        return {"content": self.text, **flags, "special": self.special}

    @property
    def in_tokenizer_json(self) -> dict[str, Json]:
        """As an entry of `added_tokens` in tokenizer.json."""
        return {"id": self.id, **self.in_config}
