"""Prepared tokenizers as folders."""

from __future__ import annotations

from pathlib import Path

from xtuner2llava.tokenizers.tokenizer import Prepared


def write_prepared(prepared: Prepared, folder: Path) -> Path:
    """The tokenizer's files in `folder`, copied or made; returns it."""
    tokenizer = prepared.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    for name in tokenizer.copied:
        (folder / name).write_bytes((tokenizer.folder / name).read_bytes())
    for name, make in tokenizer.made.items():
        (folder / name).write_bytes(make())
    return folder
