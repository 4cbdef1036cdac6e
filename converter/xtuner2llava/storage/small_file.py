"""Untrusted small files: plain files of bounded size that lie in their folder.

A folder that was unpacked or cloned may hold links to any file of this machine, whose content could
end in a published model; and pipes, which never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, UnsupportedError

_LONGEST_NAME = 255  # bytes, on every file system of Linux


def read_small(path: Path, most: int) -> bytes:
    """The bytes of the file `path`, which are at most `most`.

    Raises `CorruptFileError` if it has more, is not a plain file, or is a link out of its folder.
    """
    inside(path.parent, path.name)
    return read_plain(path, most)


def read_plain(path: Path, most: int) -> bytes:
    """As `read_small`, for a file that the user named, which may be a link to anywhere."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CorruptFileError("cannot be read (it is not a plain file)", where=str(path))
            data = file.read(min(most, status.st_size) + 1)  # It is allocated at once.
    except (OSError, ValueError) as error:  # ValueError: a path with a null character.
        reason = getattr(error, "strerror", None) or error
        raise CorruptFileError(f"cannot be read ({reason})", where=str(path)) from error
    if len(data) > most:
        raise CorruptFileError(f"has more than {most:,} bytes", where=str(path))
    if len(data) != status.st_size:
        raise CorruptFileError("changed while it was read", where=str(path))
    return data


def _without_waiting(path: str, flags: int) -> int:
    """Opens `path`; if it is a pipe, plain `open` would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; refuses names and links that lead out of it.

    Links into the `blobs` of a Hugging Face cache are how that cache stores files.
    """
    path = folder / name
    length = len(name.encode("utf-8", "surrogatepass"))
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name or length > _LONGEST_NAME:
        shown = repr(name[:_LONGEST_NAME])
        raise CorruptFileError(f"names {shown}, which is not a plain file name", where=str(folder))
    if not os.path.islink(path):  # noqa: PTH114 - False where it cannot be seen: opening says more
        return path
    try:
        target, home = path.resolve(), folder.resolve()
    # RuntimeError: before Python 3.13, a link to itself. ValueError: a name that is not Unicode.
    except (OSError, RuntimeError, ValueError) as error:
        raise CorruptFileError("is a link to nowhere", where=str(path)) from error
    # A repository's folders lie below snapshots/{revision}, its files all in blobs.
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    if target.parent != home and not any(folder in target.parents for folder in blobs):
        raise CorruptFileError(
            "is a link that leads out of its folder",
            where=str(path),
            advice="Give the folder that really holds the files, or copy the file here.",
        )
    return path


def git_lfs_pointer(where: str) -> UnsupportedError:
    """The error for the text file that a clone without git-lfs has in place of a weight file."""
    return UnsupportedError(
        "a git-lfs pointer, not the file itself",
        where=where,
        advice="Run `git lfs pull` in its repository.",
    )
