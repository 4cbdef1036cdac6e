"""Changes the code in small ways, one at a time, and counts the changes that the tests notice.

    python scripts/mutants.py [--sample 25] [--seed 0] CODE:TESTS...

    python scripts/mutants.py converter/xtuner2llava/tensors:tests/tensors

CODE is files or folders, and TESTS the tests that must notice, the fastest first; commas separate
them. Of CODE, `--sample` mutants are drawn: another comparison, a number one more or less, `and`
for `or`, no `not`, None returned. The tests run in a copy of the current directory, until one
fails. A survivor is what no test looks at, or a change that makes no difference. (mutmut 3.8 draws
no samples, and has one set of tests for all code.)
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

CPU_SECONDS = 60
OTHER = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What `node` becomes, one change each."""

    def changed(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    match node:
        case ast.Compare(ops=ops):
            for n, op in enumerate(ops):
                yield changed(ops=[*ops[:n], OTHER[type(op)](), *ops[n + 1 :]])
        case ast.BoolOp(op=op):
            yield changed(op=OTHER[type(op)]())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            yield from (changed(value=value + 1), changed(value=value - 1))
        case ast.Return(value=value) if value and ast.unparse(value) != "None":
            yield changed(value=None)


def mutants(path: Path) -> Iterator[tuple[str, bytes]]:
    """What each mutant of a file is, and its text.

    Annotations, f-strings and assertions, which are for mypy, stay as they are.
    """
    text = path.read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        for new in variants(node):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = ast.unparse(new)
            before = " ".join(text[start:end].decode().split())
            what = f"{path}:{node.lineno}: {before} -> {after}"
            yield what, text[:start] + after.encode() + text[end:]
        pending += [
            child
            for name, value in ast.iter_fields(node)
            if name not in ("annotation", "returns")
            for child in (value if isinstance(value, list) else [value])
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Assert)
        ]


def outcome(tests: list[str]) -> str:
    """What becomes of the mutant that the current directory has: SURVIVED, killed or timeout."""
    # An absolute path, for programs that tests start in other folders.
    path = str(Path("converter").absolute())
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *tests]
    limit = partial(resource.setrlimit, resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    options: Any = {"env": environment, "preexec_fn": limit, "timeout": 10 * CPU_SECONDS}
    try:
        status = subprocess.run(command, capture_output=True, **options).returncode
    except subprocess.TimeoutExpired:
        return "timeout"
    return "killed" if status > 0 else "timeout" if status else "SURVIVED"


def run(code: str, tests: list[str], chosen: random.Random, sample: int) -> None:
    if outcome(tests) != "SURVIVED":
        sys.exit(f"{' '.join(tests)}: fail without a mutant, or take {CPU_SECONDS} s")
    paths = [Path(name) for name in code.split(",")]
    files = [f for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]
    found = [(path, *mutant) for path in files for mutant in mutants(path)]
    drawn = chosen.sample(found, min(sample, len(found)))
    killed = 0
    for path, what, text in drawn:
        original = path.read_bytes()
        for content in (text, original):
            path.write_bytes(content)
            # It would be taken for the new file, if that has the same size and second.
            Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
            if content is text:
                found_out = outcome(tests)
                killed += found_out != "SURVIVED"
                print(f"{found_out:<8} {what}", flush=True)
    print(f"{code}: {killed} of {len(drawn)} killed, drawn from {len(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("work", nargs="+", metavar="CODE:TESTS")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "repository"
        shutil.copytree(".", tree, ignore=shutil.ignore_patterns(".git", ".venv*", ".*_cache"))
        os.chdir(tree)
        for work in given.work:
            code, _, tests = work.partition(":")
            chosen = random.Random(given.seed)  # noqa: S311 - not for secrets
            run(code, tests.split(","), chosen, given.sample)


if __name__ == "__main__":
    main()
