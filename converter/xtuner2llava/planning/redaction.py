"""What may be published: no path, host, person or secret of the machine that trained.

Names of models stay where they can be Hub ids; other paths are shortened to their last component.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from os import PathLike, fspath
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from xtuner2llava.planning.vision_tower import PUBLISHED

if TYPE_CHECKING:
    from xtuner2llava.options import Options
    from xtuner2llava.planning.plan import Plan

# One in quotes may have spaces. A token such as `</s>`, `[/INST]` or `/s` is not a path.
_QUOTED = re.compile(r"(['\"`])(?:(?:~[\w.-]*|[A-Za-z]:)[/\\]|[/\\][^'\"`\n/\\]*[/\\])"
                     r"(?:[^'\"`\n/\\]*[/\\])*([^'\"`\n/\\]+)[/\\]*\1")  # fmt: skip
# Without quotes, a folder may have spaces too; a comma, or the end of a sentence, ends the path.
_FOLDER = r"(?:[^\n/\\'\"`,;().:]|[.:](?!\s))+(?<!\s)[/\\]"
_ABSOLUTE = re.compile(rf"(?<![\w/.:<\[)])(?:(?:~[\w.-]*|[A-Za-z]:)[/\\]|[/\\]{_FOLDER})"
                       rf"(?:{_FOLDER})*([^\s/\\'\"`,;()]+)")  # fmt: skip
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".json", ".jsonl", ".py", ".yaml", ".yml")
# A string of JSON under a key.
_MEMBER = re.compile(rb'("([^"\\]*)"\s*:\s*)("(?:[^"\\]|\\.)*")')
# What transformers notes in a tokenizer's files of where it read them (`save_pretrained`): also as
# a relative path. Of other keys, these are words that a model reads.
_PLACES = frozenset(
    "_name_or_path name_or_path tokenizer_file vocab_file merges_file special_tokens_map_file "
    "cache_dir".split()
)
_WORDS = re.compile("content|chat_template|.*_token")


def redact_name(name: str) -> str:
    """`name` where it can be a Hub id, else its last component: no path of this machine."""
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        outside = flavour.is_absolute() or name.startswith("~") or ".." in flavour.parts
        if outside or len(flavour.parts) > 2 or name.endswith(_FILES):
            return flavour.name
    return name.removeprefix("./")


def redact_text(text: str, places: Iterable[str] = (), words: Iterable[str] = ()) -> str:
    """`text` with absolute paths, and `places`, shortened to their last component.

    Only of `places` is it certain where they end: a folder's name may have any character. `words`
    of the training's prompts stay, such as `/think/off`.
    """
    for place in sorted({*places}, key=len, reverse=True):
        if short := redact_name(place):
            text = re.sub(rf"(?<![\w/.]){re.escape(place)}(?!\w)", short.replace("\\", ""), text)
    kept = "|".join(re.escape(word) for word in words if "/" in word or "\\" in word)
    pieces = re.split(rf"(?<![\w/.])({kept})", text) if kept else [text]
    pieces[::2] = [_ABSOLUTE.sub(r"\1", _QUOTED.sub(r"\1\2\1", piece)) for piece in pieces[::2]]
    return "".join(pieces)


def redactor(plan: Plan, options: Options) -> Callable[[str], str]:
    """`redact_text` for the texts of `plan`, with what these may name, as it is spelled there."""
    checkpoint, config = plan.checkpoint, plan.checkpoint.training_config
    found: list[object] = [checkpoint.artifact.path]
    found += [x for part in checkpoint.parts.values() for x in (part.folder, part.name)]
    found += [options.llm, options.vision, options.tokenizer, options.xtuner_config]
    if config is not None:
        found += [config.where, config.config.table.get("load_from")]
        found += [value for key, value in config.used.items() if key.endswith(("_path", "_pth"))]
    places = {fspath(place) for place in found if isinstance(place, (str, PathLike))}
    return partial(redact_text, places=places, words=plan.chat.stop_words)


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


def redact_json(data: bytes) -> bytes:
    """A copied JSON file with the places that are noted in it shortened; all other bytes stay."""

    def shorten(found: re.Match[bytes]) -> bytes:
        try:
            key, name = found[2].decode(), json.loads(found[3])
        except ValueError:
            return found[0]
        place = key in _PLACES or (_is_place(name) and not _WORDS.fullmatch(key))
        short = redact_name(name) if place else name
        if short == name:
            return found[0]
        return found[1] + json.dumps(short, ensure_ascii=False).encode("utf-8", "backslashreplace")

    return _MEMBER.sub(shorten, data)


def _is_place(text: str) -> bool:
    """Whether all of it is a path of one machine; `/s` is a token as often as a folder."""
    posix = PurePosixPath(text)
    deep = posix.is_absolute() and len(posix.parts) > 2
    return deep or PureWindowsPath(text).is_absolute() or text.startswith("~/")
