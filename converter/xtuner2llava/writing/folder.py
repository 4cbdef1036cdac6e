"""The output folder: written as `OUT.partial`, flushed, then renamed to `OUT`.

OUT.partial/                  what is being written
    .xtuner2llava/            ours only; removed before the rename
        lock                  locked while a conversion runs
        plan.json             {"fingerprint": ..., "described": ...}: which conversion this is
        files                 the names that were created here, a line each: only these are removed
        finished/NAME.json    {"size": ..., "blake3": ..., ...}: files that are done
        progress/NAME.json    the same of the first bytes of a file that is being written
OUT.replaced/                 the old OUT, for the moment between two renames of --overwrite
OUT.partial.state/            .xtuner2llava, for the moment before OUT.partial becomes OUT

Nothing is removed that this tool did not make: of an OUT that is replaced, the files that its
conversion.json lists; of an OUT.partial, those that `files` lists.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from xtuner2llava.errors import (
    ConversionError,
    CorruptFileError,
    OutputError,
    PlanError,
    UsageError,
)
from xtuner2llava.tensors import FileRange, SourceFile
from xtuner2llava.tensors.files import read_into
from xtuner2llava.writing.disk import BLOCK_BYTES, disk_errors, flush_directory, write_all
from xtuner2llava.writing.out_record import (
    RECORD_NAME,
    TOOL,
    Described,
    differences,
    named,
    other_names,
    read_record,
    recorded_names,
)

_STATE = ".xtuner2llava"
_STATE_NAMES = frozenset({"lock", "plan.json", "plan.json.new", "files", "finished", "progress"})
_CHOOSE = "Choose another OUT."


class OutputFolder:
    """A folder that either becomes `out` as a whole, by `publish`, or never appears there.

    `with OutputFolder(out, fingerprint) as folder:` makes `OUT.partial`, which nobody else can
    write at the same time, or goes on with one that has the same `fingerprint`
    (`ShardPlan.fingerprint`): what was finished there is kept. One that has another fingerprint is
    an error that says what differs of `described`, unless it is thrown away with `restart`.

    `overwrite` lets `publish` replace a folder that a conversion wrote and that holds nothing else,
    and none of the `protected` paths, which are read. Leaving the block early removes
    `OUT.partial`, or keeps it if there is something to go on from; `kept` then says where. `state`
    is a folder for what shall not be part of it. Raises `OutputError`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        fingerprint: str,
        *,
        described: Described = MappingProxyType({}),
        overwrite: bool = False,
        restart: bool = False,
        protected: Sequence[Path] = (),
    ) -> None:
        self.out = Path(os.path.realpath(out))
        if not self.out.name:
            raise UsageError("this cannot be an output folder", where=str(out))
        self.path = self.out.with_name(self.out.name + ".partial")
        self.kept: Path | None = None
        self._replaced = self.out.with_name(self.out.name + ".replaced")
        self.state = self.path / _STATE
        self._aside = self.path.with_name(self.path.name + ".state")
        self._fingerprint, self._described = fingerprint, dict(described)
        self._overwrite, self._restart, self._protected = overwrite, restart, tuple(protected)
        self._lock: int | None = None
        self._complete = False  # Nothing but the rename is left to do.

    def __enter__(self) -> OutputFolder:
        self._take_back_replaced()
        self._check_target()
        with disk_errors(self.path, "cannot be made"):
            self._take_back()
            self._require_ours()
            self.state.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire(self.state / "lock")
        try:
            with disk_errors(self.path, "cannot be prepared"):
                self._require_no_others()
                self._clear(keep=not self._restart and self._matches())
                plan = {"fingerprint": self._fingerprint, "described": self._described}
                self._write(self.state / "plan.json", json.dumps(plan, indent=2))
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._complete:
                if isinstance(error, ConversionError):
                    shutil.rmtree(self._aside, ignore_errors=True)
                return
            if isinstance(error, CorruptFileError):
                # What was copied of a damaged file, or of one that changed meanwhile, may be wrong;
                # finished files were compared with their sources as a whole.
                shutil.rmtree(self._progress, ignore_errors=True)
            # Other values can only come from other options, so there is nothing to go on with.
            if error is not None and self._has_work() and not isinstance(error, PlanError):
                self.kept = self.path
                done = sum(1 for _ in self._finished.glob("**/*.json"))
                told = (
                    f"What is done stays in {self.path} ({done} finished files): run the same "
                    "command again to go on from there."
                )
                if isinstance(error, ConversionError):
                    _advise(error, told)
                elif isinstance(error, KeyboardInterrupt):
                    error.args = (told,)  # Only here is it known; the command line tells it.
            else:
                self._remove()
        finally:
            self._release()

    @contextmanager
    def create(self, name: str, keep: int = 0) -> Iterator[int]:
        """A new file `name`, open for reading and writing, in place of any of that name.

        Or that file cut to its first `keep` bytes. The caller flushes it. Raises `OutputError`,
        also for an `OSError` of the block.
        """
        path = self._locate(name)
        with disk_errors(path):
            self._note(name)
            path.parent.mkdir(exist_ok=True)
            self._record(name).unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CLOEXEC
            if not keep:
                self._begun(name).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                flags |= os.O_CREAT | os.O_EXCL
            descriptor = os.open(path, flags, 0o666)
            try:
                if keep:
                    os.ftruncate(descriptor, keep)
                yield descriptor
            finally:
                os.close(descriptor)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes and flushes the small file `name`."""
        with self.create(name) as descriptor:
            write_all(descriptor, memoryview(data), 0)
            os.fsync(descriptor)

    def copy_file(self, name: str, source: SourceFile) -> None:
        """Writes and flushes `name`, byte for byte the file `source`.

        Raises `CorruptFileError` if that cannot be read or has changed.
        """
        buffer = memoryview(bytearray(min(BLOCK_BYTES, source.size)))
        with source.open() as origin, self.create(name) as descriptor:
            for offset in range(0, source.size, BLOCK_BYTES):
                view = buffer[: source.size - offset]
                read_into(origin, FileRange(source, offset, len(view)), view)
                write_all(descriptor, view, offset)
            source.check(origin)
            os.fsync(descriptor)

    def adopt(self, path: Path, name: str) -> None:
        """Makes the flushed file at `path`, on the same file system, the file `name`."""
        target = self._locate(name)
        with disk_errors(target):
            self._note(name)
            self._forget(name)
            path.replace(target)

    def require_space(self, count: int) -> None:
        """Raises `OutputError` if the disk has no room for `count` bytes more."""
        with disk_errors(self.path, "cannot be looked at"):
            free = shutil.disk_usage(self.path).free
        if free < count:
            raise OutputError(
                f"{count:,} bytes are still to be written, the disk has {free:,} bytes free",
                where=str(self.path.parent),
                advice=f"Free {count - free:,} bytes there, or choose an OUT on another disk.",
            )

    def finished(self, name: str) -> dict[str, object] | None:
        """What `mark_finished` was called with in an earlier run, if the file has that size."""
        found = self._read(self._record(name), name)
        return None if found is None or found[0] != found[1]["size"] else found[1]

    def progress(self, name: str) -> dict[str, object] | None:
        """What `mark_progress` was last called with, if the file has as many bytes, or more."""
        found = self._read(self._begun(name), name)
        return None if found is None or found[0] < found[1]["size"] else found[1]

    def mark_finished(self, name: str, values: Mapping[str, object]) -> None:
        """Remembers that `name`, of `values["size"]` bytes, is flushed and need not be written."""
        self._remember(self._record(name), values)
        with disk_errors(self._begun(name)):
            self._begun(name).unlink(missing_ok=True)

    def mark_progress(self, name: str, values: Mapping[str, object]) -> None:
        """Remembers that so much of `name`, its first `values["size"]` bytes, is flushed."""
        self._remember(self._begun(name), values)

    def _remember(self, record: Path, values: Mapping[str, object]) -> None:
        with disk_errors(record):
            record.parent.mkdir(parents=True, exist_ok=True)
            self._write(record, json.dumps(values))

    def _read(self, record: Path, name: str) -> tuple[int, dict[str, Any]] | None:
        """The size of `name`, and what `record` says of it."""
        try:
            values = json.loads(record.read_bytes())
            size = self._locate(name).lstat().st_size
        except (OSError, ValueError):
            return None
        known = isinstance(values, dict) and isinstance(values.get("size"), int)
        return (size, values) if known else None

    def discard(self, name: str) -> None:
        """Removes the finished file `name`, whose content somebody else has now."""
        path = self._locate(name)
        with disk_errors(path, "cannot be removed"):
            self._forget(name)
            path.unlink(missing_ok=True)

    def publish(self) -> Path:
        """Makes the folder durable and renames it to `out`, which is returned.

        Every file must have been flushed. Raises `OutputError`; then `out` is what it was before.
        """
        self._check_target()
        with disk_errors(self.path, "cannot be finished"):
            for directory, _, _ in os.walk(self.path):
                flush_directory(Path(directory))
            # One step, which takes the lock along: a folder without the state is nobody's, and
            # one that is being published must not be taken for free.
            os.rename(self.state, self._aside)  # noqa: PTH104
            flush_directory(self.path)
            flush_directory(self.path.parent)
            self._complete = True
        with disk_errors(self.out, f"{self.path} is complete, but cannot be renamed to this"):
            replaces = self._overwrite and self.out.exists()
            if replaces:
                self.out.rename(self._replaced)
                try:
                    self.path.rename(self.out)
                except BaseException:
                    self._replaced.rename(self.out)
                    raise
            else:
                self.path.rename(self.out)
            flush_directory(self.out.parent)
        shutil.rmtree(self._aside, ignore_errors=True)
        if replaces:
            self._remove_replaced()
        return self.out

    def _remove_replaced(self) -> None:
        """Removes of the old OUT what its conversion wrote, by name: others may have come since."""
        folder = self._replaced
        with disk_errors(folder, f"{self.out} is complete, but the old one cannot be removed"):
            record = read_record(folder)
            names = frozenset() if record is None else recorded_names(record)
            others = other_names(folder, names)
            if others:
                raise OutputError(
                    f"holds what no conversion wrote ({named(others)}), so this old folder stays; "
                    f"{self.out} is complete",
                    where=str(folder),
                    advice="Move these files, and remove the folder.",
                )
            _unlink_all(folder, names - {RECORD_NAME})
            _unlink_all(folder, [RECORD_NAME])  # Last: until then, the folder says whose it is.
            folder.rmdir()

    @property
    def _finished(self) -> Path:
        return self.state / "finished"

    @property
    def _progress(self) -> Path:
        return self.state / "progress"

    def _record(self, name: str) -> Path:
        return self._finished / f"{name}.json"

    def _begun(self, name: str) -> Path:
        return self._progress / f"{name}.json"

    def _forget(self, name: str) -> None:
        self._record(name).unlink(missing_ok=True)
        self._begun(name).unlink(missing_ok=True)

    def _has_work(self) -> bool:
        """Whether there is something here to go on from."""
        return any(self._finished.glob("**/*.json")) or any(self._progress.glob("**/*.json"))

    def _note(self, name: str) -> None:
        """Records that the file `name` is ours, before there is one."""
        if name in self._noted():
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.state / "files", flags, 0o666)
        try:
            os.write(descriptor, f"{json.dumps(name)}\n".encode())  # One call: threads may do so.
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _noted(self) -> frozenset[str]:
        """The names of the files that were created here."""
        try:
            lines = (self.state / "files").read_bytes().splitlines()
        except FileNotFoundError:
            return frozenset()
        names = []
        for line in lines:
            with suppress(ValueError):  # Half a line is of a file that was not created yet.
                names.append(json.loads(line))
        return frozenset(name for name in names if isinstance(name, str) and self._is_name(name))

    def _locate(self, name: str) -> Path:
        """The path of `name`: a file of this folder, or of one folder in it."""
        if not self._is_name(name):
            raise OutputError(
                f"{name!r} is no name for a file of the output folder",
                where=str(self.out),
                advice="Expected a file name, or one folder and a file name.",
            )
        return self.path / name

    @staticmethod
    def _is_name(name: str) -> bool:
        parts = name.split("/")
        bad = any(part in ("", ".", "..", _STATE) or "\0" in part for part in parts)
        return not bad and len(parts) <= 2 and "\\" not in name

    def _check_target(self) -> None:
        """Raises `OutputError` unless `publish` may rename to `out`."""
        with disk_errors(self.out, "cannot be looked at"):
            if not os.path.lexists(self.out):
                return
            if not self.out.is_dir():
                raise OutputError("is a file, expected a folder or nothing", where=str(self.out))
            if any(self.out.iterdir()):
                self._require_replaceable()

    def _require_replaceable(self) -> None:
        """Raises `OutputError` unless the folder `out` may be removed with all that is in it."""
        where = str(self.out)
        for path in self._protected:
            if self.out in (real := Path(os.path.realpath(path)), *real.parents):
                raise OutputError(f"holds {path}, which is read", where=where, advice=_CHOOSE)
        record = read_record(self.out)
        if record is None:
            raise OutputError(
                f"exists and is not empty, and has no {RECORD_NAME} of {TOOL}: --overwrite "
                "replaces only folders that convert wrote",
                where=where,
                advice=_CHOOSE,
            )
        others = other_names(self.out, recorded_names(record))
        if others:
            raise OutputError(
                f"holds what no conversion wrote: {named(others)}",
                where=where,
                advice="Move these files, or choose another OUT.",
            )
        if not self._overwrite:
            raise OutputError(
                "exists and is not empty: another conversion wrote it",
                where=where,
                advice="Choose another OUT, or replace it with --overwrite.",
            )
        if os.path.lexists(self._replaced):
            raise OutputError(
                "is in the way; an interrupted --overwrite leaves the old folder there",
                where=str(self._replaced),
                advice=f"Remove it if {self.out} is complete, or rename it back.",
            )

    def _require_ours(self) -> None:
        """Raises `OutputError` if `OUT.partial` or its state is of somebody else."""
        if not os.path.lexists(self.path):
            return
        is_folder = self.path.is_dir() and not self.path.is_symlink()
        # Looked at once: it goes when another conversion is done, and must not be made again then.
        has_state = is_folder and os.path.lexists(self.state)
        if not is_folder or not (_is_state(self.state) if has_state else _is_empty(self.path)):
            raise OutputError(
                f"is in the way: it has no {_STATE} of this tool, so no conversion left it there",
                where=str(self.path),
                advice="Move or remove it, or choose another OUT.",
            )

    def _require_no_others(self) -> None:
        """Raises `OutputError` if files of somebody else lie in `OUT.partial`; it is locked."""
        state = f"{_STATE}/"
        others = [name for name in other_names(self.path, self._noted())
                  if not name.startswith(state)]  # fmt: skip
        if others:
            raise OutputError(
                f"holds what no conversion wrote: {named(others)}",
                where=str(self.path),
                advice="Move these files, or choose another OUT.",
            )

    def _take_back(self) -> None:
        """Undoes a `publish` that was killed between its two steps, so that it can be resumed."""
        if not os.path.lexists(self._aside):
            return
        if not _is_state(self._aside):
            raise OutputError(
                "is in the way, and no conversion left it there",
                where=str(self._aside),
                advice="Move or remove it, or choose another OUT.",
            )
        os.close(self._acquire(self._aside / "lock"))
        if self.path.is_dir() and not os.path.lexists(self.state):
            os.rename(self._aside, self.state)  # noqa: PTH104
        else:
            shutil.rmtree(self._aside)

    def _take_back_replaced(self) -> None:
        """Undoes the first of two renames of --overwrite, after which it was killed."""
        with disk_errors(self._replaced, "cannot be renamed back"):
            was_publishing = _is_state(self._aside) and self.path.is_dir()
            if was_publishing and not os.path.lexists(self.out) and read_record(self._replaced):
                self._replaced.rename(self.out)

    def _remove(self) -> None:
        """Removes the folder, its state last: whoever is killed meanwhile leaves what is ours."""
        with suppress(OSError):
            self._clear(keep=False)
        if self.path.is_dir() and [path.name for path in self.path.iterdir()] == [_STATE]:
            shutil.rmtree(self.state, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()

    def _matches(self) -> bool:
        """Whether this is the conversion to go on with; raises `OutputError` if it is another."""
        try:
            found = json.loads((self.state / "plan.json").read_bytes())
        except (OSError, ValueError):
            return False  # Interrupted before there was anything to keep.
        if isinstance(found, dict) and found.get("fingerprint") == self._fingerprint:
            return True
        if not self._has_work():
            return False
        there = found.get("described") if isinstance(found, dict) else None
        texts = {k: str(v) for k, v in there.items()} if isinstance(there, dict) else {}
        what = differences(texts, self._described) if texts else ""
        raise OutputError(
            "was begun by a conversion with other input or other options"
            + (f": {what}" if what else ""),
            where=str(self.path),
            advice="Run that command again to finish it, throw what it did away with --restart, or "
            "choose another OUT.",
        )

    def _clear(self, keep: bool) -> None:
        """Removes the files that were created here, but for what is recorded if that is to `keep`.

        The lock stays, which is held.
        """
        names = self._noted()
        if not keep:
            shutil.rmtree(self._finished, ignore_errors=True)
            shutil.rmtree(self._progress, ignore_errors=True)
        _unlink_all(
            self.path,
            [n for n in names if not (self._record(n).exists() or self._begun(n).exists())],
        )

    def _write(self, path: Path, text: str) -> None:
        """Replaces a file of the state so that a crash leaves the old or the new one."""
        fresh = path.with_name(path.name + ".new")
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        flush_directory(path.parent)

    def _acquire(self, path: Path) -> int:
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
                where=str(self.path),
                advice="Wait until it is done, or choose another OUT.",
            )
        return descriptor

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _advise(error: ConversionError, advice: str) -> None:
    """Adds `advice` to the last fault of `error` and to its text."""
    last = error.faults[-1]
    changed = replace(last, advice=f"{last.advice} {advice}".strip())
    amended = type(error).from_faults([*error.faults[:-1], changed])
    error.faults, error.args = amended.faults, amended.args


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _is_state(path: Path) -> bool:
    """Whether `path` is a folder with nothing but what an `OutputFolder` keeps in its state."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(e.name in _STATE_NAMES or e.name.startswith("attempts-") for e in path.iterdir())


def _unlink_all(folder: Path, names: Iterable[str]) -> None:
    """Removes the files `names` of `folder`, and folders in it that are empty then."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        if "/" in name:
            with suppress(OSError):
                (folder / name).parent.rmdir()
