"""LLaVA-NeXT, by its own loader, classes and `generate`, computes what was trained and answers what
XTuner answered.

Its source is not on the package index, so these tests need a checkout:

    git clone https://github.com/LLaVA-VL/LLaVA-NeXT
    ./scripts/test --consumers tests/consumers/test_llava_next.py --llava-next LLaVA-NeXT
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from acceptance.environments import environment, run_llava
from acceptance.test_answers import ASKED, asking, close, of
from consumers.models import LLAVA, write_llava
from reference.cases import Converted
from reference.exchange import write_exchanged
from reference.seen import Seen

pytestmark = pytest.mark.consumers

# Its loader takes float16 alone, and from `generate` come the logits of the last token.
TOLERANCES = {"float16": 1e-2, "float32": 1e-5}


@pytest.fixture(scope="module")
def checkout(pytestconfig: pytest.Config) -> Path:
    given: Path | None = pytestconfig.getoption("--llava-next")
    if given is None:
        pytest.skip("needs a checkout of LLaVA-NeXT, see --llava-next")
    return given.resolve()


@pytest.fixture(scope="module")
def folders(
    checkout: Path, checkpoints: Path, converted: Converted, tmp_path_factory: Any
) -> dict[str, Path]:
    """Converted models by name, each with a `reference.npz` beside it or of its case."""
    home, made = tmp_path_factory.mktemp("next"), {}
    for case in ASKED:
        made[case] = converted(case, dtype="float32")
    for kind in LLAVA:
        made[kind] = write_llava(home / kind, kind, checkpoints)
    exchanged = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    made["wrong"] = write_exchanged(made[ASKED[-1]], home / "llava-qwen-wrong", exchanged)
    return made


def reference(name: str, folder: Path, checkpoints: Path) -> Path:
    if name in LLAVA:
        return folder.with_name("reference.npz")
    return checkpoints / (ASKED[-1] if name == "wrong" else name) / "reference.npz"


@pytest.fixture(scope="module")
def found(
    checkout: Path, folders: dict[str, Path], checkpoints: Path
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Results by name, and by precision or "answers"; one process, as it takes long to start."""
    jobs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, folder in folders.items():
        for dtype in TOLERANCES:
            against = reference(name, folder, checkpoints)
            jobs[name, dtype] = [{"folder": folder, "reference": against, "how": f"next {dtype}"}]
        if name in ASKED:
            jobs[name, "answers"] = asking(folder, name, "next float32")
    asked = [job for many in jobs.values() for job in many]
    results = iter(run_llava(environment("llava-next"), checkpoints, asked, checkout))
    return {key: [next(results) for _ in many] for key, many in jobs.items()}


@pytest.mark.parametrize("name", (*ASKED, *LLAVA))
def test_it_computes_what_was_trained(
    checkout: Path,
    folders: dict[str, Path],
    found: dict[tuple[str, str], list[dict[str, Any]]],
    seen: Seen,
    name: str,
) -> None:
    for dtype, tolerance in TOLERANCES.items():
        (result,) = found[name, dtype]
        assert "error" not in result, result["error"]
        assert result["differences"]["logits_f32"] < tolerance, dtype
        assert len(result["generated"]) > 1
    for answer, result in zip(of(name), found.get((name, "answers"), ()), strict=True):
        assert "error" not in result, result["error"]
        assert result["ids"] == answer["input_ids"]
        assert close(result["pixels"], answer)
        assert result["tokens"] == answer["tokens"]
    head = ["git", "-C", checkout, "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(head, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    seen.ran("llava-next", f"{commit}, transformers 4.37.2", folders[name])


def test_gate_and_up_exchanged_is_seen(
    found: dict[tuple[str, str], list[dict[str, Any]]],
) -> None:
    for dtype, tolerance in TOLERANCES.items():
        (result,) = found["wrong", dtype]
        assert result["differences"]["logits_f32"] > 10 * tolerance
