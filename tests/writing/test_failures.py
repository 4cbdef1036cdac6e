"""What happens when a disk, a source or a user ends the writing early."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storing import stored
from xtuner2llava.errors import CorruptFileError, OutputError
from xtuner2llava.tensors.dtype import FLOAT32
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.stored import Stored
from xtuner2llava.writing import disk, verify
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import ShardPlan, plan_shards
from xtuner2llava.writing.writer import write_shards


class Failing(LazyTensor):
    """A tensor whose reading raises `error`."""

    dtype, shape = FLOAT32, (2,)

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def read(self, start: int, stop: int) -> torch.Tensor:
        raise self._error

    def leaves(self) -> Iterator[LazyTensor]:
        return iter(())


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


def three_tensors(sources: Path) -> dict[str, LazyTensor]:
    return {name: stored(sources, name, torch.arange(100_000.0)) for name in "abc"}


def write(out: Path, plan: ShardPlan, jobs: int = 1, restart: bool = False) -> tuple[bool, ...]:
    """Writes and publishes; returns which shards were kept from an earlier run."""
    with OutputFolder(out, plan.fingerprint(""), restart=restart) as folder:
        written = write_shards(folder, plan.shards, jobs=jobs)
        folder.publish()
    return tuple(shard.kept for shard in written.shards)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_to_write(
    number: int, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_shards(three_tensors(sources))
    pwrite = os.pwrite

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        if offset > 500_000:
            raise OSError(number, os.strerror(number))
        return pwrite(descriptor, data, offset)

    def refuse_copy(source: int, target: int, count: int, start: int, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.os, "pwrite", refuse)
    monkeypatch.setattr(disk.os, "copy_file_range", refuse_copy)
    with pytest.raises(OutputError) as caught:
        write(tmp_path / "out", plan)
    (fault,) = caught.value.faults
    assert fault.where == str(tmp_path / "out.partial/model.safetensors")
    assert fault.what == f"cannot be written ({os.strerror(number)})"
    assert "another" in fault.advice and "same command again" in fault.advice
    # The first tensor was written.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "sources"]


def test_a_disk_that_refuses_to_flush(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_shards(three_tensors(sources))
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 500_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written \(Input/output"):
        write(tmp_path / "out", plan)


def test_a_disk_that_refuses_to_be_read_back(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_shards(three_tensors(sources))

    def refuse(descriptor: int, view: memoryview, offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(verify, "read_all", refuse)
    with pytest.raises(
        OutputError, match=r"model\.safetensors: cannot be read back \(Input/output"
    ):
        write(tmp_path / "out", plan)


def test_a_limit_on_the_size_of_files(sources: Path, tmp_path: Path) -> None:
    plan = plan_shards(three_tensors(sources))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"(?s)File too large.*ulimit -f.*--max-shard-size"):
            write(tmp_path / "out", plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


def test_short_reads_and_writes_are_continued(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_shards(three_tensors(sources))
    write(tmp_path / "expected", plan)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:50_001], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:70_001]], at))
    write(tmp_path / "out", plan)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_source_that_was_truncated(sources: Path, tmp_path: Path) -> None:
    tensors = three_tensors(sources)
    plan = plan_shards(tensors)
    (piece,) = tensors["b"].ranges() or ()
    os.truncate(piece.file.path, 200_000)
    with pytest.raises(CorruptFileError) as caught:
        write(tmp_path / "out", plan)
    assert caught.value.faults[0].where == str(piece.file.path)
    assert "it had 400,003 bytes, now 200,000" in caught.value.faults[0].what
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_a_source_that_changes_while_it_is_copied(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = three_tensors(sources)
    plan = plan_shards(tensors)
    (piece,) = tensors["b"].ranges() or ()
    pwrite = os.pwrite

    def touch(descriptor: int, data: memoryview, offset: int) -> int:
        os.utime(piece.file.path, ns=(0, 0))
        return pwrite(descriptor, data, offset)

    with pytest.raises(CorruptFileError, match="the file changed while it was read"):
        monkeypatch.setattr(disk.os, "pwrite", touch)
        with OutputFolder(tmp_path / "out", "") as folder:
            write_shards(folder, plan.shards, verify=False)


class FailingTogether(Failing):
    """Fails when all others have come as far."""

    def __init__(self, error: BaseException, barrier: threading.Barrier) -> None:
        super().__init__(error)
        self._barrier = barrier

    def read(self, start: int, stop: int) -> torch.Tensor:
        self._barrier.wait(60)
        raise self._error


@pytest.mark.parametrize("jobs", [1, 6])
def test_of_several_errors_that_of_the_first_shard_is_raised(jobs: int, tmp_path: Path) -> None:
    barrier = threading.Barrier(jobs)
    tensors = {str(i): FailingTogether(OutputError(f"fault {i}"), barrier) for i in range(6)}
    with pytest.raises(OutputError, match=r"^fault 0"):
        write(tmp_path / "out", plan_shards(tensors, 8), jobs)


def test_an_error_of_the_callback_stops_the_work(sources: Path, tmp_path: Path) -> None:
    plan = plan_shards(three_tensors(sources), 400_000)

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "out", "") as folder:
        write_shards(folder, plan.shards, on_progress=cancel)
    assert not (tmp_path / "out").exists()


class Interrupting(LazyTensor):
    """500 blocks that take 5 seconds to read; with the second comes Ctrl-C."""

    dtype, shape, row_cost = FLOAT32, (500, 2), 16 << 20

    def read(self, start: int, stop: int) -> torch.Tensor:
        if start == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return torch.zeros(stop - start, 2)

    def leaves(self) -> Iterator[LazyTensor]:
        return iter(())


def test_an_interrupt_ends_all_jobs(tmp_path: Path, interrupts: None) -> None:
    plan = plan_shards({name: Interrupting() for name in "abcd"}, 4000)
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "out", "") as folder:
        write_shards(folder, plan.shards, jobs=4)
    assert list(tmp_path.iterdir()) == []
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("job", "flush"))
    ]


def test_progress_grows_to_the_total(sources: Path, tmp_path: Path) -> None:
    tensor = torch.zeros(20_000_000)
    path = sources / "big"
    path.write_bytes(tensor.numpy().tobytes())
    lazy = stored(sources, "small", torch.zeros(1))
    big = Stored("big", FLOAT32, (20_000_000,), [FileRange(SourceFile.of(path), 0, 80_000_000)])
    plan = plan_shards({"big": big, "small": lazy}, 80_000_000)
    total = sum(shard.size for shard in plan.shards)
    for verified in (True, False):
        told: list[tuple[int, int]] = []
        with OutputFolder(tmp_path / "out", "") as folder:
            write_shards(
                folder,
                plan.shards,
                verify=verified,
                on_progress=lambda done, total: told.append((done, total)),  # noqa: B023
            )
        steps = [done for done, _ in told]
        assert steps == sorted(set(steps))
        assert max(b - a for a, b in zip([0, *steps], steps, strict=False)) <= 32_000_000
        assert told[-1] == (total, total)


CRASH = """
import os, signal, sys, threading
from pathlib import Path
from test_failures import Failing, write
from xtuner2llava.tensors.dtype import FLOAT32
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.stored import Stored
from xtuner2llava.writing.shards import plan_shards

class Kill(Stored):
    def ranges(self):
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().ranges()

tensors = {}
for name, kind in zip("abc", (Stored, Stored, Kill)):
    piece = FileRange(SourceFile.of(Path(sys.argv[1]) / f"{len(tensors)}.bin"), 3, 400_000)
    tensors[name] = kind(name, FLOAT32, (100_000,), (piece,))
write(Path(sys.argv[2]), plan_shards(tensors, 400_000))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardPlan, Path]:
    """A plan of three shards, and the `out.partial` with two that a killed process has left."""
    folder = tmp_path_factory.mktemp("killed")
    sources = folder / "sources"
    sources.mkdir()
    plan = plan_shards(three_tensors(sources), 400_000)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", CRASH, sources, folder / "out"],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == -9
    assert not (folder / "out").exists()
    left = sorted(path.name for path in (folder / "out.partial").glob("*.safetensors"))
    assert left == [shard.filename for shard in plan.shards]
    return plan, folder / "out.partial"


@pytest.fixture
def crashed(killed: tuple[ShardPlan, Path], tmp_path: Path) -> ShardPlan:
    """The plan, with what was left in `tmp_path`."""
    plan, partial = killed
    shutil.copytree(partial, tmp_path / "out.partial")
    return plan


def test_resume_after_a_crash_keeps_what_was_finished(crashed: ShardPlan, tmp_path: Path) -> None:
    before = (tmp_path / "out.partial" / crashed.shards[0].filename).stat()
    assert write(tmp_path / "out", crashed) == (True, True, False)
    after = (tmp_path / "out" / crashed.shards[0].filename).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    write(tmp_path / "expected", crashed)
    for path in (tmp_path / "expected").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_resume_writes_a_damaged_shard_again(crashed: ShardPlan, tmp_path: Path) -> None:
    path = tmp_path / "out.partial" / crashed.shards[1].filename
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\xff")
    assert write(tmp_path / "out", crashed) == (True, False, False)
    assert (tmp_path / "out" / path.name).read_bytes() == data


def test_resume_of_another_plan_is_refused(crashed: ShardPlan, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="other input or other options"),
        OutputFolder(tmp_path / "out", "another"),
    ):
        pass
    assert write(tmp_path / "out", crashed) == (True, True, False)


def test_restart_writes_everything_again(crashed: ShardPlan, tmp_path: Path) -> None:
    assert write(tmp_path / "out", crashed, restart=True) == (False, False, False)


def test_a_failed_run_keeps_what_is_finished_and_says_so(sources: Path, tmp_path: Path) -> None:
    tensors = three_tensors(sources)
    failing = plan_shards({**tensors, "c": Failing(CorruptFileError("gone"))}, 400_000)
    with (
        pytest.raises(
            CorruptFileError, match=r"(?s)gone.*What is done stays in .*out.partial .2 finished"
        ),
        OutputFolder(tmp_path / "out", "same") as folder,
    ):
        write_shards(folder, failing.shards, jobs=1)
    assert folder.kept == tmp_path / "out.partial"
    with OutputFolder(tmp_path / "out", "same") as folder:
        written = write_shards(folder, plan_shards(tensors, 400_000).shards)
        folder.publish()
    assert [shard.kept for shard in written.shards] == [True, True, False]


MEMORY = """
import sys
from pathlib import Path
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT16, FLOAT32
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.stored import Stored
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import plan_shards
from xtuner2llava.writing.writer import write_shards

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

path, out, computed = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "cast"
piece = FileRange(SourceFile.of(path), 0, 300_000_000)
tensor = Stored("w", FLOAT32, (1, 75_000_000), (piece,))
if computed:
    import torch
    torch.zeros(1000).half()
    tensor = cast(tensor, FLOAT16)
import numpy
before = peak()
plan = plan_shards({"w": tensor})
with OutputFolder(out, "") as folder:
    write_shards(folder, plan.shards, jobs=1)
    folder.publish()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "limit"), [("copy", 20_000), ("cast", 70_000)])
def test_memory_does_not_grow_with_the_tensor(how: str, limit: int, tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.touch()
    os.truncate(path, 300_000_000)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path, tmp_path / "out", how],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < limit  # kB; the tensor has 300,000
    assert (tmp_path / "out/model.safetensors").stat().st_size > 150_000_000
    (tmp_path / "out/model.safetensors").unlink()
