"""DeepSpeed directories: every stage and world size, and what is wrong with one."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.zero import ZeroRun
from xtuner2llava.errors import CheckpointError, CorruptFileError, UnsupportedError
from xtuner2llava.sources.artifact import Artifact
from xtuner2llava.sources.opening import open_artifact
from xtuner2llava.sources.zero_directory import open_zero_directory, zero_directory
from xtuner2llava.storage.weights import open_weights

PARTS = ("llm", "visual_encoder", "projector")


def numbered(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of these shapes, no number of which occurs twice."""
    tensors, start = [], 1
    for shape in shapes:
        size = int(torch.Size(shape).numel())
        tensors.append(torch.arange(start, start + size, dtype=torch.float32).view(shape))
        start += size
    return tensors


def run(stage: int, ranks: int, **further: Any) -> ZeroRun:
    """Two groups of odd sizes, as for weights with and without decay."""
    a, b, c, d, e = numbered((3, 5), (7,), (1,), (2, 2, 3), (5,))
    groups = [
        {"llm.a": a, "projector.model.0.weight": b, "llm.c": c},
        {"projector.model.0.bias": d, "llm.e": e},
    ]
    return ZeroRun(groups, stage, ranks, **further)


def dense(artifact: Artifact) -> dict[str, torch.Tensor]:
    found = {}
    for tensors in (artifact.weights, artifact.adapters):
        for part, inner in tensors.items():
            for name, tensor in inner.items():
                assert tensor.ranges() is not None, name
                values = tensor.read(0, tensor.rows).reshape(tensor.shape)
                found[f"{part}.{name}"] = values
    return found


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_of_any_stage_and_world_size(stage: int, ranks: int, tmp_path: Path) -> None:
    made = run(stage, ranks)
    artifact = open_artifact(str(made.save(tmp_path / "iter_2.pth")))
    assert_same(dense(artifact), made.dense)
    assert artifact.layout == f"DeepSpeed ZeRO-{stage} directory, {ranks} ranks, master weights"
    assert artifact.iteration == 2
    assert len(artifact.files) == ranks + (ranks if stage == 3 else 1)


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), stage=st.integers(1, 3), ranks=st.integers(1, 5))
def test_any_shapes_in_any_groups(
    data: st.DataObject, stage: int, ranks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    groups, count, start = [], data.draw(st.integers(1, 3)), 0
    for _ in range(count):
        shapes = data.draw(SHAPES)
        tensors = numbered((1,), *shapes)
        groups.append({f"projector.{start + i}": t for i, t in enumerate(tensors)})
        start += len(tensors)
    made = ZeroRun(groups, stage, ranks, sub_group=data.draw(st.integers(1, 30)))
    folder = tmp_path_factory.mktemp("zero")
    assert_same(dense(open_artifact(str(made.save(folder)))), made.dense)
    shutil.rmtree(folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_buffers_and_shared_ones(stage: int, tmp_path: Path) -> None:
    frozen, half, buffer = numbered((5, 3), (7,), (4,))
    made = run(
        stage,
        3,
        frozen={"visual_encoder.x": frozen, "visual_encoder.y": half.bfloat16()},
        buffers={"llm.position_ids": buffer.long()},
        shared={"llm.lm_head.weight": "llm.a"},
    )
    assert_same(dense(open_artifact(str(made.save(tmp_path / "iter_2.pth")))), made.dense)


def test_a_config_is_found_in_the_model_states(tmp_path: Path) -> None:
    artifact = open_artifact(str(run(2, 2, config="x = 1").save(tmp_path / "iter_2.pth")))
    where = tmp_path / "iter_2.pth" / "mp_rank_00_model_states.pt"
    assert artifact.config == ("x = 1", f"{where} (meta.cfg)")


@pytest.mark.parametrize("prefix", ["", "bf16_", "fp16_"])
def test_names_of_optimizer_states(prefix: str, tmp_path: Path) -> None:
    made = run(2, 2, prefix=prefix)
    assert_same(dense(open_artifact(str(made.save(tmp_path / "iter_2.pth")))), made.dense)


@pytest.mark.parametrize("given", ["", "mp_rank_00_model_states.pt",
                                   "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"])  # fmt: skip
def test_a_file_inside_stands_for_its_directory(given: str, tmp_path: Path) -> None:
    made = run(2, 2)
    folder = made.save(tmp_path / "iter_2.pth")
    assert zero_directory(folder / given) == folder
    assert_same(dense(open_artifact(str(folder / given))), made.dense)


def test_deepspeeds_own_folders_name_the_latest(tmp_path: Path) -> None:
    made = run(2, 2)
    made.save(tmp_path / "global_step2")
    (tmp_path / "latest").write_text("global_step2\n")
    assert_same(dense(open_artifact(str(tmp_path))), made.dense)
    (tmp_path / "latest").write_text("global_step3")
    with pytest.raises(CorruptFileError, match="latest: names 'global_step3', which is not there"):
        open_artifact(str(tmp_path))
    for escape in ("../elsewhere", "/etc", "..", "a\0b"):
        (tmp_path / "latest").write_text(escape)
        with pytest.raises(CorruptFileError, match="which is not a plain file name"):
            open_artifact(str(tmp_path))
    # A folder that names itself, or another that names it.
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "latest").write_text("inner")
    (tmp_path / "latest").write_text("inner")
    with pytest.raises(CheckpointError):
        open_artifact(str(tmp_path))


def test_other_folders_are_none(tmp_path: Path) -> None:
    assert zero_directory(tmp_path) is None
    assert zero_directory(tmp_path / "none") is None
    (tmp_path / "iter_2.pth").touch()
    assert zero_directory(tmp_path / "iter_2.pth") is None


# The 16-bit weights beside the masters


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("optimizers", [True, False])
def test_module_weights(stage: int, optimizers: bool, tmp_path: Path) -> None:
    made = run(stage, 2)
    folder = made.save(tmp_path / "iter_2.pth")
    if not optimizers:
        for path in folder.glob("*optim_states.pt"):
            path.unlink()
    artifact = open_zero_directory(folder, "module")
    assert artifact.layout.endswith(", 16-bit module weights")
    assert_same(dense(artifact), {n: t.bfloat16() for n, t in made.dense.items()})


def test_without_optimizer_states_the_module_is_what_is_left(tmp_path: Path) -> None:
    folder = run(2, 2).save(tmp_path / "iter_2.pth")
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    assert dense(open_artifact(str(folder)))["llm.a"].dtype == torch.bfloat16


def test_zero_3_has_no_module_weights(tmp_path: Path) -> None:
    folder = run(3, 2).save(tmp_path / "iter_2.pth")
    with pytest.raises(UnsupportedError, match="only in its optimizer states\n") as caught:
        open_zero_directory(folder, "module")
    assert caught.value.faults[0].advice == "Leave out `--weights module`."
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(UnsupportedError, match="and these are not here") as caught:
        open_artifact(str(folder))
    assert caught.value.faults[0].advice == "Copy the *_optim_states.pt."


# What is wrong


def remove(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return change


def rename(before: str, after: str) -> Callable[[Path], None]:
    return lambda folder: shutil.move(folder / before, folder / after)


def truncate(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[:-200])

    return change


def edit(pattern: str, *keys: Any, value: Any) -> Callable[[Path], None]:
    """Sets one entry of a rank's file."""

    def change(folder: Path) -> None:
        for path in folder.glob(pattern):
            content = torch.load(path, weights_only=False)
            inner = content
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value
            torch.save(content, path)

    return change


def older(stage: int, rank: int) -> Callable[[Path], None]:
    """One rank is of an earlier checkpoint."""
    return lambda folder: run(stage, 3, step=1).save(folder, [rank]) and None


OPTIMIZER = "optimizer_state_dict"


@pytest.mark.parametrize(
    ("stage", "change", "texts"),
    [
        (2, remove("*rank_1_*optim*"), ["the optim_states of ranks [1] are missing"]),
        (2, remove("*rank_2_*optim*"), ["3 ranks were trained, optimizer states of 2 are there"]),
        (2, remove("*model_states.pt"), ["has no *_model_states.pt"]),
        (3, remove("*rank_0_*"), ["model_states of ranks [0]", "optim_states of ranks [0]"]),
        (3, remove("*rank_2_*"), ["optimizer states of 2 are", "model states of 2 are"]),
        (3, remove("*rank_2_*model*"), ["3 ranks were trained, model states of 2 are there"]),
        (
            2,
            rename(
                "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
                "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt",
            ),
            ["is of tensor-parallel rank 1; XTuner's LLaVA is never trained tensor-parallel"],
        ),
        (
            2,
            lambda folder: shutil.copy(
                folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
                folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
            ),
            ["two files for rank 1"],
        ),
        (2, truncate("*rank_1_*optim*"), ["its end is missing"]),
        (2, older(2, 1), ["the optimizer's step is 1.0, in most other ranks 2.0"]),
        (3, older(3, 2), ["global_steps is 1, in most other", "the optimizer's step is 1.0"]),
        (
            2,
            edit("*rank_1_*optim*", OPTIMIZER, "partition_count", value=[2, 2]),
            ["its ranks were written by trainings of different stage or world size"],
        ),
        (
            2,
            edit("*rank_1_*optim*", OPTIMIZER, "zero_stage", value=1),
            ["its ranks were written by trainings of different stage or world size"],
        ),
        (2, edit("*optim*", OPTIMIZER, "zero_stage", value=7), ["do not say that they are of"]),
        (
            2,
            lambda folder: shutil.copy(
                folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
                folder / f"bf16_zero_pp_rank_{10**40}_mp_rank_00_optim_states.pt",
            ),
            ["optim_states of ranks [3, 4, 5, 6, 7, 8, 9, 10, 11, 12] and more are missing"],
        ),
        (2, edit("*rank_0_*optim*", OPTIMIZER, value=5), ["has no optimizer_state_dict"]),
        (
            2,
            edit("*optim*", OPTIMIZER, "single_partition_of_fp32_groups", value=[]),
            ["has no usable 'single_partition_of_fp32_groups'"],
        ),
        (
            2,
            edit("*optim*", OPTIMIZER, "single_partition_of_fp32_groups", value=[7, 8]),
            ["has no usable 'single_partition_of_fp32_groups'"],
        ),
        (
            2,
            edit("*rank_1_*optim*", OPTIMIZER, "single_partition_of_fp32_groups",
                 value=[torch.ones(8), torch.ones(6, dtype=torch.float64)]),
            ["its ranks have different groups or dtypes"],
        ),
        (
            2,
            edit("*rank_1_*optim*", OPTIMIZER, "single_partition_of_fp32_groups",
                 value=[torch.ones(8)]),
            ["its ranks have different groups or dtypes"],
        ),
        (
            2,
            edit("*rank_1_*optim*", OPTIMIZER, "single_partition_of_fp32_groups",
                 value=[torch.ones(100), torch.ones(6)]),
            ["group 0 has 116 elements, its parameters 23"],
        ),
        (
            3,
            edit("*rank_1_*optim*", OPTIMIZER, "fp32_flat_groups", value=[torch.ones(100)] * 2),
            ["rank 1 has 200 elements, its parameters 15"],
        ),
        (
            3,
            edit("*rank_1_*optim*", OPTIMIZER, "fp32_flat_groups", value=[torch.ones(4)] * 2),
            ["has more elements than the ranks hold", "rank 1 has 8 elements, its parameters 15"],
        ),
        (2, edit("*model*", "param_shapes", value=[]), ["has no param_shapes"]),
        (2, edit("*model*", "param_shapes", value=[{}]), ["has no param_shapes"]),
        (
            2,
            edit("*model*", "param_shapes", value=[{"llm.a": (-3, -5)}, {}]),
            ["llm.a has a shape that makes no sense"],
        ),
        (
            2,
            edit("*model*", "param_shapes", value=[{"llm.a": (-1, -1)}, {}]),
            ["llm.a has a shape that makes no sense"],
        ),
        (
            2,
            edit("*model*", "param_shapes", value=[{"llm.a": (2**500, 2**500, 2**500)}, {}]),
            ["llm.a has a shape that makes no sense"],
        ),
        (
            3,
            edit("*model*", "param_shapes", value=[{"llm.a": (3,) * 4_000}]),
            ["llm.a has a shape that makes no sense"],
        ),
        (
            2,
            edit("*model*", "param_shapes", value=[{"llm.a": (23,)}]),
            ["names 1 parameter groups, its optimizer states have 2"],
        ),
        (
            2,
            edit("*model*", "param_shapes", value=[{"llm.a": (10**15,)}, {"llm.b": (17,)}]),
            ["its parameters 1,000,000,000,000,000"],
        ),
        (
            3,
            edit("*model*", "frozen_param_shapes", value={"llm.f": (3, 3)}),
            ["llm.f: is frozen, and not in every rank"],
        ),
        (
            2,
            edit("*model*", "param_shapes", value=[{"a": (23,)}, {"b": (17,)}]),
            ["2 tensors belong to no part of LLaVA, such as 'a'"],
        ),
        (
            2,
            lambda folder: torch.save([1], folder / "mp_rank_00_model_states.pt"),
            ["is not a file of DeepSpeed"],
        ),
    ],
)  # fmt: skip
def test_a_directory_that_is_not_whole_is_refused(
    stage: int, change: Callable[[Path], object], texts: list[str], tmp_path: Path
) -> None:
    folder = run(stage, 3).save(tmp_path / "iter_2.pth")
    assert dense(open_artifact(str(folder)))
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        open_artifact(str(folder))
    faults = [str(fault) for fault in caught.value.faults]
    for text in texts:
        assert any(text in fault for fault in faults), faults
    assert all(fault.where for fault in caught.value.faults)


def test_a_damaged_step_is_refused(tmp_path: Path) -> None:
    # Steps are compared between ranks: the damage must not make them another checkpoint's.
    folder = run(2, 2).save(tmp_path / "iter_2.pth")
    path = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    step = data.index(struct.pack("<f", 2.0))
    data[step + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="is damaged: its bytes have the CRC-32"):
        open_artifact(str(folder))


def test_a_file_that_leads_out_is_refused(tmp_path: Path) -> None:
    folder = run(2, 2).save(tmp_path / "iter_2.pth")
    path = folder / "mp_rank_00_model_states.pt"
    shutil.move(path, tmp_path / "outside.pt")
    path.symlink_to(tmp_path / "outside.pt")
    with pytest.raises(CorruptFileError, match="is a link that leads out of its folder"):
        open_artifact(str(folder))


# Written by DeepSpeed itself


@pytest.mark.parametrize("case", ["qwen2_f_zero2_full", "qwen2_f_zero3_full"])
def test_real_masters_are_what_xtuner_rounds(case: str, checkpoints: Path) -> None:
    artifact = open_artifact(str(checkpoints / case / "iter_2.pth"))
    found = dense(artifact)
    assert all(t.dtype == torch.float32 for t in found.values() if t.is_floating_point())
    # XTuner's own folder holds the LLM, read from these masters, in float16.
    folder = checkpoints / case / "iter_2_xtuner"
    files = {"llm": "model.safetensors", "projector": "projector/model.safetensors"}
    if case == "qwen2_f_zero3_full":
        files["visual_encoder"] = "visual_encoder/model.safetensors"
    compared = 0
    for part, name in files.items():
        for key, tensor in open_weights(folder / name).tensors.items():
            expected = tensor.read(0, tensor.rows)
            master = found[f"{part}.{key}"]
            # XTuner reads all of a DeepSpeed directory as float16, also what it saves as float32.
            assert torch.equal(master.half(), expected.half()), key
            compared += int(not torch.equal(master, expected.float()))
    assert compared > 20  # the masters hold more than float16 can
    assert found.keys() == {
        f"{part}.{key}"
        for part, name in files.items()
        for key in open_weights(folder / name).tensors
    } | ({"llm.lm_head.weight"} & found.keys())


def test_real_module_weights_are_the_masters_rounded(checkpoints: Path) -> None:
    folder = checkpoints / "qwen2_f_zero2_full" / "iter_2.pth"
    masters = dense(open_zero_directory(folder))
    module = dense(open_zero_directory(folder, "module"))
    assert masters.keys() == module.keys()
    for name, tensor in module.items():
        assert torch.equal(masters[name].to(tensor.dtype), tensor), name
    with pytest.raises(UnsupportedError, match="ZeRO-3 keeps the weights only in its optimizer"):
        open_zero_directory(checkpoints / "qwen2_f_zero3_full" / "iter_2.pth", "module")
