"""`--low-disk`: shards are sent and removed one by one, and one commit makes all of it visible."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from command import run
from hub_server import HubServer, Repo, content

REPO = "ann/llava-qwen-tiny"
JOBS = 2


@pytest.fixture(scope="module")
def local(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion without a Hub; ten shards or more."""
    from xtuner2llava import convert

    out = tmp_path_factory.mktemp("local") / "llava-qwen-tiny"
    convert(checkpoints / CHECKPOINT, out, **bases(checkpoints), **OPTIONS)
    assert len(list(out.glob("*.safetensors"))) >= 10
    return out


CHECKPOINT = "qwen2_d_lora_vislora/iter_2.pth"
OPTIONS = {"vision_tower_name": "openai/clip-tiny", "max_shard_size": "60KB"}


def bases(checkpoints: Path) -> dict[str, str]:
    return {"llm": f"{checkpoints}/bases/llm_qwen2", "vision": f"{checkpoints}/bases/vision_clip"}


def command(checkpoints: Path, out: Path, *more: object) -> list[str]:
    options = {**bases(checkpoints), **OPTIONS}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    convert = [sys.executable, "-m", "xtuner2llava", "convert", str(checkpoints / CHECKPOINT)]
    push = ["--push-to-hub", REPO, "--low-disk", "--jobs", str(JOBS), "-q"]
    return [*convert, str(out), *words, *push, *map(str, more)]


def here(hub: HubServer, command: list[str]) -> subprocess.CompletedProcess[str]:
    """What `command` does in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        return run(*command[3:])


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    return {**os.environ, **hub.environment(home, hub.token)}


def shard_sizes(folder: Path) -> list[int]:
    """Bytes of the shards on disk, however far they are written."""
    sizes = []
    for path in folder.glob("*.safetensors"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # Sent and removed while we looked.
    return sizes


class Samples:
    """What lies in OUT.partial, looked at before each upload and every few milliseconds."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stop = folder, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.count = self.files = self.nbytes = 0

    def take(self) -> None:
        sizes = shard_sizes(self._folder)
        self.count += 1
        self.files, self.nbytes = max(self.files, len(sizes)), max(self.nbytes, sum(sizes))

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.take()

    def __enter__(self) -> Samples:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_ten_shards_never_lie_on_disk_together(
    hub: HubServer, checkpoints: Path, local: Path, tmp_path: Path
) -> None:
    out = tmp_path / "llava-qwen-tiny"
    seen: list[dict[str, bytes]] = []
    with Samples(tmp_path / "llava-qwen-tiny.partial") as samples:

        def before_put() -> None:
            samples.take()
            seen.append(hub.repos[REPO].content())

        hub.before_put = before_put
        assert here(hub, command(checkpoints, out)).returncode == 0
    shards = shard_sizes(local)
    assert len(hub.log("PUT")) == len(seen) == len(shards)
    assert samples.count > 2 * len(shards)
    assert samples.files == 1
    assert 0 < samples.nbytes <= max(shards)
    # Nothing was visible before the one commit, and then all of it was.
    assert all(files == {} for files in seen)
    repo = hub.repos[REPO]
    assert repo.content() == content(local)
    assert len(repo.messages) == 2
    assert not list(tmp_path.glob("llava*"))


def test_the_samples_see_ten_shards_where_they_lie(checkpoints: Path, tmp_path: Path) -> None:
    """So the test before could fail."""
    from xtuner2llava import convert

    out = tmp_path / "llava-qwen-tiny"
    with Samples(tmp_path / "llava-qwen-tiny.partial") as samples:
        # The last of the callbacks comes when all is written and verified.
        convert(
            checkpoints / CHECKPOINT,
            out,
            **bases(checkpoints),
            **OPTIONS,
            on_progress=lambda stage, done, total: samples.take(),
        )
    assert samples.files >= 10


@pytest.mark.slow
def test_killed_inside_a_shard_it_goes_on_with_what_is_missing(
    hub: HubServer, checkpoints: Path, local: Path, tmp_path: Path
) -> None:
    repo = hub.add(REPO)
    repo.upload({"figure.png": b"png"})
    before = dict(repo.branches)
    out = tmp_path / "llava-qwen-tiny"
    held = hub.fail("PUT /storage", hold=True, skip=4)
    run = command(checkpoints, out)
    others = hub.connections  # The client of this process keeps some open.
    with subprocess.Popen(run, env=environment(hub, tmp_path / "home")) as process:
        while not held.held.wait(0.1):
            assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
    held.release.set()
    hub.wait_until_closed(others)  # The other job may have been sending.
    assert process.returncode == -signal.SIGKILL
    assert repo.branches == before
    assert repo.content() == {"figure.png": b"png"}
    assert not out.exists()
    assert shard_sizes(tmp_path / "llava-qwen-tiny.partial")
    sent = set(repo.objects)
    assert 4 <= len(sent) < len(shard_sizes(local))

    hub.requests.clear()
    subprocess.run(run, env=environment(hub, tmp_path / "home"), check=True)
    assert repo.content() == {**content(local), "figure.png": b"png"}
    put = {request.path.rpartition("/")[2] for request in hub.log("PUT")}
    assert put == set(repo.objects) - sent
    assert not (tmp_path / "llava-qwen-tiny.partial").exists()


@pytest.mark.slow
def test_a_failure_leaves_nothing_here_and_nothing_there(
    hub: HubServer, checkpoints: Path, local: Path, tmp_path: Path
) -> None:
    hub.fail("PUT /storage", status=400, skip=3)
    out = tmp_path / "llava-qwen-tiny"
    env = environment(hub, tmp_path / "home")
    done = subprocess.run(
        command(checkpoints, out), env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the Hub answered 400" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repos[REPO].content() == {}
    assert not list(tmp_path.glob("llava*"))

    subprocess.run(command(checkpoints, out), env=env, check=True)
    assert hub.repos[REPO].content() == content(local)


def test_nothing_is_written_for_somebody_who_may_not_publish(
    hub: HubServer, checkpoints: Path, tmp_path: Path
) -> None:
    hub.users[hub.token] = "ben"
    out = tmp_path / "llava-qwen-tiny"
    done = here(hub, command(checkpoints, out))
    assert done.returncode == 1
    assert "403" in done.stderr
    assert not list(tmp_path.glob("llava*"))
    assert hub.log("PUT") == []


@pytest.mark.parametrize("flag", ["--low-disk", "--private", "--revision=v1"])
def test_publishing_needs_a_repository(checkpoints: Path, tmp_path: Path, flag: str) -> None:
    done = run("convert", CHECKPOINT, tmp_path / "out", flag, cwd=checkpoints)
    assert done.returncode == 2
    assert f"{flag.partition('=')[0]} without a repository" in done.stderr
    assert "--push-to-hub" in done.stderr


@pytest.mark.slow
def test_an_upload_in_another_process_finds_all_of_it(
    hub: HubServer, checkpoints: Path, local: Path, tmp_path: Path
) -> None:
    """What `--low-disk` published, `push` of the local folder finds there."""
    repo = Repo(REPO)
    repo.upload(content(local))
    hub.repos[REPO] = repo
    out = tmp_path / "llava-qwen-tiny"
    done = subprocess.run(
        [*command(checkpoints, out), "--json"],
        env=environment(hub, tmp_path / "home"),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    report = json.loads(done.stdout)
    assert report["out"] is None
    assert report["files"] == {name: len(data) for name, data in content(local).items()}
    assert report["pushed"]["commit"] == repo.branches["main"]
    assert hub.log("PUT") == hub.log("POST", "/commit/") == []
