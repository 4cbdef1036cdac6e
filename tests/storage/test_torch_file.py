"""The zip that torch.save writes, damaged and forged in every way."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xtuner2llava.errors import CheckpointError, CorruptFileError, UnsupportedError
from xtuner2llava.storage import torch_file
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import tensor_references

DENSE = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int64)}


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save(DENSE, buffer)
    return buffer.getvalue()


def opened(path: Path, data: bytes) -> TorchFile:
    path.write_bytes(data)
    return TorchFile(path)


def tensors(file: TorchFile) -> dict[str, list[object]]:
    found = file.tensors(tensor_references(file.value, "here"))
    return {name: tensor.read(0, tensor.rows).tolist() for name, tensor in found.items()}


def rewritten(
    change: Callable[[list[tuple[str, bytes]]], object] = lambda entries: None,
    *,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The same entries in a zip that Python wrote, after `change`."""
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def directory_entry(data: bytes, name: bytes) -> int:
    """Where the directory's entry for the file whose name ends with `name` begins."""
    place = -1
    while True:
        place = data.index(b"PK\x01\x02", place + 1)
        (length,) = struct.unpack_from("<H", data, place + 28)
        if data[place + 46 : place + 46 + length].endswith(name):
            return place


def with_directory_field(data: bytes, name: bytes, offset: int, layout: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, directory_entry(data, name) + offset, value)
    return bytes(changed)


def local_header(data: bytes, name: bytes) -> int:
    return int(struct.unpack_from("<I", data, directory_entry(data, name) + 42)[0])


EXPECTED = {"a": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "b": [0, 1, 2, 3]}


def test_what_torch_wrote_is_read(tmp_path: Path) -> None:
    assert tensors(opened(tmp_path / "w.pth", saved())) == EXPECTED
    assert tensors(opened(tmp_path / "w.pth", rewritten())) == EXPECTED
    # Something before the zip, as in a self-extracting one.
    assert tensors(opened(tmp_path / "w.pth", b"#!" * 50 + saved())) == EXPECTED


def test_zip64_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved())) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target,
    ):
        for info in source.infolist():
            with target.open(info.filename, "w", force_zip64=True) as stream:
                stream.write(source.read(info))
    assert tensors(opened(tmp_path / "w.pth", buffer.getvalue())) == EXPECTED


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    first = opened(tmp_path / "first.pth", saved()).fingerprint.digest
    assert opened(tmp_path / "second.pth", saved()).fingerprint.digest == first
    assert len(first) == 64
    DENSE["a"][0, 0] = 9
    try:
        assert opened(tmp_path / "second.pth", saved()).fingerprint.digest != first
    finally:
        DENSE["a"][0, 0] = 0


def test_a_zip_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    data = saved()
    for length in [*range(0, 100), *range(100, len(data), 7), len(data) - 1]:
        with pytest.raises((CorruptFileError, UnsupportedError)) as caught:
            opened(tmp_path / "w.pth", data[:length])
        if length >= 4:
            assert "starts as a checkpoint of torch.save but its end is missing" in str(
                caught.value
            )
            assert "The file is truncated; copy or download it again." in str(caught.value)


@pytest.mark.parametrize(
    ("data", "text", "advice"),
    [
        (b"", "is empty", "Copy or download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a git-lfs pointer",
            "Run `git lfs pull`",
        ),
        (b"\n<!DOCTYPE html><html><title>403", "a web page", "Copy or download it again"),
        (b"<html lang='en'>", "a web page", "Copy or download it again"),
        (b'{"error":"not found"}', "not a checkpoint of torch.save", ""),
        (b'\x20\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32"', "a safetensors file", "folder"),
        (b"\x80\x02}q\x00.", "not a checkpoint of torch.save", ""),
    ],
)
def test_what_is_not_a_checkpoint_is_named(
    data: bytes, text: str, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "w.pth", data)
    (fault,) = caught.value.faults
    assert text in fault.what
    assert advice in fault.advice
    assert fault.where == str(tmp_path / "w.pth")


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(DENSE, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"the format that torch.save wrote before version"):
        TorchFile(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="No such file"):
        TorchFile(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TorchFile(tmp_path)


def test_zips_of_other_things(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    with pytest.raises(UnsupportedError, match=r"not one that torch.save wrote \(no data.pkl in"):
        opened(tmp_path / "w.pth", buffer.getvalue())
    with pytest.raises(UnsupportedError, match=r"\(2 data.pkl in it\)"):
        opened(tmp_path / "w.pth", rewritten(lambda e: e.append(("other/data.pkl", b"]."))))
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w"):
        pass
    with pytest.raises(UnsupportedError, match=r"no data.pkl in it"):
        opened(tmp_path / "w.pth", empty.getvalue())


def test_big_endian_is_refused(tmp_path: Path) -> None:
    def big(entries: list[tuple[str, bytes]]) -> None:
        (place,) = (i for i, (name, _) in enumerate(entries) if name.endswith("byteorder"))
        entries[place] = (entries[place][0], b"big")

    with pytest.raises(UnsupportedError, match="its byte order is 'big', expected 'little'"):
        opened(tmp_path / "w.pth", rewritten(big))


def test_before_torch_2_1_there_was_no_byteorder(tmp_path: Path) -> None:
    def without(entries: list[tuple[str, bytes]]) -> None:
        entries[:] = [(n, d) for n, d in entries if n.endswith("data.pkl") or "/data/" in n]

    assert tensors(opened(tmp_path / "w.pth", rewritten(without))) == EXPECTED


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="is compressed or encrypted"):
        opened(tmp_path / "w.pth", rewritten(compression=zipfile.ZIP_DEFLATED))


def test_an_entry_that_claims_to_be_encrypted_is_refused(tmp_path: Path) -> None:
    data = with_directory_field(saved(), b"data.pkl", 8, "<H", 1)
    with pytest.raises(CorruptFileError, match=r"data.pkl' is compressed or encrypted"):
        opened(tmp_path / "w.pth", data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    def twice(entries: list[tuple[str, bytes]]) -> None:
        entries.append(next(e for e in entries if e[0].endswith("data/0")))

    with pytest.raises(CorruptFileError, match=r"two entries 'archive/data/0'"):
        opened(tmp_path / "w.pth", rewritten(twice))


def test_a_pickle_that_does_not_match_its_checksum_is_refused(tmp_path: Path) -> None:
    data = bytearray(rewritten())
    place = data.index(b"\x80\x02}")
    data[place + 5] ^= 1
    with pytest.raises(CorruptFileError, match=r"its data.pkl does not match its checksum"):
        opened(tmp_path / "w.pth", bytes(data))


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    data = saved()
    other = local_header(data, b"data/0")
    moved = with_directory_field(data, b"data/1", 42, "<I", other + 10)
    with pytest.raises(CorruptFileError, match=r"entries '.*' and '.*' overlap"):
        opened(tmp_path / "w.pth", moved)
    grown = with_directory_field(data, b"data/0", 24, "<I", 100_000)
    grown = with_directory_field(grown, b"data/0", 20, "<I", 100_000)
    with pytest.raises(CorruptFileError, match=r"entries '.*data/0' and '.*' overlap"):
        opened(tmp_path / "w.pth", grown)


@pytest.mark.parametrize("beyond", [1 << 32, (1 << 64) - 1])
def test_an_entry_before_the_file_is_refused(beyond: int, tmp_path: Path) -> None:
    """zipfile moves all entries by what the directory is found before its stated place."""
    data = bytearray(saved())
    place = data.rindex(b"PK\x06\x06") + 48
    data[place : place + 8] = beyond.to_bytes(8, "little")
    with pytest.raises(CorruptFileError, match=r"entry '.*' begins before the file"):
        opened(tmp_path / "a.pth", bytes(data))


def test_an_entry_beyond_the_data_is_refused(tmp_path: Path) -> None:
    # The last entry, the only one that nothing follows.
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        last = max(archive.infolist(), key=lambda info: info.header_offset)
    data = with_directory_field(saved(), last.filename.encode(), 24, "<I", 1 << 20)
    data = with_directory_field(data, last.filename.encode(), 20, "<I", 1 << 20)
    with pytest.raises(CorruptFileError, match=f"entry '{last.filename}' ends beyond the data"):
        opened(tmp_path / "w.pth", data)


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [
        (0, "<I", 0),  # no signature
        (26, "<H", 5),  # another length of its name
        (28, "<H", 2000),  # a longer extra field: the data would be those of the next entry
        (30, "<B", ord("x")),  # another name
    ],
    ids=["signature", "name length", "extra length", "name"],
)
@pytest.mark.parametrize("entry", ["data/0", "data.pkl"])
def test_an_entry_that_is_not_where_the_directory_says(
    entry: str, offset: int, layout: str, value: int, tmp_path: Path
) -> None:
    data = bytearray(saved())
    struct.pack_into(layout, data, local_header(bytes(data), entry.encode()) + offset, value)
    with pytest.raises(CorruptFileError, match=f"{entry}' is not where the directory says"):
        tensors(opened(tmp_path / "w.pth", bytes(data)))


def test_data_that_would_reach_into_the_next_entry_is_refused(tmp_path: Path) -> None:
    # Still inside the file: only the next entry's place shows that the extra field is too long.
    data = bytearray(saved())
    header = local_header(bytes(data), b"data/0")
    (extra,) = struct.unpack_from("<H", data, header + 28)
    struct.pack_into("<H", data, header + 28, extra + 100)
    assert header + extra + 300 < len(data)
    with pytest.raises(CorruptFileError, match="data/0' is not where the directory says"):
        tensors(opened(tmp_path / "w.pth", bytes(data)))


def test_a_storage_that_is_missing_or_too_short_is_named_with_its_tensor(tmp_path: Path) -> None:
    def without(entries: list[tuple[str, bytes]]) -> None:
        entries[:] = [entry for entry in entries if not entry[0].endswith("data/1")]

    def short(entries: list[tuple[str, bytes]]) -> None:
        entries[:] = [(n, d[:-8] if "/data/" in n else d) for n, d in entries]

    with pytest.raises(CorruptFileError, match="has no entry 'data/1'"):
        tensors(opened(tmp_path / "w.pth", rewritten(without)))
    file = opened(tmp_path / "w.pth", rewritten(short))
    with pytest.raises(CorruptFileError) as caught:
        tensors(file)
    assert [str(fault) for fault in caught.value.faults] == [
        f"{tmp_path / 'w.pth'}, tensor a: its storage should have 24 bytes, the file has 16",
        f"{tmp_path / 'w.pth'}, tensor b: its storage should have 32 bytes, the file has 24",
    ]


def test_names_that_lead_elsewhere_are_only_names(tmp_path: Path) -> None:
    def renamed(entries: list[tuple[str, bytes]]) -> None:
        entries[:] = [("../../etc" + name.removeprefix("archive"), data) for name, data in entries]

    with pytest.raises(UnsupportedError, match=r"no data.pkl in it"):
        opened(tmp_path / "w.pth", rewritten(renamed))
    assert os.listdir(tmp_path) == ["w.pth"]  # noqa: PTH208


def test_a_directory_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    # A sparse file: nothing of it is on the disk, all of it would be in memory.
    path = tmp_path / "w.pth"
    size = 1 << 36
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, 0xFFFFFFFF, 0, 0)
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, size, 1)
    with path.open("wb") as stream:
        stream.write(b"PK\x03\x04")
        stream.seek(size)
        stream.write(wide + locator + end)
    with pytest.raises(CorruptFileError, match="its directory has 68,719,476,736 bytes"):
        TorchFile(path)


def test_a_directory_is_read_up_to_32_mib(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.touch()
    os.truncate(path, 33 << 20)
    with torch_file._DirectoryReader(path) as reader:
        assert len(reader.read(32 << 20)) == 32 << 20
        reader.seek(0)
        assert len(reader.read()) == 32 << 20
        with pytest.raises(zipfile.BadZipFile):
            reader.read((32 << 20) + 1)


def test_a_pickle_of_absurd_size_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_file, "_MAX_PICKLE_BYTES", 100)
    with pytest.raises(CorruptFileError, match="bytes, more than any checkpoint needs"):
        opened(tmp_path / "w.pth", saved())


def test_a_damaged_zip_is_an_error_message_or_the_same_tensors(tmp_path: Path) -> None:
    data = rewritten()
    path = tmp_path / "w.pth"
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0xFF if place % 2 else 1 << place // 2 % 8
        try:
            file = opened(path, bytes(changed))
            file.tensors(tensor_references(file.value, "here"))
        except CheckpointError as error:
            assert str(path) in error.faults[0].where
