"""Fixtures that more than one test module needs: the real checkpoints, and folders made of them."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from reference.cases import Converted
    from reference.measured import Measured
    from reference.seen import Seen

# Workers share the cores, so one thread each is fastest. Read when torch is first imported, here
# and in programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# A machine that is busy fails no test: how long an example takes is not what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Test modules import `reference.…` from here; `--import-mode=importlib` adds no paths itself.
sys.path.insert(0, str(Path(__file__).parent))

from hub_server import HubServer  # noqa: E402

# The Hub of all tests, and of programs that they start, is one on loopback. huggingface_hub reads
# where it is when it is first imported.
LOOPBACK = HubServer()
HOME = tempfile.TemporaryDirectory()
os.environ.update(LOOPBACK.environment(Path(HOME.name)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-matrix",
        type=Path,
        metavar="FILE",
        help="run only the tests behind docs/compatibility.md, and append what they find to FILE",
    )
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="append to FILE what other programs did with converted folders",
    )
    parser.addoption(
        "--llava-next",
        type=Path,
        metavar="FOLDER",
        help="a checkout of LLaVA-NeXT, which is not on the package index; consumers only",
    )
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/golden.json anew, of the tests that run",
    )
    parser.addoption(
        "--golden-files",
        type=lambda name: Path(name).absolute(),
        metavar="DIR",
        help="write the files that tests/golden/golden.json has the hashes of into DIR",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--record-matrix") is None:
        return
    rest = [item for item in items if "measured" not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=rest)
    items[:] = [item for item in items if item not in rest]


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Measured:
    """Takes down what docs/compatibility.md is made of."""
    from reference.measured import Measured

    return Measured(pytestconfig.getoption("--record-matrix"))


@pytest.fixture(scope="session")
def seen(pytestconfig: pytest.Config) -> Seen:
    """Takes down what the table of programs is made of."""
    from reference.seen import Seen

    return Seen(pytestconfig.getoption("--record"))


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """Checkpoints that XTuner wrote, see its README.md. Not to be written to."""
    return Path(__file__).parent / "checkpoints"


@pytest.fixture(scope="session", autouse=True)
def loopback() -> Iterator[HubServer]:
    with LOOPBACK:
        yield LOOPBACK


@pytest.fixture
def hub(loopback: HubServer) -> HubServer:
    """The Hub without what the test before left there."""
    loopback.reset()
    return loopback


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """No test cuts the power, so none waits for the disk. Closed files are still an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """The template of the model card is compiled once, not in each of a thousand conversions."""
    from jinja2 import Environment

    compiled: dict[str, Any] = {}
    compile_now = Environment.from_string

    def from_string(self: Environment, source: Any, *rest: Any, **keywords: Any) -> Any:
        if type(self) is not Environment or rest or keywords:
            return compile_now(self, source, *rest, **keywords)
        if source not in compiled:
            compiled[source] = compile_now(self, source)
        return compiled[source]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "from_string", from_string)
        yield


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT is Ctrl-C here and in programs that are started, also where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def converted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    from reference.cases import CASES
    from xtuner2llava import convert

    made: dict[tuple[object, ...], Path] = {}

    def make(case: str, source: str = "iter_2.pth", **options: Any) -> Path:
        key = (case, source, *sorted(options.items()))
        if key not in made:
            base = CASES[case]
            out = tmp_path_factory.mktemp("converted") / f"llava-{case.replace('_', '-')}"
            given: dict[str, Any] = {
                "llm": checkpoints / base.llm,
                "vision": checkpoints / base.vision,
                "vision_tower_name": base.vision,
            }
            convert(checkpoints / case / source, out, **given | options)
            made[key] = out
        return made[key]

    return make
