"""Tokens added to a tokenizer's vocabulary, as its files describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.storage.json_file import Json, integer, text

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


def decoder_tokens(config: Mapping[str, Json]) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder` in a tokenizer_config."""
    decoder = config.get("added_tokens_decoder")
    found = (
        AddedToken.of(int(index), token)
        for index, token in (decoder.items() if isinstance(decoder, dict) else ())
        if index.isdecimal() and len(index) <= 9
    )
    return [token for token in found if token is not None]


def fast_tokens(content: Mapping[str, Json]) -> list[AddedToken]:
    """The tokens of `added_tokens` in a tokenizer.json."""
    added = content.get("added_tokens")
    found: list[AddedToken] = []
    for values in added if isinstance(added, list) else []:
        index = integer(values, "id") if isinstance(values, dict) else None
        token = AddedToken.of(index, values) if index is not None else None
        if token is not None:
            found.append(token)
    return found
