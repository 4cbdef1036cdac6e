"""Folders of weights: which file is taken, shards that fit together, and links that lead out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xtuner2llava.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedError
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.json_file import read_json
from xtuner2llava.storage.weights import find_weights, inside, open_weights, unread_weights

A, B, C = torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([[4.0]])


def values(path: Path) -> dict[str, Any]:
    tensors = open_weights(path).tensors
    return {name: tensor.read(0, tensor.rows).tolist() for name, tensor in tensors.items()}


def sharded(folder: Path, weight_map: object = None) -> Path:
    """Two shards and their index, which says `weight_map`."""
    folder.mkdir(exist_ok=True)
    save_file({"a": A, "b": B}, folder / "model-1.safetensors")
    save_file({"c": C}, folder / "model-2.safetensors")
    usual = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": usual if weight_map is None else weight_map}))
    return index


def test_the_file_that_from_pretrained_would_take(tmp_path: Path) -> None:
    names = [
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "model.safetensors",
    ]
    assert find_weights(tmp_path) is None
    (tmp_path / "adapter_model.bin").touch()
    assert find_weights(tmp_path) is None
    for name in names:
        (tmp_path / name).touch()
        assert find_weights(tmp_path) == tmp_path / name
    stems = ("adapter_model", "adapter_model")
    assert find_weights(tmp_path, stems) == tmp_path / "adapter_model.bin"


def test_shards_make_one_model(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert values(index) == {"a": [1.0], "b": [2.0, 3.0], "c": [[4.0]]}
    files = open_weights(index).files
    assert [(f.name, f.size) for f in files] == [
        (name, (tmp_path / name).stat().st_size)
        for name in ("model-1.safetensors", "model-2.safetensors")
    ]


def test_shards_of_torch(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": B, "c": C}, tmp_path / "pytorch_model-2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    first, second = "pytorch_model-1.bin", "pytorch_model-2.bin"
    index.write_text(json.dumps({"weight_map": {"a": first, "b": second, "c": second}}))
    assert values(index) == {"a": [1.0], "b": [2.0, 3.0], "c": [[4.0]]}


def test_real_shards(checkpoints: Path) -> None:
    folder = checkpoints / "qwen2_b_full_frozenvis"
    shards = open_weights(folder / "iter_2_xtuner_bin" / "pytorch_model.bin.index.json")
    whole = open_weights(folder / "iter_2_xtuner" / "model.safetensors")
    assert set(shards.tensors) == set(whole.tensors)
    assert len(shards.files) == 3
    for name, tensor in whole.tensors.items():
        other = shards.tensors[name]
        assert torch.equal(tensor.read(0, tensor.rows), other.read(0, other.rows)), name


ONE, TWO = "model-1.safetensors", "model-2.safetensors"


def test_an_index_is_not_a_shard_of_itself(tmp_path: Path) -> None:
    index = sharded(tmp_path / "model", {"a": "model.safetensors.index.json"})
    with pytest.raises(UnsupportedError, match=r"index\.json: not a checkpoint of torch\.save"):
        open_weights(index)


@pytest.mark.parametrize(
    ("weight_map", "texts"),
    [
        (
            {"a": ONE, "b": ONE, "c": "model-3.safetensors"},
            ["names the shard 'model-3.safetensors', which is not there"],
        ),
        ({"a": ONE, "b": ONE}, []),
        ({"a": ONE, "b": TWO, "c": TWO}, ["0 missing [], 1 too many ['b']", "1 missing ['b'], 0"]),
        ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, ["1 missing ['d'], 0 too many []"]),
        ({"a": ONE, "c": TWO}, ["0 missing [], 1 too many ['b']"]),
        (
            {"a": "../x.safetensors", "b": ONE},
            ["names '../x.safetensors', which is not a plain", "too many ['a']"],
        ),
        ({"a": "/etc/passwd"}, ["names '/etc/passwd', which is not a plain file name"]),
        ({"a": "."}, ["names '.', which is not a plain file name"]),
        ({"a": ".."}, ["names '..', which is not a plain file name"]),
        ({"a": ""}, ["names '', which is not a plain file name"]),
        ({"a": "sub/x.safetensors"}, ["which is not a plain file name"]),
        ({"a": "x\0.safetensors"}, ["which is not a plain file name"]),
        ({"a": 5}, ["has no 'weight_map' of names to files"]),
        (["a"], ["has no 'weight_map' of names to files"]),
    ],
)
def test_an_index_that_does_not_fit_its_shards(
    weight_map: object, texts: list[str], tmp_path: Path
) -> None:
    index = sharded(tmp_path / "model", weight_map)
    if not texts:
        assert set(values(index)) == {"a", "b"}
        return
    with pytest.raises(CorruptFileError) as caught:
        open_weights(index)
    faults = [str(fault) for fault in caught.value.faults]
    assert len(faults) == len(texts)
    for fault, text in zip(faults, texts, strict=True):
        assert text in fault


def test_a_shard_that_is_an_attack_is_refused_as_one(tmp_path: Path) -> None:
    import os

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    torch.save({"a": Attack()}, tmp_path / "x.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    with pytest.raises(UnsafeFileError, match=r"system"):
        open_weights(index)


def test_a_bin_that_is_not_a_state_dict(tmp_path: Path) -> None:
    torch.save([A], tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="holds a list, expected a state dict of tensors"):
        open_weights(tmp_path / "pytorch_model.bin")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "model.safetensors"
    path.parent.mkdir()
    save_file({"a": A}, path)
    return path


def test_a_link_that_leads_out_is_refused(outside: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CorruptFileError, match="is a link that leads out of its folder") as caught:
        open_weights(folder / "model.safetensors")
    assert "Give the folder that really holds the files" in caught.value.faults[0].advice
    sharded(folder, {"a": "model.safetensors"})
    with pytest.raises(CorruptFileError, match="is a link that leads out of its folder"):
        open_weights(folder / "model.safetensors.index.json")


def test_links_within_a_folder_or_to_it_are_fine(outside: Path, tmp_path: Path) -> None:
    (outside.parent / "other.safetensors").symlink_to("model.safetensors")
    assert values(outside.parent / "other.safetensors") == {"a": [1.0]}
    (tmp_path / "link").symlink_to(outside.parent)
    assert values(tmp_path / "link" / "model.safetensors") == {"a": [1.0]}


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"link to nowhere|cannot be read"):
        open_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("folder", ["", "projector", "a/b"])
def test_the_cache_of_the_hub_is_links_to_blobs(folder: str, outside: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    blob = repository / "blobs" / "0123abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(outside.read_bytes())
    home = repository / "snapshots" / "f00" / folder
    home.mkdir(parents=True)
    (home / "model.safetensors").symlink_to(blob)
    assert values(home / "model.safetensors") == {"a": [1.0]}
    # Blobs of another repository, or what lies beside them, are not.
    other = tmp_path / "hub" / "models--org--other" / "blobs" / "0123abc"
    other.parent.mkdir(parents=True)
    other.write_bytes(outside.read_bytes())
    for target in (other, outside):
        (home / "bad.safetensors").unlink(missing_ok=True)
        (home / "bad.safetensors").symlink_to(target)
        with pytest.raises(CorruptFileError, match="is a link that leads out of its folder"):
            open_weights(home / "bad.safetensors")


def test_a_folder_called_blobs_is_nothing_special_elsewhere(outside: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "0123abc"
    blob.parent.mkdir()
    blob.write_bytes(outside.read_bytes())
    home = tmp_path / "models" / "f00"
    home.mkdir(parents=True)
    (home / "model.safetensors").symlink_to(blob)
    with pytest.raises(CorruptFileError, match="is a link that leads out of its folder"):
        open_weights(home / "model.safetensors")


def test_plain_names_stay_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"
    assert inside(tmp_path, "..model") == tmp_path / "..model"


def test_json_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(CorruptFileError, match="has more than 67,108,864 bytes"):
        read_json(path)
    with pytest.raises(CorruptFileError, match="cannot be read \\(No such file"):
        read_json(tmp_path / "none.json")
    path.write_text('{"a": 1,\n"b": }')
    with pytest.raises(CorruptFileError, match=r"config\.json:2: is not JSON: Expecting value"):
        read_json(path)


def test_an_index_of_absurdly_many_shards_is_refused(tmp_path: Path) -> None:
    """Before any is looked for."""
    index = tmp_path / "model.safetensors.index.json"
    names = {f"{number}": f"{number}.safetensors" for number in range(10_001)}
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CorruptFileError, match="names 10,001 shards, expected at most 10,000") as e:
        open_weights(index)
    assert len(e.value.faults) == 1


def test_weights_beside_those_that_are_read_are_named(tmp_path: Path) -> None:
    for name in ("model.safetensors", "b.bin", "a.gguf", "c.bin.index.json", "optimizer.pt",
                 "rng_state_0.pth", "config.json", "notes.txt"):  # fmt: skip
        (tmp_path / name).touch()
    read = tmp_path / "model.safetensors"
    assert unread_weights(tmp_path, read, ()) == ["a.gguf", "b.bin", "c.bin.index.json"]
    files = (Fingerprint("b.bin", 0, ""),)
    assert unread_weights(tmp_path, None, files) == [
        "a.gguf", "c.bin.index.json", "model.safetensors"
    ]  # fmt: skip
