"""The environment with the official LLaVA, and the transformers that it pins."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llava_python() -> Path:
    made = subprocess.run(
        [Path(__file__).parent / "environment"], stdout=subprocess.PIPE, text=True, check=False
    )
    if made.returncode == 77:
        pytest.skip("no Python from 3.10 to 3.12, which the transformers that LLaVA pins need")
    assert made.returncode == 0, "the environment could not be made, see above"
    return Path(made.stdout.strip())
