"""Base models on the Hub, read by HTTP range: nothing of their weights is stored.

huggingface_hub's own file system does the requests, so that tokens, endpoints and redirects are
what they are everywhere else.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from xtuner2llava.errors import CorruptFileError, UnsupportedError
from xtuner2llava.sources.hub import hub_faults, is_worth_another_try, repository_at
from xtuner2llava.sources.safetensors_file import START_BYTES, header_length, parse_header
from xtuner2llava.sources.weights import Fingerprint, Weights, open_shards
from xtuner2llava.tensors import DType, FileRange, LazyTensor, Shape
from xtuner2llava.tensors.stored import from_bytes

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What one request asks for: more than a block, as each takes a tenth of a second to be answered.
_WINDOW_BYTES = 16 << 20
# What is fetched past the end of a tensor: norms and biases lie between large neighbours, and are
# read in the same order as they lie.
_AHEAD_BYTES = 1 << 20
# Tensors that a thread reads in turn, such as a head and the embedding it may be tied to.
_WINDOWS = 2
_TRIES = 6


class _OpenFile(Protocol):
    """What is used of fsspec's files."""

    def seek(self, offset: int) -> int: ...

    def read(self, length: int) -> bytes: ...


def open_remote(reference: str, folder: Path) -> Weights:
    """The safetensors of the model `reference`, whose small files lie in `folder`.

    Headers only are read. The tensors have no file ranges; each `read` fetches bounded parts.
    Raises `CheckpointError` where the Hub does not give them.
    """
    # The folder is that of a commit: the files must be of the same.
    repository = repository_at(reference, folder)
    index = folder / _INDEX
    with hub_faults(reference):
        files = _list_files(repository)
        if index.is_file():
            return open_shards(index, lambda name: _open_file(repository, name, files))
        if _SINGLE in files:
            return _open_file(repository, _SINGLE, files)
    raise UnsupportedError(
        "has no safetensors, which alone can be read piece by piece",
        where=reference,
        advice="Leave --stream-base out: then its .bin files are downloaded.",
    )


def _list_files(repository: str) -> dict[str, int]:
    """Sizes of the repository's files in bytes."""
    from huggingface_hub import HfFileSystem

    entries: list[Any] = HfFileSystem().ls(repository, detail=True)
    return {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}


def _open_file(repository: str, name: str, files: dict[str, int]) -> Weights:
    if name not in files:
        raise CorruptFileError(f"has no file '{name}', which its index names", where=repository)
    file = RemoteFile(repository, name, files[name])
    start = file.fetch(0, min(START_BYTES, file.size))
    length = header_length(start, file.size, file.path)
    header = file.fetch(START_BYTES, length)
    tensors: dict[str, LazyTensor] = {
        entry.name: Remote(entry.name, entry.dtype, entry.shape, file, entry.offset)
        for entry in parse_header(header, file.size, file.path).entries
    }
    return Weights(tensors, (Fingerprint(name, file.size, hashlib.sha256(header).hexdigest()),))


class RemoteFile:
    """A file of a repository at one commit, of `size` bytes. Threads may read it at once."""

    def __init__(self, repository: str, name: str, size: int) -> None:
        self.path, self.size = f"{repository}/{name}", size
        self._own = threading.local()

    def read(self, offset: int, length: int, stop: int) -> bytearray:
        """`length` bytes from `offset` on, of a tensor that ends at byte `stop`.

        More may be fetched with them, for the next call. Raises `CheckpointError`, after some
        tries.
        """
        result = bytearray(length)
        filled = 0
        while filled < length:
            start = offset + filled
            window = self._window(start)
            if window is None:
                end = min(self.size, max(stop, start + _AHEAD_BYTES))
                count = min(max(length - filled, _WINDOW_BYTES), end - start)
                window = self._remember(start, self.fetch(start, count))
            begin, data = window
            part = data[start - begin : start - begin + length - filled]
            result[filled : filled + len(part)] = part
            filled += len(part)
            if start + len(part) == begin + len(data):
                self._windows.remove(window)
        return result

    def fetch(self, offset: int, length: int) -> bytes:
        """The bytes by one request, asked again if the connection fails."""
        with hub_faults(self.path):
            for attempt in range(1, _TRIES + 1):
                try:
                    file = self._opened()
                    file.seek(offset)
                    data = file.read(length)
                except Exception as error:
                    self._own.file = None
                    if attempt == _TRIES or not is_worth_another_try(error):
                        raise
                    time.sleep(min(8.0, 0.25 * 2**attempt))
                    continue
                if len(data) == length:
                    return data
                self._own.file = None
        raise CorruptFileError(
            f"the Hub gives {len(data):,} of {length:,} bytes from byte {offset:,} on",
            where=self.path,
        )

    @property
    def _windows(self) -> list[tuple[int, bytes]]:
        """What this thread fetched last: (offset, bytes)."""
        if not hasattr(self._own, "windows"):
            self._own.windows = []
        return cast("list[tuple[int, bytes]]", self._own.windows)

    def _window(self, offset: int) -> tuple[int, bytes] | None:
        found = (w for w in self._windows if w[0] <= offset < w[0] + len(w[1]))
        return next(found, None)

    def _remember(self, offset: int, data: bytes) -> tuple[int, bytes]:
        window = (offset, data)
        del self._windows[: 1 - _WINDOWS]
        self._windows.append(window)
        return window

    def _opened(self) -> _OpenFile:
        """This thread's handle; a position belongs to it."""
        if getattr(self._own, "file", None) is None:
            from huggingface_hub import HfFileSystem

            open_file: Callable[..., _OpenFile] = HfFileSystem().open
            # Without a cache of its own: `fsspec` would fetch more than is asked for.
            self._own.file = open_file(self.path, "rb", cache_type="none", block_size=_WINDOW_BYTES)
        return cast("_OpenFile", self._own.file)


class Remote(LazyTensor):
    """A row-major tensor at byte `offset` of a file that is not here."""

    def __init__(
        self, name: str, dtype: DType, shape: Shape, file: RemoteFile, offset: int
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._file, self._offset = file, offset

    def read(self, start: int, stop: int) -> torch.Tensor:
        data = self._file.read(
            self._offset + start * self.row_bytes,
            (stop - start) * self.row_bytes,
            self._offset + self.nbytes,
        )
        return from_bytes(data, self.dtype, (stop - start, *self.row_shape))

    def leaves(self) -> Iterator[LazyTensor]:
        yield self

    def extents(self) -> tuple[FileRange, ...]:
        return ()  # Of the files here.

    def flat(self) -> LazyTensor:
        shape = (math.prod(self.shape),)
        return Remote(self.name, self.dtype, shape, self._file, self._offset)
