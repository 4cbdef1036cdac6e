"""Tensors put into files, as lazy tensors, for tests of what is done with those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.tensors import FileRange, SourceFile, Stored
from xtuner2llava.tensors.dtype import BY_NAME

if TYPE_CHECKING:
    import torch


def stored(folder: Path, name: str, tensor: torch.Tensor) -> Stored:
    """`tensor` in a file of its own in `folder`, behind three bytes that are not its."""
    import torch

    data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    path.write_bytes(b"???" + data)
    piece = FileRange(SourceFile.of(path), 3, len(data))
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    return Stored(name, dtype, tuple(tensor.shape), (piece,))
