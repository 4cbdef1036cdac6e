"""`conversion.json` of a folder: whether a conversion wrote it, and which files are not its own."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from xtuner2llava.storage.json_file import Json

RECORD_NAME = "conversion.json"
STATE_NAME = ".xtuner2llava"
TOOL = "xtuner2llava"
_MAX_BYTES = 256 << 20

# What decides the bytes of a conversion, as texts by what they are called: "--dtype": "float16".
Described = Mapping[str, str]


def read_record(folder: Path) -> dict[str, Json] | None:
    """The record of the conversion that wrote `folder`; None where there is none of this tool.

    A link counts as none: what it points to says nothing of this folder.
    """
    try:
        descriptor = os.open(folder / RECORD_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_size > _MAX_BYTES:
                return None
            record = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    tool = record.get("tool")
    is_ours = isinstance(tool, dict) and tool.get("name") == TOOL
    return record if is_ours and recorded_names(record) else None


def recorded_names(record: Mapping[str, Json]) -> frozenset[str]:
    """The files that a record lists, itself among them.

    Empty where it lists none, or what no conversion writes: a name that leads out of the folder.
    """
    shards, files = record.get("shards"), record.get("files")
    if not isinstance(shards, list) or not isinstance(files, dict) or not shards:
        return frozenset()
    listed = [entry.get("file") for entry in shards if isinstance(entry, dict)]
    names = [name for name in (*listed, *files) if isinstance(name, str)]
    return frozenset([*names, RECORD_NAME]) if all(map(is_name, names)) else frozenset()


def is_name(name: str) -> bool:
    """Whether `name` may be a file of the output folder, or of one folder in it."""
    parts = name.split("/")
    bad = any(part in ("", ".", "..", STATE_NAME) or "\0" in part for part in parts)
    return not bad and len(parts) <= 2 and "\\" not in name


def other_names(folder: Path, names: frozenset[str]) -> list[str]:
    """What lies in `folder` and is not one of the files `names`; a folder ends in a slash."""
    found = []
    for directory, folders, files in os.walk(folder):
        inside = Path(directory).relative_to(folder)
        found += [name for file in files if (name := str(inside / file)) not in names]
        for child in folders:
            path = Path(directory, child)
            holds_ours = any(name.startswith(f"{inside / child}/") for name in names)
            if path.is_symlink() or not (holds_ours or any(path.iterdir())):
                found.append(f"{inside / child}/")
    return sorted(found)


def named(names: Iterable[str], most: int = 5) -> str:
    """`names` in one sentence, of which the first few are enough."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return f"{', '.join(listed[:most])}{more}"


def differences(there: Described, here: Described) -> str:
    """What makes one conversion another one; empty where nothing does.

    Options come first: inputs and outputs that differ follow from them.
    """
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    said = [
        f"{key} is {there.get(key, 'not given')} there, {here.get(key, 'not given')} here"
        for key in keys
        if key.startswith("--")
    ]
    return "; ".join(said) or named(f"{key} is not what it was" for key in keys)
