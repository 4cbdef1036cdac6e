"""Pickles of torch.save, read as data: what they describe is what torch.load would build."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xtuner2llava.errors import CorruptFileError, UnsafeFileError
from xtuner2llava.storage.pickle_reader import (
    GlobalName,
    Record,
    TensorReference,
    Value,
    read_pickle,
)
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import tensor_references

DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
).split()

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**500), 2**500)
    | st.floats(allow_nan=False)
    | st.text()
)


def plain(atoms: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        atoms,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(inner, inner)
            | st.tuples(inner)
            | st.dictionaries(st.text() | st.integers(-(2**62), 2**62), inner, max_size=4)
        ),
        max_leaves=20,
    )


@given(value=plain(ATOMS), protocol=st.sampled_from((2, 3, 4, 5)))
def test_plain_data_is_what_was_pickled(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), "here") == value


@given(value=plain(ATOMS | st.binary()), protocol=st.sampled_from((3, 4, 5)))
def test_bytes_are_plain_data_from_protocol_3_on(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), "here") == value


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_oldest_protocols_are_read_too(protocol: int) -> None:
    value = {"a": [1, 2.5, True, None, "ü"], "b": (1, 2, 3, 4), "c": -5, "d": 1 << 40, "e": ()}
    assert read_pickle(pickle.dumps(value, protocol), "here") == value


def test_integers_are_read_up_to_512_bits() -> None:
    longest = (1 << 512) - 1
    assert read_pickle(pickle.dumps([longest, -longest], 2), "here") == [longest, -longest]
    with pytest.raises(CorruptFileError, match="an integer of absurd length"):
        read_pickle(pickle.dumps(longest + 1, 2), "here")


@pytest.mark.parametrize("before", [b"", b"NN"])
def test_a_fault_says_at_which_byte(before: bytes) -> None:
    with pytest.raises(CorruptFileError, match=f"pickle byte {len(before)}: "):
        read_pickle(before + b"\x8a\x41" + b"\x7f" * 65 + b".", "here")


def test_shared_objects_are_shared() -> None:
    inner = [1]
    value = read_pickle(pickle.dumps([inner, inner, {"again": inner}]), "here")
    assert isinstance(value, list)
    assert value[0] is value[1]
    assert value == [[1], [1], {"again": [1]}]


def test_known_containers_become_plain_ones() -> None:
    value = OrderedDict([("a", 1), ("b", OrderedDict(c=2))])
    assert read_pickle(pickle.dumps(value, 2), "here") == {"a": 1, "b": {"c": 2}}
    assert read_pickle(pickle.dumps([{1, 2}, torch.Size([3, 4])], 2), "here") == [[1, 2], (3, 4)]


def test_other_known_classes_become_records() -> None:
    made = defaultdict(list, {"a": 1})
    record = read_pickle(pickle.dumps(made, 2), "here")
    assert isinstance(record, Record)
    assert (record.name, record.arguments) == (
        "collections.defaultdict", (GlobalName("builtins.list"),)
    )  # fmt: skip
    scalar = read_pickle(pickle.dumps(np.float64(1.5), 2), "here")
    assert isinstance(scalar, Record)
    assert scalar.name in ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")


def saved(path: Path, value: object, protocol: int = 2) -> TorchFile:
    torch.save(value, path, pickle_protocol=protocol)
    return TorchFile(path)


def read(file: TorchFile, value: Value) -> dict[str, torch.Tensor]:
    tensors = file.tensors(tensor_references(value, "here"))
    return {name: t.read(0, t.rows).reshape(t.shape) for name, t in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        # As bytes, of which NaNs are as good as numbers.
        got, wanted = (t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(got, wanted), name


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = {"none": torch.zeros(0), "no columns": torch.zeros(3, 0), "one": torch.ones(1)}
    file = saved(tmp_path / "empty.pth", tensors)
    assert_same(read(file, file.value), tensors)


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_dtype(protocol: int, tmp_path: Path) -> None:
    content = torch.arange(48, dtype=torch.uint8)
    tensors = {
        name: (content % 2 if name == "bool" else content)
        .clone()
        .view(getattr(torch, name))
        .view(2, -1)
        for name in DTYPES
    }
    file = saved(tmp_path / "all.pth", tensors, protocol)
    assert_same(read(file, file.value), torch.load(tmp_path / "all.pth", weights_only=False))


@pytest.mark.parametrize("protocol", [2, 4])
def test_views_of_shared_storages(protocol: int, tmp_path: Path) -> None:
    base = torch.arange(60.0)
    matrix = base.view(5, 12)
    tensors = {
        "whole": base,
        "rows": matrix[1:3],
        "columns": matrix[:, 3:5],
        "transposed": matrix.T,
        "every_second": base[1::2],
        "expanded": base[7].expand(3, 2),
        "scalar": base[9],
        "empty": base[:0],
        "empty_matrix": matrix[:, :0],
        "parameter": torch.nn.Parameter(matrix[4:]),
        "buffer": torch.nn.Buffer(base[50:]) if hasattr(torch.nn, "Buffer") else base[50:],
        "frozen": torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
    }
    file = saved(tmp_path / "views.pth", tensors, protocol)
    found = read(file, file.value)
    assert_same(found, {n: t.detach() for n, t in tensors.items()})
    with zipfile.ZipFile(tmp_path / "views.pth") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 2  # one storage, and one
    stored = file.tensors(tensor_references(file.value, "here"))
    whole, rows = (stored[name].ranges() or () for name in ("whole", "rows"))
    assert rows[0].offset == whole[0].offset + 12 * 4


def test_state_dicts_of_modules_carry_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    file = saved(tmp_path / "module.pth", module.state_dict())
    assert_same(read(file, file.value), dict(module.state_dict()))


def test_what_else_stands_beside_tensors(tmp_path: Path) -> None:
    value = {"meta": {"iter": 5, "cfg": "x = 1"}, "list": [torch.ones(1), "a"], "n": np.arange(3)}
    file = saved(tmp_path / "mixed.pth", value)
    assert isinstance(file.value, dict)
    assert file.value["meta"] == {"iter": 5, "cfg": "x = 1"}
    assert isinstance(file.value["n"], Record)
    assert isinstance(file.value["list"], list)
    assert isinstance(file.value["list"][0], TensorReference)


@pytest.mark.parametrize(
    "case",
    [
        "qwen2_b_full_frozenvis/iter_2.pth",
        "llama_d_lora_vislora/iter_2.pth",
        "llama_d_lora_vislora/iter_2_xtuner_bin/llm_adapter/adapter_model.bin",
        "bases/vision_clip_full/pytorch_model.bin",
    ],
)
def test_real_files_have_the_tensors_that_torch_finds(checkpoints: Path, case: str) -> None:
    # torch's own reader of pickles, told to take the foreign classes for placeholders.
    class Placeholder:
        def __init__(self, *arguments: object) -> None:
            self.arguments = arguments

    class Placeholders(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith(("torch", "collections", "_codecs", "numpy")):
                return super().find_class(module, name)
            return Placeholder

    module = type("module", (), {"Unpickler": Placeholders, "load": pickle.load})
    value = torch.load(checkpoints / case, pickle_module=module, weights_only=False)
    expected = value.get("state_dict", value)
    file = TorchFile(checkpoints / case)
    assert isinstance(file.value, dict)
    found = read(file, file.value.get("state_dict", file.value))
    assert len(found) > 20
    assert_same(found, dict(expected))


def test_a_tensor_whose_bits_mean_something_else_is_refused(tmp_path: Path) -> None:
    conjugated = torch.tensor([1 + 2j]).conj()
    with pytest.raises(UnsafeFileError, match=r"torch\.ComplexFloatStorage"):
        saved(tmp_path / "conjugated.pth", {"w": conjugated})
    negative = torch.tensor([1 + 2j]).conj().imag
    with pytest.raises(CorruptFileError, match="a tensor with a conjugate or negative bit"):
        saved(tmp_path / "negative.pth", {"w": negative})
