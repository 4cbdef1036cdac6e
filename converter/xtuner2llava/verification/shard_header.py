"""The header of a safetensors file, read strictly and by ourselves.

The format: safetensors README, "Format": eight bytes of length, so many bytes of JSON that begin
with "{" and may end in spaces, then the data of the tensors without a hole. What
`safetensors.torch.save_file` writes is stricter still, and so is this: data begins at a multiple of
eight bytes, and tensors stand by falling alignment, then by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import ConversionError
from xtuner2llava.storage.json_file import Json, parse_json

# Bytes of an element, and the rank among dtypes in a file (safetensors `src/tensor.rs`, `Dtype`).
_ITEM_BYTES = {
    "U64": 8, "I64": 8, "F64": 8, "C64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2,
    "U16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_RANK = {code: rank for rank, code in enumerate(_ITEM_BYTES)}
_MAX_BYTES = 100_000_000
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor as a header describes it; `start` and `stop` count bytes of data."""

    file: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> str:
        """Torch's name of a float dtype; else the safetensors code."""
        return _FLOATS.get(self.code, self.code)

    @property
    def is_float(self) -> bool:
        return self.code in _FLOATS


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The tensors of one file that could be understood, and everything that is wrong with it."""

    tensors: dict[str, HeaderEntry]
    faults: tuple[str, ...]


def read_shard_header(path: Path) -> ShardHeader:
    """The header of the safetensors file `path`. Damage becomes faults, not errors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, _MAX_BYTES):
                return _broken(path, f"says its header has {length:,} bytes, the file has {size:,}")
            text = file.read(length)
    except OSError as error:
        return _broken(path, f"cannot be read ({error.strerror})")
    try:
        described = parse_json(text, path.name)
    except ConversionError as error:
        return _broken(path, f"its header {error.faults[0].what}")
    faults = []
    if not text.startswith(b"{"):
        faults.append("its header does not begin with '{'")
    padding = len(text) - len(text.rstrip(b" "))
    if not text.endswith((b"}", b" ")) or (8 + length) % 8 or padding > 7:
        faults.append(
            f"its header of {length:,} bytes is not padded with spaces to a multiple of eight"
        )
    if described.pop("__metadata__", None) != {"format": "pt"}:
        faults.append("its __metadata__ is not {'format': 'pt'}, without which it is not loaded")
    tensors: dict[str, HeaderEntry] = {}
    for name, value in described.items():
        entry = _entry(path.name, value)
        if isinstance(entry, str):
            faults.append(f"{name} {entry}")
        else:
            tensors[name] = entry
    faults += _order(tensors, size - 8 - length)
    return ShardHeader(tensors, tuple(f"{path.name}: {fault}" for fault in faults))


def _broken(path: Path, what: str) -> ShardHeader:
    return ShardHeader({}, (f"{path.name}: {what}",))


def _entry(file: str, value: Json) -> HeaderEntry | str:
    """A tensor's entry, or what is wrong with it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    code = value["dtype"]
    if not isinstance(code, str) or code not in _ITEM_BYTES:
        return f"has dtype {code!r}"
    shape, offsets = _sizes(value["shape"]), _sizes(value["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        return "has no shape and two data_offsets of whole numbers"
    start, stop = offsets
    if stop - start != math.prod(shape) * _ITEM_BYTES[code]:
        return f"has {stop - start:,} bytes, shape {shape} of {code} needs another number"
    return HeaderEntry(file, code, tuple(shape), start, stop)


def _sizes(value: Json) -> list[int] | None:
    """A list of whole numbers that are not negative; None for anything else."""
    if not isinstance(value, list):
        return None
    sizes = [n for n in value if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    return sizes if len(sizes) == len(value) else None


def _order(tensors: dict[str, HeaderEntry], data_bytes: int) -> list[str]:
    """What is wrong with where the tensors lie."""
    faults = []
    end = 0
    placed = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    for name, entry in placed:
        if entry.start != end:
            what = "a hole before it" if entry.start > end else "it overlaps the one before"
            faults.append(f"{name} begins at byte {entry.start:,}, expected {end:,}: {what}")
        end = max(end, entry.stop)
    if end != data_bytes:
        faults.append(f"holds {data_bytes:,} bytes of data, its tensors need {end:,}")
    wanted = sorted(tensors, key=lambda name: (_RANK[tensors[name].code], name))
    names = [name for name, _ in placed]
    if names != wanted and all(entry.stop > entry.start for entry in tensors.values()):
        first = next(a for a, b in zip(names, wanted, strict=True) if a != b)
        faults.append(f"its tensors are not in the order that safetensors writes, from {first} on")
    return faults
