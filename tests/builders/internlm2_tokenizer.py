"""Small SentencePiece models behind remote code, as InternLM2's repositories have one.

See `data/sentencepiece/README.md`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.tokenizers.conversion import prepare_tokenizer
from xtuner2llava.tokenizers.tokenizer import Prepared, read_tokenizer

DATA = Path(__file__).parent.parent / "data/sentencepiece"
NAMES = ("prefix", "plain")
END, START = 5, 6


def added(text: str) -> dict[str, object]:
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    return {"content": text, **dict.fromkeys(flags, False), "special": True}


def write_base(folder: Path, model: bytes, **config: Any) -> Path:
    """A tokenizer as InternLM2's repositories have it, but for the code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    texts = {0: "<unk>", 1: "<s>", 2: "</s>", END: "<|im_end|>", START: "<|im_start|>"}
    values = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {str(index): added(text) for index, text in texts.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "decode_with_prefix_space": False,
        "tokenizer_class": "InternLM2Tokenizer",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def prepare(base: Path) -> Prepared:
    family = Catalogue.shipped().families["internlm2"]
    return prepare_tokenizer(read_tokenizer(base), family.tokenizer.convert)


def expected(name: str) -> list[tuple[str, list[int]]]:
    """Texts, and their ids by sentencepiece itself."""
    found = json.loads((DATA / "expected.json").read_text())[name]
    assert len(found) > 170
    return [(text, ids) for text, ids in found]
