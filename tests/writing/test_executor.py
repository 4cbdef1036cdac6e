"""Shards written by the workers of an executor are the same bytes, or an error, never half."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.cases import CASES
from storing import stored
from xtuner2llava import OutputError, PlanError, convert
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT16
from xtuner2llava.writing import executor, verify
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import ShardPlan, plan_shards
from xtuner2llava.writing.writer import write_shards

OPTIONS: dict[str, Any] = {"vision_tower_name": "openai/x", "max_shard_size": "100KB"}


class Sent(Executor):
    """Runs in the folder `there`, one after another, what has been through pickle."""

    def __init__(self, there: Path, before: Callable[[], None] = lambda: None) -> None:
        self._there, self._before = there, before
        self._lock = threading.Lock()
        self.sent = 0

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._before()
            data = pickle.dumps((function, arguments, keywords))
            self.sent += 1
            here = Path.cwd()
            os.chdir(self._there)
            try:
                function, arguments, keywords = pickle.loads(data)  # noqa: S301 - our own
                result = function(*arguments, **keywords)
                future.set_result(pickle.loads(pickle.dumps(result)))  # noqa: S301
            except BaseException as error:
                future.set_exception(pickle.loads(pickle.dumps(error)))  # noqa: S301
            finally:
                os.chdir(here)
        return future


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def processes() -> Iterator[ProcessPoolExecutor]:
    # A pool of processes that know nothing of this one, as workers of other machines do.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def plan(tmp_path: Path) -> ShardPlan:
    sources = tmp_path / "sources"
    sources.mkdir()
    numbers = torch.arange(30_000.0)
    tensors = {
        "a": stored(sources, "a", numbers),
        "b": cast(stored(sources, "b", numbers / 2), FLOAT16),
    }
    return plan_shards(tensors, 120_000)


def write(out: Path, plan: ShardPlan, executor: Executor | None) -> list[str]:
    with OutputFolder(out, "x") as folder:
        written = write_shards(folder, plan.shards, executor=executor)
        folder.publish()
    return [shard.filename for shard in written.shards if shard.kept]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["llava", "hf"])
def test_every_plan_can_be_sent(
    case: str,
    format: str,
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Paths given relative to one working directory are found from another one."""
    options = {"llm": CASES[case].llm, "vision": CASES[case].vision, "format": format, **OPTIONS}
    source = f"{case}/iter_2.pth"
    monkeypatch.chdir(checkpoints)
    convert(source, tmp_path / "here", **options)
    executor = Sent(tmp_path)
    convert(source, tmp_path / "there", executor=executor, **options)
    assert executor.sent > 2
    assert content(tmp_path / "there") == content(tmp_path / "here")


@pytest.mark.slow
def test_processes_write_the_same_bytes(
    checkpoints: Path, tmp_path: Path, processes: ProcessPoolExecutor
) -> None:
    case = "llama_d_lora_vislora"
    options: dict[str, Any] = {
        "llm": checkpoints / CASES[case].llm,
        "vision": checkpoints / CASES[case].vision,
        **OPTIONS,
    }
    source = checkpoints / case / "iter_2.pth"
    told: list[tuple[int, int]] = []
    convert(source, tmp_path / "here", **options)
    convert(
        source,
        tmp_path / "there",
        executor=processes,
        on_progress=lambda stage, done, total: told.append((done, total)),
        **options,
    )
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert told[-1][0] == told[-1][1] > 0


def test_what_fails_there_is_the_error_here(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    large = stored(tmp_path / "sources", "w", torch.tensor([1.0, 1e6]))
    plan = plan_shards({"w": cast(large, FLOAT16)})
    with pytest.raises(PlanError, match=r"w: element \[1\] is 1e\+06.*(?s:.*)--dtype bfloat16"):
        write(tmp_path / "out", plan, Sent(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_a_worker_that_dies_leaves_what_can_be_resumed(
    plan: ShardPlan,
    tmp_path: Path,
    processes: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "expected", plan, None)
    first = processes.submit(os.getpid).result()
    assert first != os.getpid()

    class Dying(Executor):
        def __init__(self) -> None:
            self._count = 0

        def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
            self._count += 1
            if self._count == 2:
                future = processes.submit(os._exit, 9)
                future.exception()
                return future
            done = processes.submit(function, *arguments, **keywords)
            done.exception()
            return done

    # One after the other, so that the first is finished when the second dies.
    monkeypatch.setattr("xtuner2llava.writing.jobs.ThreadPoolExecutor", one_thread)
    with pytest.raises(
        OutputError, match=r"00002-of-00002.*worker.*Broken(?s:.*)same command again"
    ):
        write(tmp_path / "out", plan, Dying())
    assert not (tmp_path / "out").exists()
    assert write(tmp_path / "out", plan, Sent(tmp_path)) == [plan.shards[0].filename]
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def one_thread(count: int, name: str) -> Executor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1, name)


def test_an_attempt_that_nobody_wants_ends_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the conversion was given up, or another worker was faster."""
    (tmp_path / "sources").mkdir()
    plan = plan_shards({"w": stored(tmp_path / "sources", "w", torch.arange(300_000.0))})
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    monkeypatch.setattr(executor, "_LOOK_BYTES", 1)
    write_all = verify.write_all

    def remove(descriptor: int, data: memoryview, offset: int) -> None:
        write_all(descriptor, data, offset)
        for path in attempts.iterdir():
            path.unlink()

    monkeypatch.setattr(verify, "write_all", remove)
    with pytest.raises(executor.Stopped):
        executor.write_attempt(attempts, plan.shards[0], True)
    assert list(attempts.iterdir()) == []


def test_attempts_of_a_run_that_was_killed_are_removed(plan: ShardPlan, tmp_path: Path) -> None:
    left = tmp_path / "out.partial/.xtuner2llava/attempts-old"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    seen: list[list[str]] = []
    executor = Sent(
        tmp_path, lambda: seen.append([path.name for path in left.parent.glob("attempts-*")])
    )
    write(tmp_path / "out", plan, executor)
    assert seen and all(len(names) == 1 and "attempts-old" not in names for names in seen)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        shard.filename for shard in plan.shards
    }


@pytest.mark.slow
def test_a_cluster_of_dask_one_of_whose_workers_dies(checkpoints: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed", exc_type=ImportError)
    case = "qwen2_d_lora_vislora"
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_dask.py"),
         checkpoints / case / "iter_2.pth", checkpoints / CASES[case].llm,
         checkpoints / CASES[case].vision, tmp_path],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["died"] == 1
    assert told["status"] == 0, told["told"]
    expected = content(tmp_path / "local")
    assert sum(name.endswith(".safetensors") for name in expected) > 4
    assert content(tmp_path / "killed") == expected
    assert content(tmp_path / "command") == expected


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_a_cluster_that_is_not_there(installed: bool, tmp_path: Path, checkpoints: Path) -> None:
    if installed:
        pytest.importorskip("distributed", exc_type=ImportError)
    blocked = "" if installed else "import sys; sys.modules['distributed'] = None\n"
    case = "qwen2_b_full_frozenvis"
    ran = subprocess.run(
        [sys.executable, "-c", f"{blocked}from xtuner2llava.cli.commands import main; main()",
         "convert",
         checkpoints / case / "iter_2.pth", tmp_path / "out", "--dask",
         "tcp://127.0.0.1:9" if installed else "tcp://x:1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    expected = "no scheduler answers at tcp://127" if installed else "pip install distributed"
    assert expected in ran.stderr
    assert list(tmp_path.iterdir()) == []
