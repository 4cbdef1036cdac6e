"""What may be published: no path, host, person or secret of the machine that trained.

Names of models stay where they can be Hub ids; other paths are shortened to their last component.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from xtuner2llava.errors import CheckpointError
from xtuner2llava.planning.vision_tower import PUBLISHED

_ABSOLUTE = re.compile(r"(?<![\w/.:])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;()]+[/\\])*"
                       r"([^\s/\\'\"`,;()]+)")  # fmt: skip
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".json", ".jsonl", ".py", ".yaml", ".yml")
# What transformers notes in a tokenizer's files of where it read them (`save_pretrained`).
_PLACES = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file",
           "special_tokens_map_file", "cache_dir")  # fmt: skip
LEFT_OUT = "(left out)"
_HEAD = (
    "# The XTuner config of the training, as xtuner2llava read it. Comments, paths, hosts and\n"
    "# secrets are left out.\n"
)
# Names of models, which say what was trained.
_MODELS = re.compile(r"(^|_)name_or_path$")
_PRIVATE = re.compile(
    r"(^|_)(root|dirs?|paths?|folders?|files?|from|resume|pth|prefix|url|uri|hosts?|hostname|addr|"
    r"address|ip|port|user|username|email|author|entity|project|api_?key|key|token|password|"
    r"secret|credentials?)$",
    re.IGNORECASE,
)
# Tokens of a tokenizer, and not of an account; how a path is called that belongs to no machine.
_HARMLESS = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|image)_token$")
# One word with a slash; words such as `[/INST]` are not.
_PATH = re.compile(r"~?[\w.@+-]*([/\\]+[\w.@+ -]*)+")
_INSIDE = re.compile(
    r"(?<![\w/.:~<-])(?:~?(?:/[\w.@+-]+){2,}/?|[A-Za-z]:\\{1,2}[\w.@+\\-]+)|\w+://\S+|"
    r"\b\d{1,3}(?:\.\d{1,3}){3}\b|[\w.+-]+@[\w-]+\.[\w.-]+|"
    r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{16,}"
)


def redact_name(name: str) -> str:
    """`name` where it can be a Hub id, else its last component: no path of this machine."""
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        outside = flavour.is_absolute() or name.startswith("~") or ".." in flavour.parts
        if outside or len(flavour.parts) > 2 or name.endswith(_FILES):
            return flavour.name
    return name.removeprefix("./")


def redact_text(text: str) -> str:
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


def redact_json(data: bytes) -> bytes:
    """A copied JSON file with the places that transformers notes in it shortened.

    All other bytes stay; so does the whole file where it notes none, or is not JSON.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for key in _PLACES if isinstance(values, dict) else ():
        value = values.get(key)
        if isinstance(value, str) and (short := redact_name(value)) != value:
            spelled = re.compile(
                rb"(" + re.escape(json.dumps(key)).encode() + rb"\s*:\s*)"
                + re.escape(json.dumps(value, ensure_ascii=False)).encode()
            )  # fmt: skip
            replacement = json.dumps(short, ensure_ascii=False).encode()
            data = spelled.sub(lambda match, new=replacement: match[1] + new, data)  # type: ignore[misc]
    return data


def redact_config(text: str, where: str) -> str:
    """The Python of `text` with every string that reveals a machine or data left out.

    Hub ids of models stay. Nothing of it is run. Raises `CheckpointError` if it is not Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            return f"{_HEAD}{ast.unparse(_Scrub().visit(tree))}\n"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"cannot be published ({type(error).__name__}: it is not plain Python)",
            where=where,
            advice="Leave --include-xtuner-config out.",
        ) from error


class _Scrub(ast.NodeTransformer):
    """Replaces strings that stand under `name`."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def visit(self, node: Any) -> Any:
        match node:
            case ast.Assign(targets=[ast.Name(id=name), *_]) | ast.keyword(arg=str(name)):
                node.value = _Scrub(name).visit(node.value)
            case ast.Assign() | ast.keyword():
                node.value = _Scrub().visit(node.value)
            case ast.Dict():
                names = [str(k.value) if isinstance(k, ast.Constant) else self._name
                         for k in node.keys]  # fmt: skip
                pairs = zip(names, node.values, strict=True)
                node.values = [_Scrub(name).visit(value) for name, value in pairs]
            case ast.Constant(value=str(text)):
                return ast.Constant(self._published(text))
            case ast.Constant(value=bytes()) | ast.JoinedStr():
                return ast.Constant(LEFT_OUT)
            case _:
                return self.generic_visit(node)
        return node

    def _published(self, text: str) -> str:
        if _MODELS.search(self._name):
            return redact_name(text)
        private = _PRIVATE.search(self._name) and not _HARMLESS.search(self._name)
        if private or _PATH.fullmatch(text):
            return LEFT_OUT
        return _INSIDE.sub(LEFT_OUT, text)
