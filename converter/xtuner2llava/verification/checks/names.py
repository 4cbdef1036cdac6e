"""Names: those by which LLaVA loads a folder, and those of the machine that it was made on."""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Iterator
from os.path import expanduser

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.format import model_name
from xtuner2llava.metadata.front_matter import CARD_NAME
from xtuner2llava.planning.vision_tower import is_absolute, is_known_to_llava
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.outcome import FAILED, OK, WARNING, Finding, judge
from xtuner2llava.writing.out_record import RECORD_NAME
from xtuner2llava.writing.shards import INDEX_NAME

# Written by the converter; all others are copies from the base models.
_OURS = ("config.json", "generation_config.json", CARD_NAME, RECORD_NAME, INDEX_NAME)
# Lists of words and templates: "/think/off" may be a token there.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
                 "chat_template.jinja", "chat_template.json")  # fmt: skip
_MAX_BYTES = 64 << 20
# An absolute path of at least two parts that is not the path of a URL, or a Windows one.
_PATH = re.compile(r"(?<![\w/.:~<\[)-])(?:~?(?:/[\w.@+-]+){2,}|[A-Za-z]:\\{1,2}[\w.@+-]+)")
_HOME = re.compile(r"(?:/home|/Users|/root)/[\w.@+-]+/|[A-Za-z]:\\{1,2}Users\\")
# Accounts of machines. Names of less than four letters are words of other texts.
_NOT_PEOPLE = ("root", "user", "users", "admin", "ubuntu", "runner", "docker", "nobody", "test")


def folder_name(out: ConvertedFolder) -> Finding | None:
    """Whether LLaVA and LLaVA-NeXT choose the right class by the folder's name."""
    if out.format != "llava":
        return None
    name = model_name(out.path.resolve())
    if reasons := other_class(out, name):
        # The model is right under any name.
        what = f"'{name}' {reasons}: LLaVA or LLaVA-NeXT loads another class"
        return WARNING, f"{what} than {out.architecture}; rename the folder"
    return OK, f"'{name}' is loaded as {out.architecture}"


def other_class(out: ConvertedFolder, name: str) -> str:
    """Why LLaVA loads the folder as another class if it is called `name`; empty if it does not."""
    classes = Catalogue.shipped().formats[out.format].classes
    chosen = classes.get(str(out.text.get("model_type")))
    return "" if chosen is None else chosen.folder_name.reasons(name)


def vision_tower(out: ConvertedFolder) -> Finding | None:
    """LLaVA fetches the tower's config and image processor by this name."""
    if out.format != "llava":
        return None
    value = out.config.get("mm_vision_tower")
    if not isinstance(value, str) or not value.strip():
        return FAILED, f"is {value!r}"
    if is_absolute(value):
        return FAILED, f"'{value}' is a path of one machine"
    if is_known_to_llava(value):
        return OK, f"'{value}'"
    return WARNING, (
        f"LLaVA finds '{value}' only where that path exists: other names begin with openai or laion"
    )


def privacy(out: ConvertedFolder) -> Finding:
    """Absolute paths, homes and this user's name: wrong in our files, a warning in copied ones."""
    ours, copied, count = list[str](), list[str](), 0
    spoken = json.dumps([
        out.record.get("chat"),
        out.json("generation_config.json").get("stop_strings"),
        out.json("tokenizer_config.json").get("chat_template"),
    ])  # fmt: skip
    for path in out.files():
        if path.suffix in (".safetensors", ".model") or path.stat().st_size > _MAX_BYTES:
            continue
        count += 1
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [f"{path.name} says '{what}'" for what in _private(text, path.name, spoken)]
        (ours if path.name in _OURS else copied).extend(found)
    result, detail = judge([*ours, *copied], f"none in {count} text files")
    return (WARNING, f"copied from the base: {detail}") if copied and not ours else (result, detail)


def _private(text: str, file: str, spoken: str) -> Iterator[str]:
    """What in the text of a file names a machine or its user; `spoken` are words of prompts."""
    if file in _VOCABULARIES:
        yield from (match[0] for match in [_HOME.search(text)] if match)
        return
    home = f"{expanduser('~')}/"  # noqa: PTH111 - no error for a user without a home
    if len(home) > 2 and home in text:
        yield home
    paths = (match[0] for match in _PATH.finditer(text))
    if path := next((path for path in paths if path not in spoken or _HOME.match(path)), None):
        yield path[:80]
    # As a part of a path, or by itself; not as the owner in a Hub id, where it comes first.
    user = _user()
    if user is not None and re.search(rf"(?<=[/\\@]){re.escape(user)}(?![\w-])", text):
        yield user


def _user() -> str | None:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return None
    return name if len(name) > 3 and name.lower() not in _NOT_PEOPLE else None
