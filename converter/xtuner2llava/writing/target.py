"""OUT: whether it may be replaced, and how a finished folder takes its place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from xtuner2llava.errors import OutputError
from xtuner2llava.writing.disk import disk_errors, flush_directory
from xtuner2llava.writing.out_record import (
    RECORD_NAME,
    TOOL,
    named,
    other_names,
    read_record,
    recorded_names,
)

CHOOSE = "Choose another OUT."


class Target:
    """The folder `out`, which may be replaced with `overwrite` if a conversion wrote it.

    Then it is `OUT.replaced` for the moment between two renames. It is never replaced if it has
    files that its conversion.json does not list, or any of the `protected` paths, which are read.
    """

    def __init__(self, out: Path, overwrite: bool, protected: Sequence[Path]) -> None:
        self.out = out
        self.replaced = out.with_name(out.name + ".replaced")
        self._overwrite, self._protected = overwrite, tuple(protected)

    def check(self) -> None:
        """Raises `OutputError` unless `put` may make a folder this one."""
        with disk_errors(self.out, "cannot be looked at"):
            if not os.path.lexists(self.out):
                return
            if not self.out.is_dir():
                raise OutputError("is a file, expected a folder or nothing", where=str(self.out))
            if any(self.out.iterdir()):
                self._check_replaceable()

    def _check_replaceable(self) -> None:
        where = str(self.out)
        for path in self._protected:
            if self.out in (real := Path(os.path.realpath(path)), *real.parents):
                raise OutputError(f"holds {path}, which is read", where=where, advice=CHOOSE)
        record = read_record(self.out)
        if record is None:
            raise OutputError(
                f"exists and is not empty, and has no {RECORD_NAME} of {TOOL}: --overwrite "
                "replaces only folders that convert wrote",
                where=where,
                advice=CHOOSE,
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
        if os.path.lexists(self.replaced):
            raise OutputError(
                "is in the way; an interrupted --overwrite leaves the old folder there",
                where=str(self.replaced),
                advice=f"Remove it if {self.out} is complete, or rename it back.",
            )

    def put(self, folder: Path) -> bool:
        """Renames `folder` to it; returns whether there is an old one to remove now."""
        with disk_errors(self.out, f"{folder} is complete, but cannot be renamed to this"):
            replaces = self._overwrite and self.out.exists()
            if replaces:
                self.out.rename(self.replaced)
            try:
                folder.rename(self.out)
            except BaseException:
                if replaces:
                    self.replaced.rename(self.out)
                raise
            flush_directory(self.out.parent)
        return replaces

    def take_back(self) -> None:
        """Undoes the first of the two renames of `put`, after which that was killed."""
        with disk_errors(self.replaced, "cannot be renamed back"):
            if not os.path.lexists(self.out) and read_record(self.replaced):
                self.replaced.rename(self.out)

    def remove_replaced(self) -> None:
        """Removes of the old OUT what its conversion wrote, by name: others may have come since."""
        folder = self.replaced
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
            remove_files(folder, names - {RECORD_NAME})
            remove_files(folder, [RECORD_NAME])  # Last: until then, the folder says whose it is.
            folder.rmdir()


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes the files `names` of `folder`, and folders in it that are empty then."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        if "/" in name:
            with suppress(OSError):
                (folder / name).parent.rmdir()
