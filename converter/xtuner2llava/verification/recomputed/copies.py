"""The tokenizer and the image processor against those of the base models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xtuner2llava.llava.published_towers import PROCESSOR_KEYS
from xtuner2llava.planning.processor import (
    PREPROCESSOR,
    find_image_processor,
    read_image_processor,
)
from xtuner2llava.sources.json_file import Json, read_json
from xtuner2llava.verification.layout import LLM, VISUAL_ENCODER
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import SKIPPED, Check
from xtuner2llava.verification.tokenizer import TOKENIZER_FILES, load_tokenizer

# Texts that tokenizers split in their own ways: spaces, digits, lines, accents, other scripts.
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\n\ta tab, 1234567890 and 3.14!",
    "naïve café — “quotes” … 你好 世界 🙂",
    "def f(x): return x ** 2  # comment",
)


def copies_checks(
    out: OutFolder, folders: Mapping[str, Path], *, converts_tokenizer: bool
) -> Iterator[Check]:
    """Compares the small files; `folders` are the base models'.

    A tokenizer's files are the base's byte for byte, or, where they were changed, have all its
    tokens and make the same of texts.
    """
    yield _tokenizer(out, folders[LLM], converts_tokenizer)
    yield _image_processor(out, folders[VISUAL_ENCODER])


def _tokenizer(out: OutFolder, base: Path, converted: bool) -> Check:
    name = "tokenizer as the base's"
    same, changed = [], []
    for file in TOKENIZER_FILES:
        ours, theirs = out.path / file, base / file
        if ours.is_file() and theirs.is_file() and _same_bytes(ours, theirs):
            same.append(file)
        elif ours.is_file() or theirs.is_file():
            changed.append(file)
    if not changed:
        return Check.of(name, [], f"{', '.join(same)}, byte for byte")
    model_type = out.layout.text.get("model_type")
    try:
        ours = load_tokenizer(out.path, model_type)
    except Exception as error:
        return Check.of(name, [f"does not load: {type(error).__name__}"], "")
    said = f"{', '.join(changed)} changed"
    try:
        theirs = load_tokenizer(base, _model_type(base))
    except Exception as error:
        why = "this family has one made" if converted else f"{said}, and the base's does not load"
        return Check(name, SKIPPED, f"{why}: {type(error).__name__}")
    return Check.of(name, list(_differences(ours, theirs)), f"{said}; same tokens, same splitting")


def _same_bytes(one: Path, other: Path) -> bool:
    # The sizes first: whoever made a file of gigabytes shall not have it read.
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _differences(ours: Any, theirs: Any) -> Iterator[str]:
    known: Mapping[str, int] = ours.get_vocab()
    for token, index in sorted(theirs.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token) != index:
            yield f"token {token!r} has id {known.get(token)}, the base's {index}"
    for text in _TEXTS:
        one, other = (t(text, add_special_tokens=False)["input_ids"] for t in (ours, theirs))
        if one != other:
            yield f"{text!r} is {one[:8]}…, the base makes {other[:8]}…"


def _model_type(base: Path) -> Json:
    return read_json(base / "config.json").get("model_type")


def _image_processor(out: OutFolder, base: Path) -> Check:
    """The base's settings, for which the class may be another."""
    name = "image processor as the base's"
    theirs, ours = find_image_processor(base), out.path / PREPROCESSOR
    if not theirs.is_file() or not ours.is_file():
        return Check.of(name, [f"{PREPROCESSOR} is not in both"], "")
    if _same_bytes(theirs, ours):
        return Check.of(name, [], f"{PREPROCESSOR}, byte for byte")
    found, wanted = read_json(ours), read_image_processor(theirs)
    faults = [
        f"{key} is {found.get(key)!r}, the base's {wanted.get(key)!r}"
        for key in PROCESSOR_KEYS
        if found.get(key) != wanted.get(key)
    ]
    return Check.of(name, faults, f"the base's settings, for a {found.get('image_processor_type')}")
