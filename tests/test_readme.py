"""Every command and line of Python in README.md is run, and its output is what stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECONDS = re.compile(r"\b\d+\.\d s\b")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[tuple[str, str]]:
    """Commands without the prompt and a comment, each with the output that stands below it."""
    found = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        found.append((command.partition(" #")[0].strip(), output))
    return found


def run(command: list[str], folder: Path) -> str:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.slow
def test_console_blocks_do_what_they_show(folder: Path) -> None:
    shown = [entry for block in blocks("console") for entry in commands(block)]
    of_tool = [(command, output) for command, output in shown if not command.startswith("./")]
    assert len(of_tool) >= 3
    for command, output in of_tool:
        real = run(command.split(), folder)
        if output:
            assert SECONDS.sub("T s", real) == SECONDS.sub("T s", output), command


def test_python_blocks_run(folder: Path) -> None:
    if not (folder / "demo").exists():
        run(["xtuner2llava", "demo", "-q", "demo"], folder)
    for block in blocks("python"):
        assert run([sys.executable, "-W", "error", "-c", block], folder)


@pytest.mark.slow
def test_scripts_are_there_and_demo_runs(tmp_path: Path) -> None:
    scripts = [c for block in blocks("console") for c, _ in commands(block) if c.startswith("./")]
    assert scripts == ["./scripts/demo", "./scripts/test"]
    # This test is part of ./scripts/test; the continuous integration calls that and nothing else.
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith(("#", "set "))][-1].endswith(
        "./scripts/test --all"
    )
    done = subprocess.run(
        ["./scripts/demo", str(tmp_path / "demo")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in ("LlavaQwenForCausalLM", "verified bit for bit", "model.safetensors", "Load it"):
        assert text in done.stdout
