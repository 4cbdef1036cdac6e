"""Tensors of weight files by libraries that we did not write, read when asked for.

safetensors files through the safetensors package. Files of `torch.save` through `torch.load` in a
process of its own (`torch_index`), which says where each tensor lies; its bytes are then read from
the file. Nothing of `xtuner2llava.sources` or `xtuner2llava.tensors` takes part.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CorruptFileError

if TYPE_CHECKING:
    import torch

# How much of a mapped file may have been touched before it is mapped anew: what was touched counts
# as memory of the process.
_TOUCHED_BYTES = 64 << 20
# What the package calls dtypes (safetensors `bindings/python/py_src/safetensors/torch.py`).
_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from xtuner2llava.verification.recomputed.torch_index import main; main()"
)


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file. `rows(start, stop)` reads rows of the first dimension; a scalar has one.

    Rows come in memory of their own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.shape[0] if self.shape else 1

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.count)


Value = None | bool | int | float | str | FileTensor | list[Any] | dict[str, Any]


class SafetensorsReader:
    """One safetensors file, mapped anew every so often, so that memory stays small."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._touched = 0
        self._open: Any = None

    def tensors(self) -> dict[str, FileTensor]:
        """All tensors by name. Raises `CorruptFileError` where the package cannot open the file."""
        import torch

        found = {}
        for name in self._file().keys():  # noqa: SIM118 - it is no dict
            described = self._file().get_slice(name)
            shape = tuple(described.get_shape())
            dtype: torch.dtype = getattr(torch, _CODES[described.get_dtype()])
            found[name] = FileTensor(shape, dtype, self._reader(name, shape))
        return found

    def _file(self) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._open is None or self._touched > _TOUCHED_BYTES:
            self._open, self._touched = None, 0
            try:
                self._open = safe_open(self._path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(
                    f"the safetensors package does not open it: {error}", where=str(self._path)
                ) from error
        return self._open

    def _reader(self, name: str, shape: tuple[int, ...]) -> Callable[[int, int], torch.Tensor]:
        def rows(start: int, stop: int) -> torch.Tensor:
            file = self._file()
            part = file.get_slice(name)[start:stop] if shape else file.get_tensor(name)
            result: torch.Tensor = part.clone()
            self._touched += result.nbytes
            return result

        return rows


def open_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file; headers only are read."""
    return SafetensorsReader(path).tensors()


class TorchFiles:
    """Opens files of `torch.save`, as a context manager: with it ends the process that helps."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> TorchFiles:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def open(self, path: Path) -> Value:
        """The value of a file, with its tensors to be read, even when this is closed.

        Raises `CorruptFileError` where `torch.load(weights_only=True)` refuses the file.
        """
        if self._process is None:
            command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        asked, answered = self._process.stdin, self._process.stdout
        assert asked is not None and answered is not None  # noqa: S101 - both are pipes
        try:
            asked.write(json.dumps(str(path.absolute())) + "\n")
            asked.flush()
            answer = json.loads(answered.readline())
        except (OSError, ValueError) as error:
            raise CorruptFileError("torch.load did not survive it", where=str(path)) from error
        if "error" in answer:
            raise CorruptFileError(f"torch.load refuses it: {answer['error']}", where=str(path))
        return _value(answer["value"], path)


def _value(described: Any, path: Path) -> Value:
    if not isinstance(described, dict):
        return described  # type: ignore[no-any-return]
    ((kind, inner),) = described.items()
    if kind == "dict":
        return {key: _value(value, path) for key, value in inner}
    if kind == "tensor":
        return _torch_tensor(path, *inner)
    values = [_value(value, path) for value in inner]
    # A stand-in is an enum of DeepSpeed, if it matters at all: its value.
    return values if kind == "list" else (values[0] if values else None)


def _torch_tensor(
    path: Path, dtype_name: str, shape: list[int], strides: list[int], place: int, available: int
) -> FileTensor:
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name)
    size = dtype.itemsize
    row = math.prod(shape[1:])
    plain = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    is_plain = all(n <= 1 or a == b for n, a, b in zip(shape, strides, plain, strict=True))

    def rows(start: int, stop: int) -> torch.Tensor:
        if is_plain:
            flat = _read(path, place + start * row * size, (stop - start) * row, dtype)
            return flat.reshape(stop - start, *shape[1:]) if shape else flat.reshape(())
        flat = _read(path, place, available // size, dtype)
        return torch.as_strided(flat, shape, strides)[start:stop].clone()

    return FileTensor(tuple(shape), dtype, rows)


def _read(path: Path, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` elements from byte `offset` of a file, little-endian."""
    import torch

    if not count:
        return torch.empty(0, dtype=dtype)
    with path.open("rb") as file:
        file.seek(offset)
        data = bytearray(count * dtype.itemsize)
        got = file.readinto(data)
    if got != len(data):
        raise CorruptFileError(f"ends at byte {offset + got:,}", where=str(path))
    # In memory that torch aligns, for sums do not depend on where a tensor lies only then.
    return torch.frombuffer(data, dtype=dtype).clone()


def state_dict(value: Value, where: str) -> dict[str, FileTensor]:
    """The tensors of a state dict by name. Raises `CorruptFileError` for anything else."""
    if not isinstance(value, Mapping):
        raise CorruptFileError("holds no state dict", where=where)
    return {name: item for name, item in value.items() if isinstance(item, FileTensor)}
