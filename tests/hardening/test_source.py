"""Nothing in our own source can run what a file says: read off the syntax tree of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

SOURCE = Path(__file__).parents[2] / "converter" / "xtuner2llava"

# Whole modules whose purpose is to run or import something, and functions of others.
FORBIDDEN_MODULES = frozenset(
    "pickle _pickle cPickle dill cloudpickle joblib marshal shelve runpy code codeop pty ctypes "
    "imp pkgutil multiprocessing torch.jit torch.hub torch.package "
    "torch.utils.cpp_extension".split()
)
FORBIDDEN = frozenset(
    "eval exec compile __import__ breakpoint builtins.eval builtins.exec builtins.compile "
    "builtins.__import__ importlib.import_module importlib.util importlib.machinery "
    "os.system os.popen os.fork os.posix_spawn os.posix_spawnp os.startfile "
    "yaml.load yaml.load_all yaml.unsafe_load yaml.unsafe_load_all yaml.full_load "
    "yaml.full_load_all yaml.Loader yaml.UnsafeLoader yaml.FullLoader yaml.CLoader "
    "torch.classes torch.ops.load_library numpy.memmap pickletools.dis pickletools.optimize".split()
)
FORBIDDEN_STARTS = ("os.exec", "os.spawn", "subprocess.")
# What is allowed all the same: where, what, and why.
ALLOWED = {
    # Its own modules, by names of a table of its own.
    ("__init__.py", "importlib.import_module"),
    # Only `verify --logits --trust-remote-code` asks for it, on the user's word.
    ("verification/logits/trained.py", "trust_remote_code=True"),
    ("verification/logits/trained.py", "trust_remote_code: True"),
}


def findings(text: str) -> list[str]:
    """Everything in the module `text` that is not allowed: `line: what`."""
    tree = ast.parse(text)
    names = _imported(tree)
    found = set()
    for node in ast.walk(tree):
        for what in _uses(node, names):
            found.add((getattr(node, "lineno", 0), what))
    return [f"{line}: {what}" for line, what in sorted(found)]


def _imported(tree: ast.Module) -> dict[str, str]:
    """The full name behind each name that the module imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def _uses(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _is_forbidden(alias.name))
    elif isinstance(node, ast.ImportFrom):
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in full if _is_forbidden(name))
    elif isinstance(node, ast.Name | ast.Attribute):
        name = _full_name(node, names)
        # A variable may be called `code`; the module is found where it is imported.
        if ("." in name and _is_forbidden(name)) or name in FORBIDDEN:
            yield name
    elif isinstance(node, ast.Call):
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = _full_name(node.func, names)
        if name == "torch.load" and not _is_true(given.get("weights_only")):
            yield "torch.load without weights_only=True"
        if name in ("numpy.load", "np.load") and not _is_false(given.get("allow_pickle")):
            yield "numpy.load without allow_pickle=False"
        if name == "getattr" and len(node.args) > 1 and _full_name(node.args[0], names) in (
            "os", "builtins", "subprocess", "__builtins__"
        ):  # fmt: skip
            yield "getattr of a module that can run programs"
        if _is_true(given.get("trust_remote_code")):
            yield "trust_remote_code=True"
        if _is_true(given.get("shell")):
            yield "shell=True"
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
            if named and _is_true(value):
                yield "trust_remote_code: True"
    elif isinstance(node, ast.FunctionDef):
        arguments = node.args
        last = (*arguments.posonlyargs, *arguments.args)[-len(arguments.defaults) or None :]
        for argument, default in (
            *zip(last, arguments.defaults, strict=False),
            *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
        ):
            if argument.arg == "trust_remote_code" and _is_true(default):
                yield "trust_remote_code is true by default"


def _is_forbidden(name: str) -> bool:
    modules = name.split(".")
    return (
        name in FORBIDDEN
        or name.startswith(FORBIDDEN_STARTS)
        or any(".".join(modules[: i + 1]) in FORBIDDEN_MODULES for i in range(len(modules)))
    )


def _is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_our_source_runs_nothing() -> None:
    paths = sorted(SOURCE.rglob("*.py"))
    assert len(paths) > 80
    found = []
    for path in paths:
        relative = path.relative_to(SOURCE).as_posix()
        for finding in findings(path.read_text(encoding="utf-8")):
            what = finding.partition(": ")[2]
            if not {(relative, what), (relative, what.partition(".")[0])} & ALLOWED:
                found.append(f"{relative}:{finding}")
    assert found == []


def test_the_exceptions_are_still_needed() -> None:
    for relative, what in ALLOWED:
        found = findings((SOURCE / relative).read_text(encoding="utf-8"))
        assert any(f": {what}" in finding for finding in found)


def test_the_code_of_a_model_runs_only_on_the_users_word() -> None:
    from xtuner2llava.cli.commands import main

    asking = {
        name: option
        for name, command in main.commands.items()
        for option in command.params
        if option.name == "trust_remote_code"
    }
    assert list(asking) == ["verify"]
    assert not asking["verify"].get_default(click.Context(main))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "from torch import load as read\nread(f)",
        "import pickle",
        "import _pickle as harmless",
        "from pickle import Unpickler",
        "from pickle import loads as parse",
        "eval('1')",
        "x = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import builtins\nbuiltins.eval('1')",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "import os\nos.system('x')",
        "import os as o\no.popen('x')",
        "from os import system",
        "import os\nos.execv('x', [])",
        "import os\ngetattr(os, 'sys' + 'tem')('x')",
        "import subprocess\nsubprocess.Popen(['x'])",
        "from subprocess import run",
        "import yaml\nyaml.load(f, yaml.SafeLoader)",
        "import yaml\nyaml.load_all(f, Loader=yaml.Loader)",
        "import marshal",
        "import shelve",
        "import runpy",
        "import ctypes",
        "import torch.jit",
        "import torch\ntorch.hub.load('x', 'y')",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "def load(path, trust_remote_code=True): ...",
        "def load(path, *, trust_remote_code=True): ...",
    ],
)
def test_the_proof_can_fail(text: str) -> None:
    assert len(findings(text)) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import re\nre.compile('x')",
        "model.eval()",
        "import os\nos.fsync(1)",
        "import yaml\nyaml.safe_load(f)",
        "import pickletools\npickletools.genops(data)",
        "def load(path, *, trust_remote_code=False): ...",
        "text = 'eval(exec(pickle.loads))'",
    ],
)
def test_what_is_harmless_is_not_found(text: str) -> None:
    assert findings(text) == []
