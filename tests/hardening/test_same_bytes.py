"""The same input and options give the same bytes, and the right ones, whatever else differs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from reference.cases import CASES
from storing import stored
from xtuner2llava import convert
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT16
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.rows import concat, deinterleave, split
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import plan_shards
from xtuner2llava.writing.writer import write_shards

LORA = "llama_d_lora_vislora"


def options(checkpoints: Path) -> dict[str, Any]:
    return {**CASES[LORA].options(checkpoints), "max_shard_size": "60KB"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """LoRA merged and rounded in one job: all that could depend on anything."""
    out = tmp_path_factory.mktemp("expected") / "llava-out"
    convert(checkpoints / LORA / "iter_2.pth", out, jobs=1, **options(checkpoints))
    found = files(out)
    assert len([name for name in found if name.endswith(".safetensors")]) > 8
    return found


@pytest.mark.parametrize("jobs", [2, 8])
def test_the_number_of_jobs_changes_nothing(
    jobs: int, expected: Mapping[str, bytes], checkpoints: Path, tmp_path: Path
) -> None:
    out = tmp_path / "llava-out"
    convert(checkpoints / LORA / "iter_2.pth", out, jobs=jobs, **options(checkpoints))
    assert files(out) == expected


@pytest.mark.parametrize("jobs", [1, 2])
def test_resuming_changes_nothing(
    jobs: int, expected: Mapping[str, bytes], checkpoints: Path, tmp_path: Path
) -> None:
    out = tmp_path / "llava-out"

    def stop(stage: str, done: int, total: int) -> None:
        finished = list(tmp_path.glob("llava-out.partial/.xtuner2llava/records/*.json"))
        if len(finished) >= 1 or done == total:
            raise KeyboardInterrupt

    given = {**options(checkpoints), "jobs": jobs}
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoints / LORA / "iter_2.pth", out, on_progress=stop, **given)
    report = convert(checkpoints / LORA / "iter_2.pth", out, **given)
    assert report.resumed
    assert files(out) == expected


ENVIRONMENTS: dict[str, tuple[dict[str, str], int, str]] = {
    # Environment, umask, and where the command is run.
    "one": (
        {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "TZ": "Asia/Shanghai", "LC_ALL": "C",
         "PYTHONUTF8": "0"},
        0o077,
        "..",
    ),
    "another": (
        {"PYTHONHASHSEED": "2", "TZ": "UTC+12", "USER": "nobody", "HOME": "/nowhere",
         "COLUMNS": "20"},
        0o002,
        "/",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_environment_changes_nothing(
    name: str, expected: Mapping[str, bytes], checkpoints: Path, tmp_path: Path
) -> None:
    environment, mask, folder = ENVIRONMENTS[name]
    home = tmp_path / "here"
    home.mkdir()
    out = tmp_path / "llava-out"
    given = options(checkpoints)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    subprocess.run(
        [sys.executable, "-m", "xtuner2llava", "convert", checkpoints / LORA / "iter_2.pth", out,
         *flags],
        cwd=home / folder,
        env={**os.environ, **environment},
        umask=mask,
        check=True,
        capture_output=True,
    )  # fmt: skip
    assert files(out) == expected
    assert (out / "config.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_time_and_place_of_the_input_change_nothing(
    expected: Mapping[str, bytes], checkpoints: Path, tmp_path: Path
) -> None:
    path = tmp_path / "elsewhere" / "iter_2.pth"
    path.parent.mkdir()
    shutil.copy(checkpoints / LORA / "iter_2.pth", path)
    os.utime(path, ns=(1, 1))
    convert(path, tmp_path / "llava-out", **options(checkpoints))
    assert files(tmp_path / "llava-out") == expected


SETTINGS = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@SETTINGS
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 5)) | st.tuples(st.integers(0, 40)),
        min_size=1,
        max_size=8,
    ),
    size=st.integers(1, 400),
    jobs=st.integers(1, 4),
    rounded=st.booleans(),
)
def test_any_shards_and_jobs_read_back_as_what_was_planned(
    shapes: list[tuple[int, ...]],
    size: int,
    jobs: int,
    rounded: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Plan, write and read are the identity, with the shards' size and the jobs left to chance."""
    home = tmp_path_factory.mktemp("random")
    sources = home / "sources"
    sources.mkdir()
    torch.manual_seed(len(shapes))
    dense = {f"t.{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    lazy: dict[str, LazyTensor] = {}
    for name, tensor in dense.items():
        source = stored(sources, name, tensor)
        lazy[name] = cast(source, FLOAT16) if rounded else source
    planned = plan_shards(lazy, size)
    with OutputFolder(home / "out", "f") as folder:
        write_shards(folder, planned.shards, jobs=jobs)
        folder.publish()
    read: dict[str, torch.Tensor] = {}
    for path in sorted((home / "out").iterdir()):
        read |= load_file(path)
    wanted = {name: tensor.half() if rounded else tensor for name, tensor in dense.items()}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    shutil.rmtree(home)


@SETTINGS
@given(
    groups=st.integers(1, 4),
    slots=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    jobs=st.integers(1, 3),
)
def test_parts_that_are_put_together_again_are_the_whole(
    groups: int, slots: list[int], jobs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A fused tensor taken apart by groups, written, read, and interleaved by torch."""
    home = tmp_path_factory.mktemp("fused")
    (home / "sources").mkdir()
    rows = groups * sum(slots)
    dense = torch.arange(float(rows * 3)).view(rows, 3)
    source = stored(home / "sources", "fused", dense)
    parts = deinterleave(source, groups, slots)
    halves = split(source, [rows // 2, rows - rows // 2])
    lazy = {f"part.{i}": part for i, part in enumerate(parts)} | {"whole": concat(halves)}
    with OutputFolder(home / "out", "f") as folder:
        write_shards(folder, plan_shards(lazy, 64).shards, jobs=jobs)
        folder.publish()
    read: dict[str, torch.Tensor] = {}
    for path in (home / "out").iterdir():
        read |= load_file(path)
    grouped = [read[f"part.{i}"].view(groups, size, 3) for i, size in enumerate(slots)]
    assert torch.equal(torch.cat(grouped, dim=1).view(rows, 3), dense)
    assert torch.equal(read["whole"], dense)
    shutil.rmtree(home)
