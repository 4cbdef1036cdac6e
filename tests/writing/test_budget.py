"""No more jobs work than fit into the memory; what is too large is told first."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from xtuner2llava import UsageError
from xtuner2llava.tensors.computed import Fill, Normalize, Transpose, cast
from xtuner2llava.tensors.dtype import BFLOAT16, FLOAT16, FLOAT32
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.lora import Merge
from xtuner2llava.tensors.mean import Mean
from xtuner2llava.tensors.stored import Stored
from xtuner2llava.writing.blocks import working_memory
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.jobs import WorkingMemory, fitting_jobs
from xtuner2llava.writing.shards import plan_shards
from xtuner2llava.writing.writer import write_shards


def sparse(path: Path, *shape: int) -> Stored:
    """A float32 tensor of zeros that takes no disk."""
    count = 4
    for size in shape:
        count *= size
    with path.open("wb") as file:
        file.truncate(count)
    return Stored(path.name, FLOAT32, shape, [FileRange(SourceFile.of(path), 0, count)])


@pytest.mark.parametrize(
    ("most", "jobs", "memory", "expected"),
    [(100, 4, 1000, 4), (100, 4, 399, 3), (100, 4, 99, 1), (0, 2, 0, 2), (100, 1, 1000, 1)],
)
def test_no_more_jobs_than_there_is_memory_for(
    most: int, jobs: int, memory: int, expected: int
) -> None:
    assert fitting_jobs([WorkingMemory(most), WorkingMemory(0)], jobs, memory) == expected
    assert fitting_jobs([], jobs, 0) == jobs


@pytest.mark.parametrize(
    ("memory", "expected"), [(460, 4), (459, 3), (370, 3), (369, 2), (310, 2), (309, 1)]
)
def test_what_threads_share_counts_once_for_each_tensor_in_work(memory: int, expected: int) -> None:
    shared = [(50, 2), (110, 1), (200, 1), (60, 2), (200, 1)]
    needs = [WorkingMemory(0, size, blocks) for size, blocks in shared]
    # Two threads are at the second and third, three at the fourth too, four at the last three.
    assert fitting_jobs(needs, 4, memory) == expected


def test_threads_that_do_not_fit_do_not_work(tmp_path: Path) -> None:
    """Of the largest tensors, as many are made at a time as there is memory for."""
    lock, at_work, most = threading.Lock(), 0, 0

    class Large(Fill):
        row_cost = 16 << 20

        def flat(self) -> LazyTensor:
            return self

        def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.01)
            super().read_into(start, stop, out)
            with lock:
                at_work -= 1

    plan = plan_shards({"w": Large(FLOAT32, (40, 2), 1.0)})
    (entry,) = plan.shards[0].entries
    need = working_memory(entry.tensor).own
    for jobs, expected in ((4, 2), (1, 1)):
        most = 0
        with OutputFolder(tmp_path / "out", "") as folder:
            write_shards(folder, plan.shards, jobs=jobs, max_memory=2 * need)
        assert most == expected


def test_all_tensors_that_need_more_are_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    files = tmp_path / "sources"
    down, up = sparse(files / "down", 4096, 11008), sparse(files / "up", 11008, 4096)
    left, right = sparse(files / "left", 4096, 512), sparse(files / "right", 512, 11008)
    tensors: dict[str, LazyTensor] = {
        "down": cast(Merge(down, left, right, 2.0), FLOAT16),
        "up": up,
        "norm": cast(sparse(files / "norm", 4096), FLOAT16),
        "more": cast(Merge(down, left, right, 2.0), BFLOAT16),
    }
    plan = plan_shards(tensors)
    with (
        pytest.raises(UsageError) as caught,
        OutputFolder(tmp_path / "out", "") as folder,
    ):
        write_shards(folder, plan.shards, max_memory=40_000_000)
    assert {fault.where for fault in caught.value.faults} == {"down", "more"}
    memory = working_memory(tensors["down"])
    need = memory.own + memory.shared
    # The factor, stored and in float64, and a block of rows.
    assert memory.shared == 512 * 11008 * 12 and 16 << 20 <= memory.own < 40 << 20
    fault = caught.value.faults[0]
    assert f"needs {need:,} bytes" in fault.what and "40,000,000" in fault.what
    assert fault.advice == f"Give --max-memory {-(-need // 10**6)}MB."
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


# Of `ru_maxrss`, a process inherits what the one had that started it.
PEAK = """
import re
from pathlib import Path
def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
"""
LARGE = (
    PEAK
    + """
import sys
sys.path.insert(0, sys.argv[1])
from dataclasses import astuple
import torch
torch.set_num_threads(1)
from writing.test_budget import largest
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import plan_shards
from xtuner2llava.writing.writer import write_shards
from xtuner2llava.writing.blocks import working_memory
folder, kind, rows = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
tensor = largest(folder, kind, rows)
plan = plan_shards({"w": tensor})
torch.zeros(4, 4).half().float() @ torch.zeros(4, 4)  # What torch itself needs.
before = peak()
with OutputFolder(folder / "out", "") as out:
    write_shards(out, plan.shards, jobs=1)
    after = peak()
print(after - before, sum(astuple(working_memory(tensor))[:2]))
"""
)


# What libraries allocate of their own when they first compute; torch 2.6 more than later ones. The
# tensors are 268 MB.
LIBRARIES = 48_000_000


def largest(folder: Path, kind: str, rows: int) -> LazyTensor:
    """Tensors of 8192 columns that must be computed, each in another way."""
    weight = sparse(folder / "weight", rows, 8192)
    if kind == "cast":
        return cast(weight, FLOAT16)
    if kind == "norm":
        return cast(Normalize(weight), FLOAT16)
    if kind == "mean":
        return Mean(weight, 64)
    if kind == "transposed":
        return cast(Transpose(weight), FLOAT16)
    left, right = sparse(folder / "left", rows, 64), sparse(folder / "right", 64, 8192)
    return cast(Merge(weight, left, right, 2.0), FLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cast", "norm", "mean", "transposed", "merge"])
def test_a_tensor_is_written_within_what_is_said_of_it(kind: str, tmp_path: Path) -> None:
    """And what it takes does not depend on its size: four times the rows cost no more."""
    taken = []
    for rows in (2048, 8192):
        folder = tmp_path / str(rows)
        folder.mkdir()
        ran = subprocess.run(
            [sys.executable, "-c", LARGE, Path(__file__).parents[1], folder, kind, str(rows)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown, said = map(int, ran.stdout.split())
        assert grown <= said + LIBRARIES
        taken.append(grown)
    # For transposed tensors, holes in the heap are counted, and come with time.
    assert taken[1] <= taken[0] + (90_000_000 if kind == "transposed" else LIBRARIES)


def test_the_measure_sees_a_tensor_that_is_held_whole() -> None:
    grow = (
        f"{PEAK}\nimport torch\nbefore = peak()\nx = torch.ones(50_000_000)\nprint(peak() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", grow], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 190_000_000
