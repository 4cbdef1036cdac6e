"""What is planned and written is byte for byte what safetensors writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from storing import stored
from xtuner2llava.errors import PlanError
from xtuner2llava.tensors.computed import Fill, cast
from xtuner2llava.tensors.dtype import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, DType
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.rows import split
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import INDEX_NAME, ShardPlan, plan_shards
from xtuner2llava.writing.writer import Written, write_shards

ODD_NAMES = [
    "z",
    "a",
    "Ä.weight",
    "\U0001f600",
    "\uffee",
    'quo"te\\',
    "tab\tnew\n\x01\x7f",
    "a b",
    "",
]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


def write(out: Path, plan: ShardPlan, jobs: int = 2) -> Written:
    with OutputFolder(out, plan.fingerprint("test")) as folder:
        written = write_shards(folder, plan.shards, jobs=jobs)
        if plan.index is not None:
            folder.write_bytes(INDEX_NAME, plan.index)
        folder.publish()
    return written


def identical(tensors: dict[str, torch.Tensor], sources: Path, tmp_path: Path) -> bytes:
    """Writes `tensors` with us and with safetensors, compares, and returns the bytes."""
    plan = plan_shards({name: stored(sources, name, tensor) for name, tensor in tensors.items()})
    written = write(tmp_path / "out", plan)
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    (shard,) = written.shards
    assert (shard.size, shard.blake3) == (len(expected), blake3(expected).hexdigest())
    return expected


def test_the_bytes_of_a_small_file(sources: Path, tmp_path: Path) -> None:
    tensor = stored(sources, "w", torch.tensor([1, 2], dtype=torch.int16))
    write(tmp_path / "out", plan_shards({"w": tensor}))
    header = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}   '
    )
    assert len(header) == 88
    expected = b"\x58\0\0\0\0\0\0\0" + header + b"\1\0\2\0"
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected


def safetensors_knows(dtype: torch.dtype) -> bool:
    """Old versions lack the unsigned and complex ones."""
    try:
        return bool(save({"x": torch.zeros(1).to(dtype)}))
    except (KeyError, ValueError):
        return False


def test_every_dtype_in_the_order_of_safetensors(sources: Path, tmp_path: Path) -> None:
    dtypes = [dtype.torch for dtype in BY_NAME.values() if safetensors_knows(dtype.torch)]
    assert len(dtypes) >= 12
    tensors = {f"{place}.{dtype}": torch.arange(3).to(dtype) for dtype in dtypes for place in "ba"}
    identical(tensors, sources, tmp_path)


def test_names_that_must_be_escaped_or_sorted_by_their_bytes(sources: Path, tmp_path: Path) -> None:
    tensors = {name: torch.tensor([i]) for i, name in enumerate(ODD_NAMES)}
    identical(tensors, sources, tmp_path)


def test_scalars_and_empty_tensors(sources: Path, tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0),
        "no columns": torch.zeros(3, 0),
        "no rows": torch.zeros(0, 3, dtype=torch.float16),
        "some": torch.arange(6.0).reshape(1, 2, 3),
    }
    identical(tensors, sources, tmp_path)


def test_tensors_larger_than_any_block(sources: Path, tmp_path: Path) -> None:
    big = torch.arange(300_001, dtype=torch.int32)
    expected = identical({"big": big, "small": torch.ones(3)}, sources, tmp_path)
    assert len(expected) > 4 * 256 * 1024


@pytest.mark.parametrize("target", [FLOAT16, BFLOAT16], ids=str)
def test_casts_round_as_torch_does(target: DType, sources: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 2),
        "several blocks": torch.randn(3, 1_000_001),
        "ties": torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 1e-8, -0.0]),
    }
    plan = plan_shards({n: cast(stored(sources, n, t), target) for n, t in tensors.items()})
    write(tmp_path / "out", plan)
    expected = tmp_path / "expected.safetensors"
    save_file(
        {name: tensor.to(target.torch) for name, tensor in tensors.items()},
        expected,
        metadata={"format": "pt"},
    )
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected.read_bytes()


def test_many_shards_load_and_do_not_depend_on_jobs(sources: Path, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.arange(i, i + 100.0).reshape(10, 10) for i in range(7)}
    lazy: dict[str, LazyTensor] = {
        name: stored(sources, name, tensor) for name, tensor in tensors.items()
    }
    fused = stored(sources, "qkv", torch.arange(60.0).reshape(6, 10))
    lazy["q"], lazy["k"] = split(fused, [4, 2])
    lazy["cast"] = cast(stored(sources, "cast", torch.arange(50.0)), FLOAT16)
    lazy["fill"] = Fill(FLOAT32, (3, 2), 7.0)
    plan = plan_shards(lazy, max_shard_size=900)
    contents = []
    for jobs in (1, 2, 8):
        out = tmp_path / f"out{jobs}"
        write(out, plan, jobs)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] == contents[2]

    index = json.loads(contents[0].pop(INDEX_NAME))
    assert sorted(contents[0]) == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(set(index["weight_map"].values())) == sorted(contents[0])
    loaded: dict[str, torch.Tensor] = {}
    for filename in contents[0]:
        part = load_file(tmp_path / "out1" / filename)
        assert {name for name, file in index["weight_map"].items() if file == filename} == set(part)
        loaded.update(part)
        with safe_open(tmp_path / "out1" / filename, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    expected = {
        **tensors,
        "q": torch.arange(40.0).reshape(4, 10),
        "k": torch.arange(40.0, 60.0).reshape(2, 10),
        "cast": torch.arange(50.0, dtype=torch.float16),
        "fill": torch.full((3, 2), 7.0),
    }
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert index["metadata"] == {"total_size": 7 * 400 + 240 + 100 + 24}


def test_the_bytes_of_an_index() -> None:
    plan = plan_shards({"b": Fill(FLOAT32, (1,), 0), "a\u00e9": Fill(FLOAT16, (1,), 0)}, 4)
    assert plan.index == (
        b'{\n  "metadata": {\n    "total_size": 6\n  },\n  "weight_map": {\n'
        b'    "a\\u00e9": "model-00002-of-00002.safetensors",\n'
        b'    "b": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )


def test_shards_follow_the_order_given_and_a_large_tensor_has_its_own() -> None:
    sizes = {"a": 2, "b": 9, "c": 2, "d": 1, "e": 1}
    plan = plan_shards({name: Fill(FLOAT32, (n,), 0) for name, n in sizes.items()}, 20)
    names = [sorted(entry.name for entry in shard.entries) for shard in plan.shards]
    assert names == [["b"], ["a", "c", "d"], ["e"]]
    assert plan.total_size == 60


def test_transformers_finds_the_shards_by_the_index(sources: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    state = LlamaForCausalLM(config).state_dict()
    plan = plan_shards({name: stored(sources, name, t) for name, t in state.items()}, 500)
    assert len(plan.shards) > 2
    write(tmp_path / "out", plan)
    config.save_pretrained(tmp_path / "out")
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_names_that_safetensors_cannot_hold_are_all_listed() -> None:
    tensor = Fill(FLOAT32, (1,), 0)
    with pytest.raises(PlanError, match="2 faults") as caught:
        plan_shards({"__metadata__": tensor, "fine": tensor, "half \ud800": tensor})
    assert [fault.where for fault in caught.value.faults] == ["__metadata__", "'half \\ud800'"]


def test_no_tensor_at_all_is_refused() -> None:
    with pytest.raises(PlanError, match="not a single tensor"):
        plan_shards({})


def test_the_fingerprint_tells_plans_apart() -> None:
    def fingerprint(dtype: DType, provenance: str, size: int) -> str:
        tensors = {name: Fill(dtype, (2,), 0) for name in "ab"}
        return plan_shards(tensors, size).fingerprint(provenance)

    first = fingerprint(FLOAT32, "x", 100)
    assert first == fingerprint(FLOAT32, "x", 100)
    others = {
        fingerprint(FLOAT16, "x", 100),
        fingerprint(FLOAT32, "y", 100),
        fingerprint(FLOAT32, "x", 8),
    }
    assert len(others | {first}) == 4
