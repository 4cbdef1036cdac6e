"""Rank files of tiktoken: on each line a token in base64 and its rank.

openai/tiktoken `tiktoken/load.py`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, raise_faults
from xtuner2llava.storage.small_file import read_small

_MAX_BYTES = 32 << 20  # Qwen's has 2.6 million
_MAX_TOKENS = 1_000_000
_MAX_FAULTS = 10


def read_ranks(path: Path) -> Mapping[bytes, int]:
    """The tokens of the file `path` in the order of their ranks, which are 0, 1, 2 and so on.

    All 256 single bytes are among them. Raises `CorruptFileError` with the lines that are wrong.
    """
    data = read_small(path, _MAX_BYTES)
    faults: list[Fault] = []
    ranks: dict[bytes, int] = {}
    places: dict[int, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        what = _read_line(line, ranks, places, number)
        if what is not None:
            faults.append(Fault(f"{path}:{number}", what))
        if len(faults) > _MAX_FAULTS or len(ranks) > _MAX_TOKENS:
            faults.append(Fault(str(path), "is not a file of tiktoken ranks"))
            break
    if not faults:
        lacking = next((rank for rank in range(len(places)) if rank not in places), None)
        if lacking is not None:
            faults.append(Fault(str(path), f"rank {lacking} is missing of {len(places):,}"))
        bytes_lacking = sum(bytes([byte]) not in ranks for byte in range(256))
        if bytes_lacking:
            faults.append(Fault(str(path), f"{bytes_lacking} of the 256 single bytes are missing"))
    raise_faults(CorruptFileError, faults)
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _read_line(
    line: bytes, ranks: dict[bytes, int], places: dict[int, int], number: int
) -> str | None:
    """Adds the token of a line; what is wrong with it, if anything."""
    parts = line.split(b" ")
    if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
        return "is not a token in base64, a space and a rank"
    try:
        token = base64.b64decode(parts[0], validate=True)
    except binascii.Error:
        return "has a token that is not base64"
    rank = int(parts[1])
    if not token:
        return "has an empty token"
    if token in ranks:
        return f"repeats the token of rank {ranks[token]}"
    if rank in places:
        return f"repeats rank {rank} of line {places[rank]}"
    ranks[token] = rank
    places[rank] = number
    return None
