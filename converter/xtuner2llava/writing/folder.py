"""The output folder: written as `OUT.partial`, flushed, then renamed to `OUT`.

OUT.partial/                  what is being written
    .xtuner2llava/            its state (`state`), removed before the rename
OUT.partial.state/            the same, for the moment before OUT.partial becomes OUT
OUT.replaced/                 the old OUT, for the moment between two renames of --overwrite

Nothing is removed that this tool did not make: of an OUT that is replaced, the files that its
conversion.json lists; of an OUT.partial, those that its state lists.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType

from xtuner2llava.errors import (
    ConversionError,
    CorruptFileError,
    OutputError,
    PlanError,
    UsageError,
)
from xtuner2llava.writing.disk import disk_errors, flush_directory, write_all
from xtuner2llava.writing.out_record import STATE_NAME, Described, is_name, named, other_names
from xtuner2llava.writing.state import FolderState, acquire, is_state
from xtuner2llava.writing.target import Target, remove_files


class OutputFolder:
    """A folder that either becomes `out` as a whole, by `publish`, or never appears there.

    `with OutputFolder(out, fingerprint) as folder:` makes `OUT.partial`, which no other process
    can write at the same time, or goes on with one that has the same `fingerprint`
    (`ShardPlan.fingerprint`): what was finished there is kept. One that has another fingerprint is
    an error that says what differs of `described`, unless it is thrown away with `restart`.

    `overwrite` and `protected` are those of `Target`. Leaving the block early removes
    `OUT.partial`, or keeps it if there is something to go on from; `kept` then says where. What is
    put into `state.path` is not part of it. Raises `OutputError`.
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
        if self.out == Path(os.path.realpath(".")):
            raise UsageError(
                "is the folder that this runs in, and OUT takes its place by renaming",
                where=str(out),
                advice="Run the command in the folder above, and give the name of this one.",
            )
        self.path = self.out.with_name(self.out.name + ".partial")
        self.state = FolderState(self.path)
        self.kept: Path | None = None
        self._aside = self.path.with_name(self.path.name + ".state")
        self._target = Target(self.out, overwrite, protected)
        self._fingerprint, self._described, self._restart = fingerprint, described, restart
        self._complete = False  # Nothing but the rename is left to do.

    def __enter__(self) -> OutputFolder:
        with disk_errors(self._aside, "cannot be looked at"):
            if is_state(self._aside) and self.path.is_dir():  # Killed while it was published.
                self._target.take_back()
        self._target.check()
        with disk_errors(self.path, "cannot be made"):
            self._take_back()
            self._require_ours()
            self.state.path.mkdir(parents=True, exist_ok=True)
        self.state.lock()
        try:
            with disk_errors(self.path, "cannot be prepared"):
                self._require_no_others()
                matches = not self._restart and self.state.matches(
                    self._fingerprint, self._described
                )
                self._clear(keep=matches)
                self.state.begin(self._fingerprint, self._described)
        except BaseException:
            self.state.unlock()
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
                # What was copied of a damaged file, or of one that changed meanwhile, may be wrong.
                for name in self.state.records().keys() - self.state.finished():
                    self.state.forget(name)
            # Other values can only come from other options, so there is nothing to go on with.
            if error is None or isinstance(error, PlanError) or not self.state.records():
                self._remove()
                return
            self.kept = self.path
            advice = (
                f"What is done stays in {self.path} ({len(self.state.finished())} finished "
                "files): run the same command again to go on from there."
            )
            if isinstance(error, ConversionError):
                _advise(error, advice)
            elif isinstance(error, KeyboardInterrupt):
                error.args = (advice,)  # Only here is it known; the command line shows it.
        finally:
            self.state.unlock()

    @contextmanager
    def create(self, name: str, keep: int = 0) -> Iterator[int]:
        """A new file `name`, open for reading and writing, in place of any of that name.

        Or that file cut to its first `keep` bytes. The caller flushes it. Raises `OutputError`,
        also for an `OSError` of the block.
        """
        path = self._locate(name)
        with disk_errors(path):
            self.state.add_name(name)
            path.parent.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_CLOEXEC
            if not keep:
                self.state.forget(name)
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

    def move_into_place(self, path: Path, name: str) -> None:
        """Makes the flushed file at `path`, on the same file system, the file `name`."""
        target = self._locate(name)
        with disk_errors(target):
            self.state.add_name(name)
            self.state.forget(name)
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

    def discard(self, name: str) -> None:
        """Removes the finished file `name`: it is wrong, or stored elsewhere now."""
        path = self._locate(name)
        with disk_errors(path, "cannot be removed"):
            self.state.forget(name)
            path.unlink(missing_ok=True)

    def publish(self) -> Path:
        """Makes the folder durable and renames it to `out`, which is returned.

        Every file must have been flushed. Raises `OutputError`; then `out` is what it was before.
        """
        self._target.check()
        with disk_errors(self.path, "cannot be finished"):
            for directory, _, _ in os.walk(self.path):
                flush_directory(Path(directory))
            # One step, which takes the lock along: a folder without the state belongs to no
            # conversion, and one that is being published is not free yet.
            os.rename(self.state.path, self._aside)  # noqa: PTH104
            flush_directory(self.path)
            flush_directory(self.path.parent)
            self._complete = True
        replaces = self._target.put(self.path)
        shutil.rmtree(self._aside, ignore_errors=True)
        if replaces:
            self._target.remove_replaced()
        return self.out

    def _locate(self, name: str) -> Path:
        """The path of `name`: a file of this folder, or of one folder in it."""
        if not is_name(name):
            raise OutputError(
                f"{name!r} is not a name for a file of the output folder",
                where=str(self.out),
                advice="Expected a file name, or one folder and a file name.",
            )
        return self.path / name

    def _take_back(self) -> None:
        """Undoes a `publish` that was killed between its two steps, so that it can be resumed."""
        if not os.path.lexists(self._aside):
            return
        if not is_state(self._aside):
            raise OutputError(
                "is in the way, and no conversion left it there",
                where=str(self._aside),
                advice="Move or remove it, or choose another OUT.",
            )
        os.close(acquire(self._aside / "lock", self.path))
        if self.path.is_dir() and not os.path.lexists(self.state.path):
            os.rename(self._aside, self.state.path)  # noqa: PTH104
        else:
            shutil.rmtree(self._aside)

    def _require_ours(self) -> None:
        """Raises `OutputError` if `OUT.partial` or its state is not of this tool."""
        if not os.path.lexists(self.path):
            return
        is_folder = self.path.is_dir() and not self.path.is_symlink()
        # Looked at once: it goes when another conversion is done, and must not be made again then.
        has_state = is_folder and os.path.lexists(self.state.path)
        is_empty = is_folder and not any(self.path.iterdir())
        if not (is_state(self.state.path) if has_state else is_empty):
            raise OutputError(
                f"is in the way: it has no {STATE_NAME} of this tool, so no conversion left it "
                "there",
                where=str(self.path),
                advice="Move or remove it, or choose another OUT.",
            )

    def _require_no_others(self) -> None:
        """Raises `OutputError` if `OUT.partial`, which is locked, has files that are not ours."""
        found = other_names(self.path, self.state.names())
        others = [name for name in found if not name.startswith(f"{STATE_NAME}/")]
        if others:
            raise OutputError(
                f"holds what no conversion wrote: {named(others)}",
                where=str(self.path),
                advice="Move these files, or choose another OUT.",
            )

    def _clear(self, keep: bool) -> None:
        """Removes the files that were created here, but for what is recorded if that is to `keep`.

        The lock stays, which is held.
        """
        if not keep:
            self.state.forget_all()
        remove_files(self.path, self.state.names() - self.state.records().keys())

    def _remove(self) -> None:
        """Removes the folder, its state last: whoever is killed meanwhile leaves what is ours."""
        with suppress(OSError):
            self._clear(keep=False)
        if self.path.is_dir() and [path.name for path in self.path.iterdir()] == [STATE_NAME]:
            shutil.rmtree(self.state.path, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()


def _advise(error: ConversionError, advice: str) -> None:
    """Adds `advice` to the last fault of `error` and to its text."""
    last = error.faults[-1]
    changed = replace(last, advice=f"{last.advice} {advice}".strip())
    amended = type(error).from_faults([*error.faults[:-1], changed])
    error.faults, error.args = amended.faults, amended.args
