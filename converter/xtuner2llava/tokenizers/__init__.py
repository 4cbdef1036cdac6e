"""Tokenizers as files: read, edited, and converted without transformers and without remote code."""

from xtuner2llava.tokenizers.compatibility import readable_tokenizer, tokenizer_faults
from xtuner2llava.tokenizers.conversion import prepare_tokenizer, with_arguments
from xtuner2llava.tokenizers.prefix import (
    PrefixSpace,
    keeps_spaces,
    prefix_space,
    with_bos_added,
)
from xtuner2llava.tokenizers.sentencepiece import read_sentencepiece
from xtuner2llava.tokenizers.tokenizer import (
    FAST,
    MODEL,
    MadeFile,
    Prepared,
    Tokenizer,
    read_tokenizer,
)

__all__ = [
    "FAST",
    "MODEL",
    "MadeFile",
    "PrefixSpace",
    "Prepared",
    "Tokenizer",
    "keeps_spaces",
    "prefix_space",
    "prepare_tokenizer",
    "read_sentencepiece",
    "read_tokenizer",
    "readable_tokenizer",
    "tokenizer_faults",
    "with_arguments",
    "with_bos_added",
]
