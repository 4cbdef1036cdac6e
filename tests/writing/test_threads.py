"""Threads of torch: the command line fits them to the jobs, the library leaves them alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from reference.cases import CASES
from storing import stored
from xtuner2llava import Plan, convert
from xtuner2llava.cli.commands import main
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT16
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.writing.shards import Shard, plan_shards
from xtuner2llava.writing.writer import computing_jobs

LORA, FULL = "llama_d_lora_vislora", "llama_e_full_fullvis"


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that torch was told to use, on a machine with eight cores."""
    found: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


def by_command(checkpoints: Path, case: str, out: Path, *more: str) -> None:
    words = [str(checkpoints / case / "iter_2.pth"), str(out), "-q", *more]
    for name, value in CASES[case].options(checkpoints).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    done = CliRunner().invoke(main, ["convert", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("more", "threads"),
    [
        ([], 2),  # four jobs
        (["--jobs", "1"], 8),
        (["--jobs", "3"], 2),
        (["--jobs", "16"], 1),
        (["--max-shard-size", "60KB"], 2),
        (["--max-memory", "30MB"], 4),  # two jobs
    ],
)
def test_jobs_that_compute_share_the_cores(
    more: list[str], threads: int, asked_for: list[int], checkpoints: Path, tmp_path: Path
) -> None:
    by_command(checkpoints, LORA, tmp_path / "llava-lora", *more)
    assert asked_for == [threads]


def test_nothing_to_compute_asks_for_nothing(
    asked_for: list[int], checkpoints: Path, tmp_path: Path
) -> None:
    by_command(checkpoints, FULL, tmp_path / "llava-full", "--dtype", "keep")
    assert asked_for == []


def test_a_smaller_number_that_was_set_before_stays(
    asked_for: list[int], checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # OMP_NUM_THREADS=1
    by_command(checkpoints, LORA, tmp_path / "llava-lora")
    assert asked_for == [1]


def test_the_library_leaves_them_alone(
    asked_for: list[int], checkpoints: Path, tmp_path: Path
) -> None:
    convert(
        checkpoints / LORA / "iter_2.pth",
        tmp_path / "llava-lora",
        **CASES[LORA].options(checkpoints),
    )
    assert asked_for == []


def test_only_shards_with_something_to_compute_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)))
    weights: dict[str, LazyTensor] = {
        name: stored(tmp_path, name, torch.ones(100)) for name in "abcdef"
    }
    weights |= {name: cast(weights[name], FLOAT16) for name in "ab"}
    shards: tuple[Shard, ...] = plan_shards(weights, 400).shards
    assert len(shards) == 5  # Both halves are in one.
    assert computing_jobs(shards) == 3
    assert computing_jobs(shards, 7) == 7
    assert computing_jobs(shards[1:]) == 0


def test_on_plan_comes_before_anything_is_written(checkpoints: Path, tmp_path: Path) -> None:
    seen = []

    def look(plan: Plan) -> None:
        seen.append((plan.shards.shards[0].filename, list(tmp_path.iterdir())))

    checkpoint = checkpoints / FULL / "iter_2.pth"
    convert(checkpoint, tmp_path / "llava-a", on_plan=look, **CASES[FULL].options(checkpoints))
    assert seen == [("model.safetensors", [])]

    def refuse(plan: Plan) -> None:
        raise RuntimeError("too large for us")

    with pytest.raises(RuntimeError, match="too large for us"):
        convert(
            checkpoint, tmp_path / "llava-b", on_plan=refuse, **CASES[FULL].options(checkpoints)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["llava-a"]
