"""The output folder: written as `OUT.partial`, flushed, then renamed to `OUT`.

OUT.partial/                  what is being written
    .xtuner2llava/            ours only; removed before the rename
        lock                  locked while a conversion runs
        plan.json             {"fingerprint": ...}: which conversion this is
        finished/NAME.json    {"size": ..., "blake3": ..., ...}: files that are done
        progress/NAME.json    the same of the first bytes of a file that is being written
OUT.replaced/                 the old OUT, for the moment between two renames of --overwrite
OUT.partial.state/            .xtuner2llava, for the moment before OUT.partial becomes OUT
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from xtuner2llava.errors import ConversionError, OutputError, PlanError, UsageError
from xtuner2llava.tensors import FileRange, SourceFile
from xtuner2llava.tensors.files import read_into
from xtuner2llava.writing.disk import BLOCK_BYTES, disk_errors, flush_directory, write_all

_STATE = ".xtuner2llava"


class OutputFolder:
    """A folder that either becomes `out` as a whole, by `publish`, or never appears there.

    `with OutputFolder(out, fingerprint) as folder:` makes `OUT.partial`, which nobody else can
    write at the same time. `fingerprint` identifies the conversion (`ShardPlan.fingerprint`):
    with `resume`, finished files are kept if theirs is the same. `overwrite` lets `publish`
    replace a folder that is there, unless it holds one of the `protected` paths, which are read.
    Leaving the block early removes `OUT.partial`, or keeps it if `resume` could go on from it;
    `kept` then says where. `state` is a folder for what shall not be part of it. Raises
    `OutputError`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        fingerprint: str,
        *,
        overwrite: bool = False,
        resume: bool = False,
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
        self._fingerprint = fingerprint
        self._overwrite, self._resume, self._protected = overwrite, resume, tuple(protected)
        self._lock: int | None = None
        self._complete = False  # Nothing but the rename is left to do.

    def __enter__(self) -> OutputFolder:
        self._check_target()
        with disk_errors(self.path, "cannot be made"):
            self._take_back()
            if not self._is_ours():
                self.state.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire(self.state / "lock")
        try:
            with disk_errors(self.path, "cannot be prepared"):
                self._clear(keep=self._resume and self._matches())
                self._write(
                    self.state / "plan.json", json.dumps({"fingerprint": self._fingerprint})
                )
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
            finished = list(self._finished.glob("**/*.json"))
            begun = any(self._progress.glob("**/*.json"))
            # Other values can only come from other options, so there is nothing to go on with.
            if error is not None and (finished or begun) and not isinstance(error, PlanError):
                self.kept = self.path
                what = f"{len(finished)} finished files stay" if finished else "What is done stays"
                told = (
                    f"{what} in {self.path}: run the same command with --resume to go on from "
                    "there."
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
            self._record(name).unlink(missing_ok=True)
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
            self._record(name).unlink(missing_ok=True)
            self._begun(name).unlink(missing_ok=True)
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
        with disk_errors(
            self._replaced, f"{self.out} is complete, but the old one cannot be removed"
        ):
            if replaces:
                shutil.rmtree(self._replaced)
        return self.out

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

    def _locate(self, name: str) -> Path:
        """The path of `name`: a file of this folder, or of one folder in it."""
        parts = name.split("/")
        bad = any(part in ("", ".", "..", _STATE) or "\0" in part for part in parts)
        if bad or len(parts) > 2 or "\\" in name:
            raise OutputError(
                f"{name!r} is no name for a file of the output folder",
                where=str(self.out),
                advice="Expected a file name, or one folder and a file name.",
            )
        return self.path.joinpath(*parts)

    def _check_target(self) -> None:
        """Raises `OutputError` unless `publish` may rename to `out`."""
        with disk_errors(self.out, "cannot be looked at"):
            if not os.path.lexists(self.out):
                return
            if not self.out.is_dir():
                raise OutputError("is a file, expected a folder or nothing", where=str(self.out))
            if not any(self.out.iterdir()):
                return
            if not self._overwrite:
                raise OutputError(
                    "exists and is not empty",
                    where=str(self.out),
                    advice="Choose another OUT, or replace it with --overwrite.",
                )
            for path in self._protected:
                if self.out in (real := Path(os.path.realpath(path)), *real.parents):
                    raise OutputError(
                        f"holds {path}, which is read: --overwrite would remove it",
                        where=str(self.out),
                        advice="Choose another OUT.",
                    )
            if self._replaced.exists():
                raise OutputError(
                    "is in the way; an interrupted --overwrite leaves the old folder there",
                    where=str(self._replaced),
                    advice=f"Remove it if {self.out} is complete, or rename it back.",
                )

    def _is_ours(self) -> bool:
        """Whether there is a folder of this tool; raises `OutputError` if it is somebody else's."""
        if not os.path.lexists(self.path):
            return False
        is_folder = self.path.is_dir() and not self.path.is_symlink()
        # Looked at once: it goes when another conversion is done, and must not be made again then.
        has_state = self.state.is_dir()
        if not is_folder or (not has_state and any(self.path.iterdir())):
            raise OutputError(
                f"is in the way: it holds no {_STATE}, so no conversion left it there",
                where=str(self.path),
                advice="Move or remove it, or choose another OUT.",
            )
        return has_state

    def _take_back(self) -> None:
        """Undoes a `publish` that was killed between its two steps, so that it can be resumed."""
        if not os.path.lexists(self._aside):
            return
        known = {"lock", "plan.json", "finished", "progress"}
        if not self._aside.is_dir() or {path.name for path in self._aside.iterdir()} - known:
            raise OutputError(
                "is in the way, and no conversion left it there",
                where=str(self._aside),
                advice="Move or remove it, or choose another OUT.",
            )
        os.close(self._acquire(self._aside / "lock"))
        if self.path.is_dir() and not self.state.exists():
            os.rename(self._aside, self.state)  # noqa: PTH104
        else:
            shutil.rmtree(self._aside)

    def _remove(self) -> None:
        """Removes the folder, its state last: whoever is killed meanwhile leaves what is ours."""
        with suppress(OSError):
            self._clear(keep=False)
        shutil.rmtree(self.state, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()

    def _matches(self) -> bool:
        """Whether this is a plan to resume; raises `OutputError` if it is that of another one."""
        plan = self.state / "plan.json"
        try:
            found = json.loads(plan.read_bytes())
        except (OSError, ValueError):
            return False  # Interrupted before there was anything to keep.
        if not isinstance(found, dict) or found.get("fingerprint") != self._fingerprint:
            raise OutputError(
                "was begun by a conversion with other input or other options",
                where=str(self.path),
                advice="Resume with the same command, or start anew without --resume.",
            )
        return True

    def _clear(self, keep: bool) -> None:
        """Removes all but the lock, which is held, and what was written if that is to `keep`."""
        if not keep:
            shutil.rmtree(self._finished, ignore_errors=True)
            shutil.rmtree(self._progress, ignore_errors=True)
        for child in self.path.iterdir():
            known = self._record(child.name).exists() or self._begun(child.name).exists()
            if child == self.state or known:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

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
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
