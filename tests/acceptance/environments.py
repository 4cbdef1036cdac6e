"""Environments of other programs and versions, see `environment` beside this file."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


def environment(name: str) -> Path:
    """The Python of this environment; the test is skipped where it cannot be made."""
    made = subprocess.run(
        [Path(__file__).parent / "environment", name],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if made.returncode == 77:
        pytest.skip("no Python from 3.10 to 3.12, which the transformers that LLaVA pins need")
    assert made.returncode == 0, "the environment could not be made, see above"
    return Path(made.stdout.strip())


def run_llava(
    python: Path, checkpoints: Path, jobs: Sequence[Mapping[str, Any]], path: Path | None = None
) -> list[dict[str, Any]]:
    """A result for each job of `run_llava.py`, in one process, with `path` on Python's path."""
    ran = subprocess.run(
        [python, Path(__file__).with_name("run_llava.py")],
        input=json.dumps(jobs, default=str),
        capture_output=True,
        text=True,
        cwd=checkpoints,  # where `mm_vision_tower: bases/…` leads to
        env={**os.environ, "PYTHONPATH": str(path or "")},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    last = ran.stdout.splitlines()[-1]  # LLaVA-NeXT writes there when it is imported
    results: list[dict[str, Any]] = json.loads(last)
    assert len(results) == len(jobs)
    return results


def run_hf(
    python: Path | str, jobs: Sequence[Mapping[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """The version of transformers, and a result for each job of `run_hf.py`, in one process."""
    ran = subprocess.run(
        [python, Path(__file__).with_name("run_hf.py")],
        input=json.dumps(jobs, default=str),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    return found["version"], found["results"]
