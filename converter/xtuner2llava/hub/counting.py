"""A file to upload that tells how much of it has been read for sending."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


class CallbackError(Exception):
    """`error` was raised by whoever is told of the progress, and is not the Hub's.

    It is not the `__cause__`: httpcore raises again `from None` what comes out of a request's body.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Progress:
    """Counts the bytes of one file; those that are read again for another try count once."""

    def __init__(self, size: int, advance: Callable[[int], None]) -> None:
        self._size, self._advance = size, advance
        self._done = 0

    def reach(self, position: int) -> None:
        """The file is sent up to byte `position`."""
        if position > self._done:
            count, self._done = position - self._done, position
            try:
                self._advance(count)
            except Exception as error:
                raise CallbackError(error) from error

    def finish(self) -> None:
        """The Hub has the whole file: it had it before, or Xet sent it, which reads it itself."""
        self.reach(self._size)


def addition(path: Path, name: str, progress: Progress) -> CommitOperationAdd:
    """The operation that adds the file at `path` as `name`, telling `progress` what is sent."""
    from huggingface_hub import CommitOperationAdd

    class _Counted(CommitOperationAdd):
        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
            # So does huggingface_hub ask for the file when it sends it (`lfs.py`).
            if with_tqdm and isinstance(self.path_or_fileobj, str):
                with _CountedFile(Path(self.path_or_fileobj), progress) as file:
                    yield file
            else:
                with super().as_file() as file:
                    yield file

    return _Counted(path_in_repo=name, path_or_fileobj=str(path))


class _CountedFile(io.BufferedReader):
    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(io.FileIO(path))
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        # What was asked for before has been sent.
        self._progress.reach(self.tell())
        return super().read(size)
