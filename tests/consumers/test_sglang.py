"""SGLang's loader takes every tensor of `--model-type llava`, and refuses the format hf.

SGLang itself needs a GPU; see `run_sglang.py` for what of it is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consumers.models import write_llava
from reference.cases import Converted
from reference.exchange import write_exchanged
from reference.seen import Seen

pytestmark = pytest.mark.consumers

CASES = ("qwen2_e_full_fullvis", "llama_e_full_fullvis", "phi3_e_full_fullvis")
FAMILIES = ("mistral", "internlm2")
LOADER = "0.5.23, its loader alone"


@pytest.fixture(scope="module")
def package() -> Path:
    environment = Path(__file__).with_name("environment")
    made = subprocess.run([environment, "sglang"], stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode == 77:
        pytest.skip("no Python that SGLang's package is built for")
    assert made.returncode == 0, "the package could not be installed, see above"
    return Path(made.stdout.strip())


def run(package: Path, checkpoints: Path, folders: list[Path]) -> list[dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_sglang.py")],
        input=json.dumps([str(folder) for folder in folders]),
        env={**os.environ, "PYTHONPATH": str(package)},
        cwd=checkpoints,  # where `mm_vision_tower: bases/…` leads to
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    results: list[dict[str, Any]] = json.loads(ran.stdout)
    return results


def test_it_takes_every_tensor(
    package: Path, checkpoints: Path, converted: Converted, tmp_path: Path, seen: Seen
) -> None:
    folders = [converted(case, dtype="float32", model_type="llava") for case in CASES]
    for kind in FAMILIES:
        folders.append(write_llava(tmp_path / kind, kind, checkpoints, model_type="llava"))
    exchanged = ("mlp.gate_proj.weight", "mlp.down_proj.weight")
    wrong = write_exchanged(folders[0], tmp_path / "wrong", exchanged)
    official = converted(CASES[0], dtype="float32")
    *found, exchange, other_type = run(package, checkpoints, [*folders, wrong, official])
    for folder, result in zip(folders, found, strict=True):
        assert "error" not in result, result["error"]
        assert result["taken"] > 90
        seen.loads("sglang", LOADER, folder, "its kernels, which need a GPU, were not run")
    assert "ValueError: (" in exchange["error"]
    assert "llava_qwen" in other_type["error"]
    seen.refuses("sglang", LOADER, official, "needs --model-type llava")


def test_it_refuses_the_format_hf(
    package: Path, checkpoints: Path, converted: Converted, seen: Seen
) -> None:
    folders = [converted(case, dtype="float32", format="hf") for case in CASES]
    for folder, result in zip(folders, run(package, checkpoints, folders), strict=True):
        assert result["error"] == "ValueError: Unexpected select feature: default"
        seen.refuses("sglang", LOADER, folder, "Unexpected select feature: default")
