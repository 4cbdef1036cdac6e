"""Tokenizers as files: read, edited, and converted without transformers and without remote code."""

from xtuner2llava.tokenizers.conversion import Prepared, TokenizerRules, prepare_tokenizer
from xtuner2llava.tokenizers.editing import with_config, with_special_token, with_tokens
from xtuner2llava.tokenizers.tokenizer import FAST, MadeFile, Tokenizer, read_tokenizer

__all__ = [
    "FAST",
    "MadeFile",
    "Prepared",
    "Tokenizer",
    "TokenizerRules",
    "prepare_tokenizer",
    "read_tokenizer",
    "with_config",
    "with_special_token",
    "with_tokens",
]
