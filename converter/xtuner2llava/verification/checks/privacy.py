"""Whether a text file tells of the machine that it was made on."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator
from pathlib import Path

from xtuner2llava.verification.out_folder import INDEX, OutFolder
from xtuner2llava.verification.outcome import FAILED, OK, WARNING, Check, joined
from xtuner2llava.writing.out_record import RECORD_NAME

# Written by the converter; all others are copies of what the base models came with.
_OURS = ("config.json", "generation_config.json", "README.md", RECORD_NAME, INDEX)
# Their words are no sentences: "/home" may be a token.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_MAX_BYTES = 64 << 20
# An absolute path of at least two parts that is not the path of a URL, or a Windows one.
_PATH = re.compile(r"(?<![\w/.:~<-])(?:~?(?:/[\w.@+-]+){2,}|[A-Za-z]:\\{1,2}[\w.@+-]+)")
_HOME = re.compile(r"(?:/home|/Users|/root)/[\w.@+-]+/|[A-Za-z]:\\{1,2}Users\\")
# Names that are not a person's, or too short to be told from words.
_NOBODY = ("root", "user", "users", "admin", "ubuntu", "runner", "docker", "nobody", "test")


def privacy_check(out: OutFolder) -> Check:
    """Absolute paths, homes and this user's name: wrong in our files, a warning in copied ones."""
    ours: list[str] = []
    copied: list[str] = []
    count = 0
    for path in out.files():
        if path.suffix in (".safetensors", ".model") or path.stat().st_size > _MAX_BYTES:
            continue
        count += 1
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [f"{path.name} says '{what}'" for what in _private(text, path.name)]
        (ours if path.name in _OURS else copied).extend(found)
    if ours:
        return Check("no local paths", FAILED, joined([*ours, *copied]))
    if copied:
        return Check("no local paths", WARNING, f"copied from the base: {joined(copied)}")
    return Check("no local paths", OK, f"none in {count} text files")


def _private(text: str, file: str) -> Iterator[str]:
    home = str(Path.home()) + "/"
    if len(home) > 2 and home in text and file not in _VOCABULARIES:
        yield home
    pattern = _HOME if file in _VOCABULARIES else _PATH
    match = pattern.search(text)
    if match is not None:
        yield match[0][:80]
    user = _user()
    if user is not None and file not in _VOCABULARIES:
        # As a part of a path, or by itself; not as the owner in a Hub id, which comes first.
        found = re.search(rf"(?<=[/\\@]){re.escape(user)}(?![\w-])", text)
        if found is not None:
            yield user


def _user() -> str | None:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return None
    return name if len(name) > 3 and name.lower() not in _NOBODY else None
