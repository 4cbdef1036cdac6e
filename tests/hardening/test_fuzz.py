"""What the fuzzers found stays found: kept inputs, and some thousand new ones, in every run.

`scripts/fuzz` searches for more. Everything happens in a process that is ended by the first program
started, connection made, pickle loaded, or file opened for writing outside its folder.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "fuzz_corpus"
MUTATIONS = 60
MEMORY = 6 << 30  # bytes of addresses, of which importing torch takes most


def run(
    *arguments: object, module: str = "fuzz_targets.replay"
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_kept_and_new_inputs_raise_only_our_errors() -> None:
    done = run(CORPUS, MUTATIONS)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    folders = {path.name for path in CORPUS.iterdir() if path.is_dir()}
    assert folders == set(result)
    for name, counts in result.items():
        assert counts["kept"] >= 1, name
        # Were all refused, or none, the inputs would reach nothing.
        assert 0 < counts["accepted"] < counts["inputs"], name


PROOF = """
import subprocess, sys
from pathlib import Path

import pytest
from fuzz_targets.guard import forbid_execution
forbid_execution(Path(sys.argv[1]))
{}
"""


def test_the_guard_ends_what_it_forbids(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "scripts"), *filter(None, sys.path)])
    for code, status in (
        ("import os; os.system('true')", 86),
        ("subprocess.run(['true'])", 86),
        ("import pickle; pickle.loads(b'cos\\nsystem\\n.')", 86),
        ("open(sys.argv[1] + '.out', 'w')", 86),
        ("open(sys.argv[1] + '/in', 'w')", 0),
    ):
        done = subprocess.run(
            [sys.executable, "-c", PROOF.format(code), tmp_path],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            check=False,
        )
        assert done.returncode == status, code
