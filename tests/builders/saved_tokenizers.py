"""Tokenizers as different transformers saved them; see `data/tokenizers/README.md`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from xtuner2llava.tokenizers.sentencepiece import field_bytes, fields

DATA = Path(__file__).parent.parent / "data/tokenizers"
SAVED = [
    (version.name, kind.name)
    for version in sorted(DATA.iterdir())
    if version.is_dir()
    for kind in sorted(version.iterdir())
]


def write_saved(folder: Path, version: str, kind: str, checkpoints: Path) -> Path:
    """The files of a tokenizer in `folder`, with the tokenizer.model that transformers 4 keeps."""
    shutil.copytree(DATA / version / kind, folder)
    if kind in ("vicuna", "phi3") and not version.startswith("5"):
        shutil.copyfile(checkpoints / "bases/llm_llama/tokenizer.model", folder / "tokenizer.model")
    return folder


def expected(version: str, kind: str) -> list[tuple[str, list[int], list[int]]]:
    """Texts, and their ids with and without special tokens, by the version that saved it."""
    found = json.loads((DATA / "expected.json").read_text())
    ids = found["ids"][version][kind]
    assert len(ids) == len(found["texts"]) > 15
    return [(text, *pair) for text, pair in zip(found["texts"], ids, strict=True)]


def keep_spaces(tokenizer_model: Path) -> None:
    """Makes a SentencePiece model keep spaces and line feeds, as those of published Llamas do."""
    # NormalizerSpec of google/sentencepiece: field 1 is its name, field 4 remove_extra_whitespaces.
    identity = field_bytes(1, b"identity") + bytes([4 << 3, 0])
    kept = [field.raw for field in fields(tokenizer_model.read_bytes()) if field.number != 3]
    tokenizer_model.write_bytes(b"".join([*kept, field_bytes(3, identity)]))
