"""Full disks, read-only targets, inputs that change, Ctrl-C and kills, as a user meets them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reference.cases import CASES
from xtuner2llava import CorruptFileError, OutputError, convert
from xtuner2llava.writing import writer
from xtuner2llava.writing.shards import Shard

CASE = "qwen2_e_full_fullvis"
# Far more than anything here takes on a busy machine: what takes longer never ends.
HANG_SECONDS = 300
SCRIPTS = Path(__file__).parents[2] / "scripts"

Convert = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def options(checkpoints: Path) -> dict[str, object]:
    return CASES[CASE].options(checkpoints)


@pytest.fixture
def arguments(checkpoints: Path) -> list[str]:
    """Options of `convert` for several shards of about 100 kB each, a copy without torch."""
    case = CASES[CASE]
    found = ["--llm", checkpoints / case.llm, "--vision", checkpoints / case.vision,
             "--vision-tower-name", "openai/x", "--max-shard-size", "100KB"]  # fmt: skip
    return [str(checkpoints / CASE / "iter_2.pth"), *map(str, found)]


def command(checkpoint: str, *options: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "xtuner2llava", "convert", checkpoint, str(out), *options]


# A user namespace may mount what only it sees. $0 is the folder, $1 the size, the rest is run.
IN_TMPFS = 'mount -t tmpfs -o "size=$1" none "$0" && shift && cd "$0" && exec "$@"'


def can_mount() -> bool:
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="no user namespaces here")


def in_tmpfs(folder: Path, size: str, script: str, *arguments: str) -> str:
    """What `script`, run by a shell in a file system of that size, prints."""
    shell = ["unshare", "-rm", "sh", "-c", IN_TMPFS, str(folder), size, "sh", "-c", script]
    done = subprocess.run(
        [*shell, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.slow
@needs_mount
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    arguments: list[str], tmp_path: Path
) -> None:
    script = '"$0" "$@"; echo "status $?"; ls -A; df --output=avail -B1 . | tail -1'
    text = in_tmpfs(tmp_path, "256k", script, *command(*arguments, out=Path("llava-out")))
    assert "bytes are still to be written, the disk has" in text
    assert "Free " in text and "choose an OUT on another disk" in text
    assert "status 1" in text
    assert text.splitlines()[-1].strip() == "262144"  # All free again, and nothing left.


@pytest.mark.slow
@needs_mount
def test_a_disk_that_fills_up_meanwhile(arguments: list[str], tmp_path: Path) -> None:
    """Somebody else takes the space after it was checked; when it is free again, it goes on."""
    fill = "import shutil, xtuner2llava.writing.folder as f; f.OutputFolder.require_space = print; "
    run = "from xtuner2llava.cli.commands import main; main()"
    unchecked = [sys.executable, "-c", fill + run, *command(*arguments, out=Path("llava-out"))[3:]]
    script = (
        f"head -c {300_000} /dev/zero > others; "
        '"$0" "$@" --jobs 1; echo "status $?"; ls -A; rm others; '
        '"$0" "$@" -q; echo "status $?"; ls -A; ls llava-out'
    )
    text = in_tmpfs(tmp_path, "900k", script, *unchecked)
    first, second = text.split("status 1\n")
    assert "cannot be written (No space left on device)" in first
    assert "Free space on that disk, or choose an OUT on another one." in first
    assert "run the same command again to go on from there" in first
    assert second.splitlines()[:2] == ["llava-out.partial", "others"]
    assert "status 0\nllava-out\n" in second
    assert "model.safetensors.index.json" in second
    assert "Traceback" not in text


@pytest.mark.slow
@needs_mount
def test_a_file_system_that_is_mounted_read_only(arguments: list[str], tmp_path: Path) -> None:
    script = 'mount -o remount,ro . ; "$0" "$@"; echo "status $?"; ls -A'
    text = in_tmpfs(tmp_path, "10m", script, *command(*arguments, out=tmp_path / "llava-out"))
    assert "cannot be made (Read-only file system)" in text
    assert "choose an OUT on another one" in text
    assert "status 1" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        command(*arguments, out=tmp_path / "llava-out"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be written (File too large)" in done.stderr
    assert "--max-shard-size" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "llava-out").exists()


@pytest.mark.parametrize("where", ["out", "llm/out", "."])
def test_out_within_the_input_leaves_the_input_as_it_is(
    where: str, checkpoints: Path, options: dict[str, object], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints / CASE / "iter_2_xtuner", tmp_path / "iter_2_xtuner")
    home = tmp_path / "iter_2_xtuner"
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    options.pop("llm")
    if where == ".":
        for overwrite in (False, True):
            with pytest.raises(OutputError):
                convert(home, home, overwrite=overwrite, **options)
    else:
        convert(home, home / where, **options)
        assert (home / where / "config.json").is_file()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("change", ["mtime", "size", "gone"])
def test_an_input_that_changes_between_plan_and_copy_is_told(
    change: str,
    checkpoints: Path,
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "iter_2.pth"
    shutil.copy(checkpoints / CASE / "iter_2.pth", path)
    create = writer._Writing._create

    def meanwhile(self: writer._Writing, shard: Shard) -> object:
        if change == "mtime":
            os.utime(path, ns=(0, 0))
        elif change == "size":
            os.truncate(path, path.stat().st_size - 4096)
        else:
            path.unlink(missing_ok=True)
        return create(self, shard)

    monkeypatch.setattr(writer._Writing, "_create", meanwhile)
    expected = "cannot be opened" if change == "gone" else "the file changed while it was read"
    with pytest.raises(CorruptFileError, match=expected):
        convert(path, tmp_path / "out", dtype="keep", **options)
    assert not (tmp_path / "out").exists()


def test_resume_is_refused_when_a_base_model_was_exchanged(
    checkpoints: Path, tmp_path: Path
) -> None:
    """Its header is the same, so only the time of the file tells."""
    case = CASES["qwen2_b_full_frozenvis"]
    vision = tmp_path / "vision"
    shutil.copytree(checkpoints / case.vision, vision)
    options = {"llm": checkpoints / case.llm, "vision": vision, "vision_tower_name": "openai/x",
               "dtype": "keep", "max_shard_size": "100KB", "jobs": 1}  # fmt: skip
    checkpoint = checkpoints / "qwen2_b_full_frozenvis" / "iter_2.pth"

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="same command again"):
        convert(checkpoint, tmp_path / "out", on_progress=stop, **options)
    weights = vision / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + bytes(4))
    with pytest.raises(
        OutputError, match=r"other options: the input model\.safetensors is not what"
    ):
        convert(checkpoint, tmp_path / "out", **options)


def test_a_folder_beside_out_is_not_taken_for_ours(
    checkpoints: Path, options: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "mine").touch()
    convert(checkpoints / CASE / "iter_2.pth", tmp_path / "out", dtype="keep", **options)
    assert (tmp_path / "out.replaced" / "mine").exists()
    (tmp_path / "other.partial.state").mkdir()
    (tmp_path / "other.partial.state" / "mine").touch()
    with pytest.raises(OutputError, match="is in the way"):
        convert(checkpoints / CASE / "iter_2.pth", tmp_path / "other", dtype="keep", **options)
    assert (tmp_path / "other.partial.state" / "mine").exists()


# Kills itself where OUT.partial has lost its state and is not yet OUT.
KILL_WHILE_PUBLISHING = """
import os, signal, sys
from xtuner2llava.writing import folder
real = folder.flush_directory
def flush(path):
    if not (path / ".xtuner2llava").exists() and path.name.endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
folder.flush_directory = flush
from xtuner2llava.cli.commands import main
main()
"""


@pytest.mark.slow
def test_a_kill_while_out_appears_is_resumed(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "llava-out"
    whole = command(*arguments, out=out)
    done = subprocess.run(
        [sys.executable, "-c", KILL_WHILE_PUBLISHING, *whole[3:]], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["llava-out.partial", "llava-out.partial.state"]
    again = subprocess.run([*whole, "--json"], check=True, capture_output=True)
    assert len(json.loads(again.stdout)["resumed"]) > 3  # Nothing was written twice.
    assert [path.name for path in tmp_path.iterdir()] == ["llava-out"]


# Stops for as long as it is not interrupted, once a shard is finished.
SLOW = """
import sys, time
from xtuner2llava.writing import writer
from xtuner2llava.writing.shards import Shard
create = writer._Writing._create
def slow(self, shard):
    print("copying", flush=True)
    while "model-00001-of-" + shard.filename[-17:] in self._folder.state.finished():
        self._work.check()
        time.sleep(0.01)
    return create(self, shard)
writer._Writing._create = slow
from xtuner2llava.cli.commands import main
main()
"""


@pytest.fixture
def start(interrupts: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script with arguments, whose output can be read; none is left when a test fails."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with process:
            process.kill()


@pytest.mark.parametrize("kept", [True, False])
def test_interrupts_are_answered_and_say_how_to_go_on(
    kept: bool, arguments: list[str], tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    out = tmp_path / "llava-out"
    options = ["--jobs", "1", "--dtype", "keep"]
    process = start(SLOW, *command(*arguments, out=out)[3:], *options)
    assert process.stdout is not None
    for _ in range(2 if kept else 1):
        assert process.stdout.readline() == "copying\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=HANG_SECONDS)
    lines = told[told.index("\nStopping;") :].strip().splitlines()  # After those of the log.
    assert lines[0] == "Stopping; Ctrl-C again ends at once."
    assert process.returncode == 130
    assert not out.exists()
    partial = tmp_path / "llava-out.partial"
    if not kept and not partial.exists():
        assert lines[1:] == ["Interrupted."]
        return
    assert "What is done stays in" in lines[1] and "run the same command again" in lines[1]
    subprocess.run([*command(*arguments, out=out), *options, "-q"], check=True)
    assert out.is_dir() and not partial.exists()


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(
    arguments: list[str], tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    stuck = SLOW.replace("self._work.check()", "pass")
    process = start(stuck, *command(*arguments, out=tmp_path / "out")[3:], "--jobs", "1")
    assert process.stdout is not None and process.stderr is not None
    for _ in range(2):
        assert process.stdout.readline() == "copying\n"
    process.send_signal(signal.SIGINT)
    while process.stderr.readline() != "\n":
        pass  # The log, a line for each stage that ended.
    assert process.stderr.readline() == "Stopping; Ctrl-C again ends at once.\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == -signal.SIGINT
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_few_kills() -> None:
    """The whole of it is `scripts/kill_test.py`: 200 kills of conversions of 300 MB."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / "kill_test.py", "--kills", "5", "--interrupts", "0",
         "--size", "3MB", "--modes", "0", "4"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["kills"], result["wrong"]) == (5, 0)
