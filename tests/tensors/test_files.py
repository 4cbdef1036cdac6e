"""Files that are not what they were when their header was read."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.tensors.dtype import FLOAT32
from xtuner2llava.tensors.files import (
    FileRange,
    SourceFile,
    ZipMember,
    cut,
    join,
    read_into,
    read_ranges,
    require_member,
)
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.stored import Stored, view_of_storage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(64)))
    return path


def stored(path: Path) -> LazyTensor:
    return Stored("w", FLOAT32, (4, 4), (FileRange(SourceFile.of(path), 0, 64),))


def strided(path: Path) -> LazyTensor:
    storage = FileRange(SourceFile.of(path), 0, 64)
    return view_of_storage("w", FLOAT32, (4, 4), storage, (1, 4), 0)


def shrink(path: Path) -> None:
    os.truncate(path, 10)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(64))
    path.with_name("new").replace(path)
    touch(path)


@pytest.mark.parametrize("change", [shrink, grow, touch, replace])
@pytest.mark.parametrize("make", [stored, strided])
def test_a_file_that_changed_is_refused(
    path: Path, make: Callable[[Path], LazyTensor], change: Callable[[Path], None]
) -> None:
    tensor = make(path)
    assert tensor.read(0, 4).shape == (4, 4)
    change(path)
    with pytest.raises(CorruptFileError, match="the file changed while it was read") as caught:
        tensor.read(0, 4)
    assert caught.value.faults[0].where == str(path)


@pytest.mark.parametrize("make", [stored, strided])
def test_a_file_that_is_gone_is_refused(path: Path, make: Callable[[Path], LazyTensor]) -> None:
    tensor = make(path)
    path.unlink()
    with pytest.raises(CorruptFileError, match="cannot be opened \\(No such file"):
        tensor.read(0, 4)


def test_a_file_that_is_not_there_has_no_state(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="cannot be read \\(No such file"):
        SourceFile.of(tmp_path / "none")


def test_a_file_cut_short_under_the_reader_is_told_from_a_whole_one(path: Path) -> None:
    piece = FileRange(SourceFile.of(path), 60, 8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(CorruptFileError, match="ends at byte 64, expected data up to byte 68"):
            read_into(descriptor, piece, memoryview(bytearray(8)))
    finally:
        os.close(descriptor)


def test_a_place_that_cannot_be_read_is_an_error_message(path: Path) -> None:
    piece = FileRange(SourceFile.of(path), -5, 4)
    with pytest.raises(CorruptFileError, match="reading failed at byte -5"):
        read_ranges([piece])


def test_ranges_are_cut_and_joined(path: Path, tmp_path: Path) -> None:
    file = SourceFile.of(path)
    other_path = tmp_path / "other.bin"
    other_path.write_bytes(b"abcdef")
    other = SourceFile.of(other_path)
    ranges = [FileRange(file, 10, 4), FileRange(other, 0, 6), FileRange(file, 0, 3)]
    assert bytes(read_ranges(ranges)) == b"\x0a\x0b\x0c\x0dabcdef\x00\x01\x02"
    assert cut(ranges, 3, 5) == (FileRange(file, 13, 1), FileRange(other, 0, 4))
    assert cut(ranges, 4, 6) == (FileRange(other, 0, 6),)
    assert cut(ranges, 13, 1) == ()
    neighbours = [FileRange(file, 0, 3), FileRange(file, 3, 0), FileRange(file, 3, 2)]
    assert join(neighbours) == (FileRange(file, 0, 5),)
    assert join([FileRange(file, 0, 3), FileRange(other, 3, 2)]) == (
        FileRange(file, 0, 3),
        FileRange(other, 3, 2),
    )


def test_bytes_that_are_no_tensor_of_that_shape_are_refused(path: Path) -> None:
    piece = FileRange(SourceFile.of(path), 0, 60)
    with pytest.raises(ValueError, match=r"w: 60 bytes given, \(4, 4\) of float32 has 64"):
        Stored("w", FLOAT32, (4, 4), (piece,))


def test_a_scalar_has_one_row(path: Path) -> None:
    scalar = Stored("step", FLOAT32, (), (FileRange(SourceFile.of(path), 4, 4),))
    assert (scalar.rows, scalar.row_shape, scalar.nbytes) == (1, (), 4)
    expected = torch.frombuffer(bytearray([4, 5, 6, 7]), dtype=torch.float32)
    assert torch.equal(scalar.read(0, 1), expected)
    assert scalar.flat().shape == (1,)


def test_an_entry_of_a_zip_must_have_its_sum(tmp_path: Path) -> None:
    """In the last byte too, of more bytes than are read at once."""
    path, data = tmp_path / "iter_2.pth", bytearray(range(256)) * 5000
    member = ZipMember("archive/data/0", 3, len(data), zlib.crc32(data))
    path.write_bytes(b"???" + data)
    require_member(SourceFile.of(path), member)
    data[-1] ^= 1
    path.write_bytes(b"???" + data)
    with pytest.raises(CorruptFileError, match=r"entry 'archive/data/0' is damaged.*; it is w\.\n"):
        require_member(SourceFile.of(path), member, lambda: "; it is w.")
