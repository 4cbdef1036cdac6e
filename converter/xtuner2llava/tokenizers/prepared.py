"""A tokenizer that was changed, with what to say about it."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner2llava.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A tokenizer that transformers loads by itself, and what was done for that."""

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()
