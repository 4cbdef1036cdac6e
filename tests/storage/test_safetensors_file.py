"""Safetensors headers, literal and hostile."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from xtuner2llava.errors import CheckpointError, CorruptFileError, UnsupportedError
from xtuner2llava.storage.safetensors_file import SafetensorsFile


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> Any:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def opened(folder: Path, data: bytes) -> SafetensorsFile:
    path = folder / "w.safetensors"
    path.write_bytes(data)
    return SafetensorsFile(path)


def test_the_example_of_the_format(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "TEST": {"dtype": "F16", "shape": [1, 16, 2], "data_offsets": [0, 64]},
        "last": {"dtype": "I32", "shape": [], "data_offsets": [64, 68]},
        "none": {"dtype": "BF16", "shape": [3, 0], "data_offsets": [64, 64]},
    }
    file = opened(tmp_path, file_bytes(header, bytes(64) + b"\x05\0\0\0"))
    assert file.metadata == {"format": "pt"}
    assert {name: (str(t.dtype), t.shape) for name, t in file.tensors.items()} == {
        "TEST": ("float16", (1, 16, 2)),
        "last": ("int32", ()),
        "none": ("bfloat16", (3, 0)),
    }
    assert file.tensors["last"].read(0, 1).tolist() in (5, [5])
    assert file.tensors["none"].read(0, 3).shape == (3, 0)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    names = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int8 uint8 bool"
    dense = {n: torch.arange(16).view(2, 8).to(getattr(torch, n)) for n in names.split()}
    save_file(dense, tmp_path / "all.safetensors")
    file = SafetensorsFile(tmp_path / "all.safetensors")
    assert set(file.tensors) == set(dense)
    for name, tensor in file.tensors.items():
        got = tensor.read(0, 2)
        assert got.dtype == dense[name].dtype
        assert torch.equal(got.view(torch.uint8), dense[name].view(torch.uint8))


def test_checkpoints_of_one_training_have_different_digests(tmp_path: Path) -> None:
    size = 100_000
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()

    def digest(header: bytes, data: bytes, *, sampled: bool) -> str:
        return opened(tmp_path, file_bytes(header, data)).fingerprint(sampled=sampled).digest

    for sampled in (False, True):
        first = digest(header, bytes(size), sampled=sampled)
        assert digest(header, bytes(size), sampled=sampled) == first
        assert (digest(header, b"x" * size, sampled=sampled) != first) is sampled
        assert (digest(header, bytes(size - 1) + b"x", sampled=sampled) != first) is sampled
        assert digest(header.replace(b'"a"', b'"b"'), bytes(size), sampled=sampled) != first


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "tensor b at byte 2 overlaps the tensor before"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "tensor b at byte 0 overlaps the tensor before"),
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "tensor b at byte 5 follows a hole"),
        ({"a": entry(1, 4)}, 4, "tensor a at byte 1 follows a hole"),
        ({"a": entry(0, 4)}, 5, "its header describes"),
        ({}, 1, "its header describes"),
        ({"a": entry(0, 4)}, 3, "tensor a: ends at byte"),
        ({"a": entry(0, 10**11)}, 4, "tensor a: ends at byte 100,000,000,0"),
        ({"a": entry(0, 4, shape=[10**30])}, 4, "4 bytes given, shape"),
        ({"a": entry(0, 4, shape=[2**32, 2**32])}, 4, "4 bytes given, shape"),
        ({"a": entry(0, 4, shape=[-4])}, 4, r"shape \[-4\] makes no sense"),
        ({"a": entry(0, 4, shape=[-2, -2])}, 4, "makes no sense"),
        ({"a": {**entry(0, 4), "shape": [4.0]}}, 4, r"shape \[4.0\] makes no sense"),
        ({"a": {**entry(0, 1), "shape": [True]}}, 1, r"shape \[True\] makes no sense"),
        ({"a": {**entry(0, 4), "shape": "4"}}, 4, "shape '4' makes no sense"),
        ({"a": entry(0, 1, shape=[1] * 17)}, 1, "makes no sense"),
        ({"a": entry(4, 0, shape=[4])}, 4, r"data_offsets \[4, 0\] make no sense"),
        ({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, 4, "make no sense"),
        ({"a": {**entry(0, 4), "data_offsets": [0.0, 4.0]}}, 4, "make no sense"),
        ({"a": {**entry(0, 4), "data_offsets": None}}, 4, "make no sense"),
        ({"a": entry(0, 4, "F32", [2])}, 4, "shape .* of float32 has 8"),
        ({"a": entry(0, 4, "Q4_0")}, 4, "dtype 'Q4_0' is unknown"),
        ({"a": {**entry(0, 4), "dtype": 7}}, 4, "dtype 7 is unknown"),
        ({"a": {"shape": [4], "data_offsets": [0, 4]}}, 4, "dtype None is unknown"),
        ({"a": [0, 4]}, 4, "its header entry is not an object"),
        ([], 0, "is not a JSON object"),
        (b'{"a":{"dtype":"U8"},"a":{}}', 0, "the key 'a' is there twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8"}}', 0, "the key 'dtype' is there twice"),
        (b'{"a": }    ', 0, "is not JSON: Expecting value"),
        (b"\xff\xfe{}        ", 0, "is not UTF-8"),
        (b'{"a":' * 50_000, 0, "is not usable JSON"),
        (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", 0, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "is not usable JSON"),
    ],
)
def test_headers_that_lie_are_refused(header: object, data: int, text: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=text) as caught:
        opened(tmp_path, file_bytes(header, bytes(data)))
    assert all("w.safetensors" in fault.where for fault in caught.value.faults)


def test_all_faults_of_a_header_at_once(tmp_path: Path) -> None:
    header = {"a": entry(0, 4, "X"), "b": entry(0, 4), "c": entry(0, 4, shape=[5])}
    with pytest.raises(CorruptFileError) as caught:
        opened(tmp_path, file_bytes(header, bytes(4)))
    assert [fault.where.split(", ")[1] for fault in caught.value.faults] == ["tensor a", "tensor c"]


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b"", CorruptFileError, "has only 0 bytes"),
        (b"\x02\0\0\0\0\0\0\0{", CorruptFileError, "has only 9 bytes"),
        (b"\xff" * 8 + b"{}", CorruptFileError, "its header claims 18,446,744,073,709,551,615"),
        (struct.pack("<Q", 100 << 30) + b"{}", CorruptFileError, "claims 107,374,182,400 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", UnsupportedError, "a git-lfs pointer"),
        (b"PK\x03\x04 a checkpoint of torch", CorruptFileError, "not a safetensors file"),
    ],
)
def test_what_is_not_a_safetensors_file(
    data: bytes, kind: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text):
        opened(tmp_path, data)


def test_a_header_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    # Within the file, which is sparse, and more than anybody needs.
    path = tmp_path / "w.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 30))
        stream.truncate(1 << 34)
    with pytest.raises(CorruptFileError, match="its header claims 1,073,741,824 bytes"):
        SafetensorsFile(path)


def test_more_tensors_than_memory_is_worth_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (31_999_999, 32_000_001):
        path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * (length - 2))
        if length < 32_000_000:
            assert SafetensorsFile(path).tensors == {}
            continue
        with pytest.raises(CorruptFileError, match="32,000,001 bytes, expected at most 32,000,000"):
            SafetensorsFile(path)


def test_a_file_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    data = save({"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bool)})
    for length in range(len(data)):
        with pytest.raises(CorruptFileError):
            opened(tmp_path, data[:length])


def test_a_damaged_file_is_an_error_message_or_tensors(tmp_path: Path) -> None:
    data = save({"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bool)})
    for place in range(len(data)):
        for value in (0, 0xFF, data[place] ^ 4, data[place] ^ 1):
            changed = bytearray(data)
            changed[place] = value
            try:
                file = opened(tmp_path, bytes(changed))
            except CheckpointError as error:
                assert "w.safetensors" in error.faults[0].where
            else:
                assert sum(tensor.nbytes for tensor in file.tensors.values()) == 26


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["U8", "F32"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=12,
)


@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON))
def test_any_json_is_an_error_message_or_tensors(
    header: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        opened(folder, file_bytes(header, bytes(8)))
    except CheckpointError as error:
        assert "w.safetensors" in error.faults[0].where
