"""Base models on the Hub, read by HTTP range: nothing of their weights is stored.

huggingface_hub's file system does the requests, so that tokens, endpoints and redirects are what
they are everywhere else.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import CheckpointError, CorruptFileError, UnsupportedError
from xtuner2llava.hub.download import list_files, split_reference
from xtuner2llava.hub.errors import hub_errors, with_retries
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.safetensors_file import read_header
from xtuner2llava.storage.weights import Weights, open_shards
from xtuner2llava.tensors.dtype import DType
from xtuner2llava.tensors.files import FileRange
from xtuner2llava.tensors.lazy import LazyTensor, Shape
from xtuner2llava.tensors.stored import from_bytes

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What is fetched past the end of what is asked for, as each request takes a tenth of a second to be
# answered: small tensors lie between large ones, and are read in the order in which they lie.
_AHEAD_BYTES = 8 << 20


def open_remote(reference: str, folder: Path) -> Weights:
    """The safetensors of the model `reference`, whose small files lie in `folder`.

    Headers only are read. The tensors have no file ranges; each `read` fetches bounded parts.
    Raises `CheckpointError` where the Hub does not give them.
    """
    # The folder is that of a commit: the files must be of the same.
    repo, commit = split_reference(reference)[0], folder.name
    repository, index = f"{repo}@{commit}", folder / _INDEX
    with hub_errors(repository, CheckpointError):
        files = {name: entry.size for name, entry in list_files(repo, commit).items()}
    if index.is_file():
        return open_shards(index, lambda name: _open_file(repository, name, files))
    if _SINGLE in files:
        return _open_file(repository, _SINGLE, files)
    raise UnsupportedError(
        "has no safetensors, which alone can be read piece by piece",
        where=reference,
        advice="Leave --stream-base out: then its .bin files are downloaded.",
    )


def _open_file(repository: str, name: str, files: dict[str, int]) -> Weights:
    if name not in files:
        raise CorruptFileError(f"has no file '{name}', which its index names", where=repository)
    size = files[name]
    file = RemoteFile(f"{repository}/{name}")
    header = read_header(RemoteFile(file.path, ahead=0).read, size, file.path)
    tensors: dict[str, LazyTensor] = {
        entry.name: RemoteTensor(entry.name, entry.dtype, entry.shape, file, entry.offset)
        for entry in header.entries
    }
    return Weights(tensors, (Fingerprint(name, size, header.sha256),))


class RemoteFile:
    """A file of a repository at one commit. Threads may read it at once."""

    def __init__(self, path: str, ahead: int = _AHEAD_BYTES) -> None:
        self.path = path
        self._ahead = ahead
        self._own = threading.local()

    def read(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset` on; raises `CheckpointError`, after some tries."""
        with hub_errors(self.path, CheckpointError):
            data = bytearray(with_retries(lambda: self._read(offset, length)))
        if len(data) != length:
            raise CorruptFileError(
                f"the Hub gives {len(data):,} of {length:,} bytes from byte {offset:,} on",
                where=self.path,
            )
        return data

    def _read(self, offset: int, length: int) -> bytes:
        from huggingface_hub import HfFileSystem

        # A position, and what was read ahead, belong to a thread.
        if not hasattr(self._own, "file"):
            self._own.file = HfFileSystem().open(
                self.path,
                "rb",
                cache_type="readahead" if self._ahead else "none",
                block_size=self._ahead or None,
            )
        self._own.file.seek(offset)
        return bytes(self._own.file.read(length))


class RemoteTensor(LazyTensor):
    """A row-major tensor at byte `offset` of a file that is not here."""

    def __init__(
        self, name: str, dtype: DType, shape: Shape, file: RemoteFile, offset: int
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._file, self._offset = file, offset

    def read(self, start: int, stop: int) -> torch.Tensor:
        place = self._offset + start * self.row_bytes
        data = self._file.read(place, (stop - start) * self.row_bytes)
        return from_bytes(data, self.dtype, (stop - start, *self.row_shape))

    def leaves(self) -> Iterator[LazyTensor]:
        yield self

    def extents(self) -> tuple[FileRange, ...]:
        return ()  # Of the files here.

    def flat(self) -> LazyTensor:
        shape = (math.prod(self.shape),)
        return RemoteTensor(self.name, self.dtype, shape, self._file, self._offset)
