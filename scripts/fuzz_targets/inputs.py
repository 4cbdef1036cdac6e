"""Folders of checkpoint files, written from one JSON text: names of files, and what is in them.

A `.safetensors` file is given as its header, a file of `torch.save` as the value that it holds:
JSON with three forms of its own, `{"$tensor": [dtype, shape, strides, offset, key]}`,
`{"$global": name}` and `{"$call": [name, [arguments], state]}`. Any other file is a text, `base64:`
and bytes, or JSON. So a mutation of the JSON is a mutation of a file that still has its format.
Nothing here is checked: what comes out is meant to be wrong.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(?!.*\.\.)[\w][\w.-]{0,60}(/[\w][\w.-]{0,60}){0,2}", re.ASCII)
_MAX_DATA_BYTES = 1 << 20
_MAX_DEPTH = 100
_STORAGES = {
    "float32": ("FloatStorage", 4),
    "float16": ("HalfStorage", 2),
    "bfloat16": ("BFloat16Storage", 2),
    "int64": ("LongStorage", 8),
}


def load(data: bytes) -> dict[str, Any] | None:
    """The JSON object in `data`, if it is one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def dump(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=True).encode()


def write_folder(folder: Path, files: dict[str, Any]) -> None:
    """Writes `files` into `folder`; names that would leave it, or are no names, are left out."""
    for name, content in files.items():
        if not _NAME.fullmatch(name) or len(name) > 120:
            continue
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                path.write_bytes(file_bytes(name, content))
        except OSError:
            continue  # A name that is a file here and a folder there.


def file_bytes(name: str, content: Any) -> bytes:
    if isinstance(content, str):
        if content.startswith("base64:"):
            try:
                return base64.b64decode(content[7:])
            except (binascii.Error, ValueError):
                return b""
        return content.encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors") and isinstance(content, dict):
        return safetensors_bytes(content)
    if name.endswith((".pth", ".pt", ".bin")):
        return torch_bytes(content)
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


def safetensors_bytes(header: dict[str, Any]) -> bytes:
    """A file with this header. Under `$length` it may lie about its length, under `$data` about
    how much data there is."""
    entries = {key: value for key, value in header.items() if not key.startswith("$")}
    text = json.dumps(entries).encode()
    end = 0
    for entry in entries.values():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        for offset in offsets if isinstance(offsets, list) else []:
            if isinstance(offset, int):
                end = max(end, min(offset, _MAX_DATA_BYTES))
    length, size = header.get("$length", len(text)), header.get("$data", end)
    if not isinstance(length, int) or not isinstance(size, int):
        return text
    return struct.pack("<Q", length % 2**64) + text + bytes(max(0, min(size, _MAX_DATA_BYTES)))


def torch_bytes(value: Any) -> bytes:
    """A file as `torch.save` writes it, its data all zeros."""
    encoder = _Pickle()
    encoder.put(value, 0)
    return zip_bytes(b"\x80\x02" + bytes(encoder.out) + b".", encoder.storages)


def zip_bytes(pickle: bytes, storages: dict[str, int]) -> bytes:
    """`pickle` and storages of so many bytes, as the zip that `torch.save` makes of them."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("iter_1/data.pkl", pickle)
        archive.writestr("iter_1/byteorder", b"little")
        for key, size in storages.items():
            # JSON can say half a character, a name in a zip cannot.
            name = key.encode("utf-8", "replace").decode("utf-8")
            archive.writestr(f"iter_1/data/{name}", bytes(min(size, _MAX_DATA_BYTES)))
    return target.getvalue()


class _Pickle:
    """Encodes JSON as a pickle of protocol 2, and notes how large its storages are, in bytes."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.storages: dict[str, int] = {}

    def put(self, value: Any, depth: int) -> None:
        if depth > _MAX_DEPTH:
            value = None
        if isinstance(value, bool) or value is None:
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8b" + struct.pack("<i", len(data)) + data
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(data)) + data
        elif isinstance(value, list):
            self.out += b"]("
            for item in value:
                self.put(item, depth + 1)
            self.out += b"e"
        elif "$tensor" in value:
            self._tensor(value["$tensor"], depth)
        elif "$global" in value:
            self._global(value["$global"])
        elif "$call" in value:
            self._call(value["$call"], depth)
        else:
            self.out += b"}("
            for key, item in value.items():
                self.put(key, depth + 1)
                self.put(item, depth + 1)
            self.out += b"u"

    def _global(self, name: Any) -> None:
        module, _, attribute = str(name).replace("\n", "").rpartition(".")
        self.out += f"c{module}\n{attribute}\n".encode("utf-8", "surrogatepass")

    def _call(self, parts: Any, depth: int) -> None:
        name, arguments, state = (*parts, None, None, None)[:3] if isinstance(parts, list) else (
            parts, [], None)  # fmt: skip
        self._global(name)
        self._tuple(arguments, depth)
        self.out += b"R"
        if state is not None:
            self.put(state, depth + 1)
            self.out += b"b"

    def _tuple(self, values: Any, depth: int) -> None:
        """A list as a tuple, anything else as itself."""
        if not isinstance(values, list):
            self.put(values, depth + 1)
            return
        self.out += b"("
        for value in values:
            self.put(value, depth + 1)
        self.out += b"t"

    def _tensor(self, parts: Any, depth: int) -> None:
        given = parts if isinstance(parts, list) else []
        dtype, shape, strides, offset, key = (*given, None, None, None, None, None)[:5]
        storage, size = _STORAGES.get(str(dtype), ("FloatStorage", 4))
        numbers = [n for n in shape if isinstance(n, int)] if isinstance(shape, list) else []
        if strides is None and isinstance(shape, list):
            strides = [math.prod(numbers[i + 1 :]) for i in range(len(numbers))]
        first = offset if isinstance(offset, int) else 0
        count = math.prod(numbers) + first
        name = str(len(self.storages)) if key is None else str(key)
        elements = max(0, min(count, _MAX_DATA_BYTES // size))
        self.storages[name] = max(self.storages.get(name, 0), elements * size)
        self._global("torch._utils._rebuild_tensor_v2")
        self.out += b"(("
        self.put("storage", depth)
        self._global(f"torch.{storage}")
        self.put(name, depth)
        self.put("cpu", depth)
        self.put(elements, depth)
        self.out += b"tQ"
        self.put(0 if offset is None else offset, depth)
        self._tuple(shape, depth)
        self._tuple(strides, depth)
        self.out += b"\x89ccollections\nOrderedDict\n)RtR"
