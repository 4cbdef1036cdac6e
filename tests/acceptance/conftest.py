from __future__ import annotations

from pathlib import Path

import pytest

from acceptance.environments import environment


@pytest.fixture(scope="session")
def llava_python() -> Path:
    return environment("llava")
