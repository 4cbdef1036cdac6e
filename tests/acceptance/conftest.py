"""The environments with the official LLaVA and the transformers that it pins, and with the oldest
transformers that the format hf is for.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def environment(name: str) -> Path:
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


@pytest.fixture(scope="session")
def llava_python() -> Path:
    return environment("llava")


@pytest.fixture(scope="session")
def oldest_python() -> Path:
    return environment("transformers-4.45")
