"""Untrusted JSON files: bounded in size and depth, no duplicate keys, no NaN, only Unicode."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.small_file import read_small

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_MAX_BYTES = 64 << 20
_MAX_DEPTH = 64
_MAX_DIGITS = 100  # `model_max_length` of tokenizers has 31; a float holds 308
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Json]:
    """The object in the file `path`; raises `CorruptFileError` for anything else."""
    return parse_json(read_small(path, _MAX_BYTES), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Json]:
    """The object in `data`; raises `CorruptFileError` with the line for anything else."""
    try:
        content = data.decode("utf-8")
        value = json.loads(
            content,
            object_pairs_hook=_unique,
            parse_int=_whole_number,
            parse_float=_finite,
            parse_constant=_not_finite,
        )
        if _SURROGATE.search(content):  # Half of a pair raises here.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        what = f"is not usable JSON: {error}"
        if isinstance(error, UnicodeDecodeError):
            what = f"is not UTF-8 (byte {error.start:,})"
        elif isinstance(error, json.JSONDecodeError):
            where, what = f"{where}:{error.lineno}", f"is not JSON: {error.msg}"
        raise CorruptFileError(what, where=where) from error
    if not isinstance(value, dict):
        raise CorruptFileError("is not a JSON object", where=where)
    if _is_deep(value):
        raise CorruptFileError("is not usable JSON: nested too deeply", where=where)
    return value


def integer(values: Mapping[str, Json], key: str) -> int | None:
    """The integer under `key`; None if there is none or it is something else."""
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text(values: Mapping[str, Json], key: str) -> str | None:
    """The text under `key`; None if there is none or it is something else."""
    value = values.get(key)
    return value if isinstance(value, str) else None


def table(values: Mapping[str, Json], key: str) -> dict[str, Json]:
    """The object under `key`; empty if there is none or it is something else."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def items(values: Mapping[str, Json], key: str) -> list[Json]:
    """The list under `key`; empty if there is none or it is something else."""
    value = values.get(key)
    return value if isinstance(value, list) else []


def _is_deep(value: Json) -> bool:
    """Whether containers are nested more deeply than `_MAX_DEPTH`."""
    level: list[Json] = [value]
    for _ in range(_MAX_DEPTH):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return False
        level = [i for c in containers for i in (c.values() if isinstance(c, dict) else c)]
    return any(isinstance(item, (dict, list)) for item in level)


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result: dict[str, Json] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key '{key[:100]}' is there twice")
        result[key] = value
    return result


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number with {len(digits):,} digits")
    return int(digits)


def _finite(number: str) -> float:
    return value if math.isfinite(value := float(number)) else _not_finite(number)


def _not_finite(number: str) -> NoReturn:
    """Python reads and writes NaN and infinity in JSON; other readers refuse the whole file."""
    raise ValueError(f"{number[:40]} is not a finite number")
