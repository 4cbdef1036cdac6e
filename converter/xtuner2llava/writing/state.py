"""What `OUT.partial` says of itself: which conversion it is, and how far that has come.

.xtuner2llava/
    lock                  locked while a conversion runs
    plan.json             {"fingerprint": ..., "described": ...}: which conversion this is
    files                 the names that were created here, a line each: only these are removed
    records/NAME.json     {"size": ..., "finished": ..., ...}: how much of a file is right
    attempts-ID/          files that workers of an executor write
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from xtuner2llava.errors import OutputError
from xtuner2llava.writing.disk import disk_errors, flush_directory
from xtuner2llava.writing.out_record import STATE_NAME, Described, differences, is_name

ATTEMPTS = "attempts-"
_NAMES = frozenset({"lock", "plan.json", "plan.json.new", "files", "records"})
_EARLIER = frozenset({"finished", "progress"})  # What version 0.1 kept there, and is cleared.
_ADVICE = (
    "Run that command again to finish it, throw what it did away with --restart, or choose another "
    "OUT."
)


class FolderState:
    """The state of `folder`, an `OUT.partial`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE_NAME
        self._folder = folder
        self._lock: int | None = None

    def lock(self) -> None:
        """Makes sure that no other conversion has the folder; raises `OutputError`."""
        self._lock = acquire(self.path / "lock", self._folder)

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, fingerprint: str, described: Described) -> None:
        """Records which conversion this is."""
        _replace(
            self.path / "plan.json", {"fingerprint": fingerprint, "described": dict(described)}
        )

    def matches(self, fingerprint: str, described: Described) -> bool:
        """Whether this is the conversion to go on with; raises `OutputError` if it is another."""
        try:
            found = json.loads((self.path / "plan.json").read_bytes())
        except (OSError, ValueError):
            return False  # Interrupted before there was anything to keep.
        if isinstance(found, dict) and found.get("fingerprint") == fingerprint:
            return True
        if not self.records():
            return False
        there = found.get("described") if isinstance(found, dict) else None
        texts = {k: str(v) for k, v in there.items()} if isinstance(there, dict) else {}
        what = differences(texts, described) if texts else ""
        raise OutputError(
            "was begun by a conversion with other input or other options"
            + (f": {what}" if what else ""),
            where=str(self._folder),
            advice=_ADVICE,
        )

    def add_name(self, name: str) -> None:
        """Records that the file `name` is ours, before there is one."""
        if name in self.names():
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path / "files", flags, 0o666)
        try:
            os.write(descriptor, f"{json.dumps(name)}\n".encode())  # One call: threads may do so.
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def names(self) -> frozenset[str]:
        """The names of the files that were created here."""
        try:
            lines = (self.path / "files").read_bytes().splitlines()
        except FileNotFoundError:
            return frozenset()
        names = []
        for line in lines:
            with suppress(ValueError):  # Half a line is of a file that was not created yet.
                names.append(json.loads(line))
        return frozenset(name for name in names if isinstance(name, str) and is_name(name))

    def record(self, name: str) -> dict[str, Any] | None:
        """What `set_record` recorded last, if the file `name` has as many bytes, or more."""
        try:
            values = json.loads(self._record(name).read_bytes())
            size = (self._folder / name).lstat().st_size
        except (OSError, ValueError):
            return None
        known = isinstance(values, dict) and isinstance(values.get("size"), int)
        return values if known and values["size"] <= size else None

    def set_record(self, name: str, values: Mapping[str, object]) -> None:
        """Records that the first `values["size"]` bytes of `name` are flushed and right.

        `values["finished"]` says whether that is all of it, compared with its sources as a whole.
        """
        record = self._record(name)
        with disk_errors(record):
            record.parent.mkdir(parents=True, exist_ok=True)
            _replace(record, values)

    def forget(self, name: str) -> None:
        self._record(name).unlink(missing_ok=True)

    def forget_all(self) -> None:
        shutil.rmtree(self.path / "records", ignore_errors=True)

    def records(self) -> dict[str, dict[str, Any]]:
        """What there is to go on from, by the names of the files."""
        found = {name: self.record(name) for name in self.names()}
        return {name: values for name, values in found.items() if values is not None}

    def finished(self) -> list[str]:
        """The names of the files that need not be written again."""
        return [name for name, values in self.records().items() if values.get("finished") is True]

    def _record(self, name: str) -> Path:
        return self.path / "records" / f"{name}.json"


def is_state(path: Path) -> bool:
    """Whether `path` is a folder with nothing but what a `FolderState` keeps there, and no link."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(
        (e.name in _NAMES | _EARLIER or e.name.startswith(ATTEMPTS)) and not e.is_symlink()
        for e in path.iterdir()
    )


def acquire(path: Path, folder: Path) -> int:
    """An open, locked file `path`; raises `OutputError` if another process has locked it."""
    with disk_errors(path, "cannot be locked"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
        except BlockingIOError:
            same = False
        except BaseException:
            os.close(descriptor)
            raise
    if not same:
        os.close(descriptor)
        raise OutputError(
            "another conversion is writing to it",
            where=str(folder),
            advice="Wait until it is done, or choose another OUT.",
        )
    return descriptor


def _replace(path: Path, values: Mapping[str, object]) -> None:
    """Replaces a file of the state so that a crash leaves the old or the new one."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    flush_directory(path.parent)
