"""What four users type in a day with the tool, and what they must see: `days/`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from examples import Example, examples, mismatch

DAYS = sorted((Path(__file__).parent / "days").glob("*.md"))


@pytest.fixture
def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("day", DAYS, ids=lambda day: day.stem)
def test_a_day(day: Path, environment: dict[str, str], tmp_path: Path) -> None:
    for example in examples(day):
        assert mismatch(example, tmp_path, environment) is None


def test_another_output_is_seen(environment: dict[str, str], tmp_path: Path) -> None:
    assert len(DAYS) == 4
    assert mismatch(Example("console", "echo one", "one\n"), tmp_path, environment) is None
    assert mismatch(Example("console", "echo one", "two\n"), tmp_path, environment) is not None
    assert mismatch(Example("console", "false"), tmp_path, environment) is not None
