"""Copying ranges: in the kernel where it can, and the same bytes where it cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from xtuner2llava import CorruptFileError
from xtuner2llava.tensors import FileRange, SourceFile
from xtuner2llava.writing import copying

SIZES = [5_000_000, 0, 3, 300_000]
Copy = Callable[[int, int, int, int, int], int]


@pytest.fixture
def ranges(tmp_path: Path) -> list[FileRange]:
    found = []
    for number, size in enumerate(SIZES):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(b"??" + bytes((7 * i + number) % 251 for i in range(size)) + b"?")
        found.append(FileRange(SourceFile.of(path), 2, size))
    return [*found, found[2], FileRange(found[0].file, 1_000_000, 17)]


def copied(ranges: list[FileRange], path: Path) -> tuple[bytes, list[int]]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        steps = list(copying.copy_ranges(ranges, descriptor, 5))
        return os.pread(descriptor, 1 << 30, 5), steps
    finally:
        os.close(descriptor)


def expected(ranges: list[FileRange]) -> bytes:
    return b"".join(
        piece.file.path.read_bytes()[piece.offset : piece.offset + piece.length] for piece in ranges
    )


def refuse(number: int) -> Copy:
    def copy(source: int, target: int, count: int, start: int, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    return copy


def test_the_kernel_copies_and_nothing_passes_through_here(
    ranges: list[FileRange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("read or written in this process")

    monkeypatch.setattr(copying, "write_all", never)
    monkeypatch.setattr(copying, "read_into", never)
    data, steps = copied(ranges, tmp_path / "out")
    assert data == expected(ranges)
    assert sum(steps) == len(data)


@pytest.mark.parametrize("number", sorted(copying._CANNOT))
def test_where_the_kernel_cannot_the_bytes_are_the_same(
    number: int, ranges: list[FileRange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying.os, "copy_file_range", refuse(number))
    data, steps = copied(ranges, tmp_path / "out")
    assert data == expected(ranges)
    assert sum(steps) == len(data)


def test_a_system_without_it(
    ranges: list[FileRange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(copying.os, "copy_file_range")
    assert copied(ranges, tmp_path / "out")[0] == expected(ranges)


@pytest.mark.parametrize("most", [1000, 0])
def test_short_copies_go_on(
    most: int, ranges: list[FileRange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range

    def short(source: int, target: int, count: int, start: int, offset: int) -> int:
        return real(source, target, min(count, most), start, offset) if most else 0

    monkeypatch.setattr(copying.os, "copy_file_range", short)
    assert copied(ranges, tmp_path / "out")[0] == expected(ranges)


def test_other_errors_are_not_hidden(
    ranges: list[FileRange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying.os, "copy_file_range", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        copied(ranges, tmp_path / "out")


def test_a_source_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(b"x" * 100)
    with pytest.raises(CorruptFileError, match="truncated"):
        copied([FileRange(SourceFile.of(path), 50, 51)], tmp_path / "out")
