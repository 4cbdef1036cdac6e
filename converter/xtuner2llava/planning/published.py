"""Names that may stand in published files: no absolute path, no user's home, no file's place."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath

from xtuner2llava.planning.published_towers import PUBLISHED

_ABSOLUTE = re.compile(r"(?<![\w/.:])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;()]+[/\\])*"
                       r"([^\s/\\'\"`,;()]+)")  # fmt: skip
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".json", ".jsonl", ".py", ".yaml", ".yml")
# What transformers notes in a tokenizer's files of where it read them (`save_pretrained`).
_PLACES = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file",
           "special_tokens_map_file", "cache_dir")  # fmt: skip


def published_name(name: str) -> str:
    """`name` where it can be a Hub id, else its last component: no path of this machine."""
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        outside = flavour.is_absolute() or name.startswith("~") or ".." in flavour.parts
        if outside or len(flavour.parts) > 2 or name.endswith(_FILES):
            return flavour.name
    return name.removeprefix("./")


def published_text(text: str) -> str:
    """`text` with absolute paths shortened to their last component."""
    return _ABSOLUTE.sub(r"\1", text)


def hub_id(name: str | None, folder: Path | None) -> str | None:
    """The Hub id, `owner/name`, of a base model that is called `name` and lies in `folder`.

    The folder's place in the Hub's cache says it, or `name` is that of a published tower. Any other
    name may be a relative path of the machine that trained; None then.
    """
    return cached_id(folder) or (name if name in PUBLISHED else None)


def cached_id(folder: Path | None) -> str | None:
    """The Hub id of a folder in the Hub's cache; None for any other."""
    # A link into the cache is how users name a snapshot.
    for path in (folder, folder.resolve()) if folder is not None else ():
        for part, following in pairwise(path.parts):
            match = _CACHED.fullmatch(part)
            if match is not None and following == "snapshots":
                return f"{match[1]}/{match[2]}"
    return None


def published_json(data: bytes) -> bytes:
    """A copied JSON file with the places that transformers notes in it shortened.

    All other bytes stay; so does the whole file where it notes none, or is not JSON.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for key in _PLACES if isinstance(values, dict) else ():
        value = values.get(key)
        if isinstance(value, str) and (short := published_name(value)) != value:
            spelled = re.compile(
                rb"(" + re.escape(json.dumps(key)).encode() + rb"\s*:\s*)"
                + re.escape(json.dumps(value, ensure_ascii=False)).encode()
            )  # fmt: skip
            replacement = json.dumps(short, ensure_ascii=False).encode()
            data = spelled.sub(lambda match, new=replacement: match[1] + new, data)  # type: ignore[misc]
    return data
