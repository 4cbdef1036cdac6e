"""The wheel, the editable install, and what starting the program costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mappings").rglob("*.*")}
NAMES = {
    Path(path).stem for path in SHIPPED if re.match(r"mappings/(families|formats)/.*\.yaml", path)
}


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    subprocess.run([*command, *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a package index."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that has the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


def run_python(code: str, *, path: Path | None, cwd: Path) -> str:
    """What `code` prints, with `path` before all other folders of packages, and run in `cwd`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=cwd,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def test_the_wheel_carries_code_mappings_and_the_typing_marker(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "converter"
    kinds = ("*.py", "*.jinja")
    code = {p.relative_to(package).as_posix() for kind in kinds for p in package.rglob(kind)}
    assert names == code | {f"xtuner2llava/{path}" for path in SHIPPED} | {"xtuner2llava/py.typed"}


def test_the_wheel_brings_the_licence(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    (text,) = installed.glob("xtuner2llava-*.dist-info/licenses/LICENSE")
    assert text.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_dependencies_are_the_declared_few(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    requirements = distribution.requires
    assert requirements is not None
    always = [text for text in requirements if "extra ==" not in text]
    names = [re.split(r"[^\w-]", text)[0].lower().replace("_", "-") for text in always]
    assert sorted(names) == [
        "blake3",
        "click",
        "huggingface-hub",
        "isal",
        "jinja2",
        "pyyaml",
        "safetensors",
        "torch",
        "tqdm",
        "transformers",
    ]


LIST = """
import xtuner2llava
print(xtuner2llava.__file__, flush=True)
from xtuner2llava.cli.commands import main
main(["mappings", "list", "--json"])
"""


def test_the_installed_wheel_finds_its_mappings(installed: Path, tmp_path: Path) -> None:
    file, listing = run_python(LIST, path=installed, cwd=tmp_path).split("\n", 1)
    assert Path(file).is_relative_to(installed)
    assert {entry["name"] for entry in json.loads(listing)} == NAMES


def test_the_checkout_finds_its_mappings_from_anywhere(tmp_path: Path) -> None:
    file, listing = run_python(LIST, path=None, cwd=tmp_path).split("\n", 1)
    assert Path(file).is_relative_to(ROOT / "converter")
    assert {entry["name"] for entry in json.loads(listing)} == NAMES
    assert {"llama", "qwen", "qwen2", "llava"} <= NAMES


COMMAND_LINE = """
import contextlib, io, sys
from xtuner2llava.cli.commands import main
status = None
try:
    with contextlib.redirect_stdout(io.StringIO()):
        main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status or 0, *sorted({"torch", "transformers"} & set(sys.modules)))
"""
BASES = ["--llm", "bases/llm_qwen2", "--vision", "bases/vision_clip"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["mappings", "list"],
        ["inspect", "qwen2_d_lora_vislora/iter_2.pth", *BASES],
        ["plan", "qwen2_d_lora_vislora/iter_2.pth", *BASES],
    ],
    ids=lambda arguments: arguments[0],
)
def test_only_computing_imports_torch(checkpoints: Path, arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, *arguments],
        cwd=checkpoints,
        check=True,
        capture_output=True,
        text=True,
    )
    assert (run.stdout, run.stderr) == ("0\n", "")
