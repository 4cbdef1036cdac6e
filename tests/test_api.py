"""The names of the package, which are imported when they are asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xtuner2llava

FUNCTIONS = ("convert", "inspect", "plan", "push", "verify")


def run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ran.stdout


def test_all_names_are_there_also_after_every_module_is_imported() -> None:
    """No module takes the place of a function of its name."""
    code = (
        "import importlib, pkgutil, xtuner2llava as package\n"
        "for module in pkgutil.walk_packages(package.__path__, 'xtuner2llava.'):\n"
        "    module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "print([name for name in package.__all__ if not callable(getattr(package, name))])\n"
        "print(package.__version__, *package.__all__)\n"
    )
    wrong, names = run(code).splitlines()
    assert wrong == "[]"
    assert names.split()[1:] == xtuner2llava.__all__
    assert set(FUNCTIONS) < set(xtuner2llava.__all__) < set(dir(xtuner2llava))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_can_be_imported_first(name: str) -> None:
    assert run(f"from xtuner2llava import {name}; print({name}.__name__)").strip() == name


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, xtuner2llava.cli.commands; print(*(m for m in sys.modules if '.' not in m))"
    loaded = set(run(code).split())
    assert "click" in loaded
    assert not loaded & {"torch", "transformers", "huggingface_hub", "numpy", "yaml", "distributed"}
    code = "import sys, xtuner2llava.conversion; print(*sys.modules)"
    loaded = set(run(code).split())
    assert "xtuner2llava.planning" in loaded
    assert not loaded & {"torch", "xtuner2llava.hub.push", "xtuner2llava.verification"}


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'converter'"):
        xtuner2llava.converter  # noqa: B018


CALLS: dict[str, Callable[[str, Path], object]] = {
    "plan": lambda path, ok: xtuner2llava.plan(path),
    "inspect": lambda path, ok: xtuner2llava.inspect(path),
    "convert": lambda path, ok: xtuner2llava.convert(path, "out"),
    "out": lambda path, ok: xtuner2llava.convert(ok, path, **bases(ok)),
    "verify": lambda path, ok: xtuner2llava.verify(path),
    "push": lambda path, ok: xtuner2llava.push(path, "ann/llava"),
    "llm": lambda path, ok: xtuner2llava.plan(ok, llm=path),
    "tokenizer": lambda path, ok: xtuner2llava.plan(ok, **bases(ok), tokenizer=path),
    "mapping": lambda path, ok: xtuner2llava.plan(ok, **bases(ok), mapping=path),
    "xtuner_config": lambda path, ok: xtuner2llava.plan(ok, **bases(ok), xtuner_config=path),
}


def bases(checkpoint: Path) -> dict[str, Any]:
    folder = checkpoint.parents[1] / "bases"
    return {
        "llm": folder / "llm_qwen2",
        "vision": folder / "vision_clip",
        "vision_tower_name": "openai/clip",
    }


@pytest.mark.parametrize("kind", ["long", "others", "loop", "nul", "below a file"])
@pytest.mark.parametrize("name", CALLS)
def test_a_path_that_the_system_refuses_is_an_error_of_ours(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    ok, stat, call = checkpoints / "qwen2_e_full_fullvis/iter_2.pth", Path.stat, CALLS[name]
    (tmp_path / "loop").symlink_to("loop")
    paths = {"long": "a" * 300, "nul": "a\0b", "below a file": f"{ok}/x"}
    path = paths.get(kind, str(tmp_path / kind))

    def refuse(self: Path, **options: Any) -> os.stat_result:
        if str(self).startswith(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, **options)

    if kind == "others":  # Not for the user who runs these tests, who may be root.
        monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(xtuner2llava.ConversionError) as error:
        call(path, ok)
    assert all(fault.what for fault in error.value.faults)
    assert error.value.faults[0].where or "there is no" in str(error.value)


def test_what_a_callback_raises_stays_what_it_is(checkpoints: Path, tmp_path: Path) -> None:
    def end(plan: object) -> None:
        raise TimeoutError("too late")

    ok = checkpoints / "qwen2_e_full_fullvis/iter_2.pth"
    with pytest.raises(TimeoutError, match="too late"):
        xtuner2llava.convert(ok, tmp_path / "llava-qwen", on_plan=end, **bases(ok))
