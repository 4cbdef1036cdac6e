"""The names of the package, which are imported when they are asked for."""

from __future__ import annotations

import subprocess
import sys

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
