"""Tensors put into files, as lazy tensors, for tests of what is done with those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.tensors.dtype import BY_NAME
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.stored import Stored

if TYPE_CHECKING:
    import torch


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Its elements, row-major."""
    import torch

    if not tensor.numel():
        return b""
    flat = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def stored(folder: Path, name: str, tensor: torch.Tensor) -> Stored:
    """`tensor` in a file of its own in `folder`, behind three bytes that are not its."""
    data = bytes_of(tensor)
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    path.write_bytes(b"???" + data)
    piece = FileRange(SourceFile.of(path), 3, len(data))
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    return Stored(name, dtype, tuple(tensor.shape), (piece,))
