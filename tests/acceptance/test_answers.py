"""The converted model answers as XTuner's own did: same picture, same question, same tokens.

In official LLaVA, through its `process_images` and the prompt of the model card; test_hf.py asks
transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from acceptance.environments import run_llava
from reference.cases import CASES, Converted
from reference.seen import Seen
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.planning.chat_template import prompt_text

DATA = Path(__file__).parents[1] / "data/answers"
ANSWERS = json.loads((DATA / "answers.json").read_text())
ASKED = sorted({answer["case"] for answer in ANSWERS})
TEMPLATES = {"qwen2": "qwen_chat", "llama": "vicuna", "phi3": "phi3_chat"}
CATALOGUE = Catalogue(Path(__file__).parents[2] / "mappings")

pytestmark = pytest.mark.acceptance


def of(case: str) -> list[dict[str, Any]]:
    return [answer for answer in ANSWERS if answer["case"] == case]


def close(pixels: list[float], answer: dict[str, Any]) -> bool:
    return pixels == pytest.approx(answer["pixels"], abs=0.05)


def asking(folder: Path, case: str, how: str) -> list[dict[str, Any]]:
    """Jobs of `run_llava.py`, with the prompt of the model card."""
    template = CATALOGUE.prompt_templates[TEMPLATES[case.partition("_")[0]]]
    return [
        {
            "folder": folder,
            "how": how,
            "picture": DATA / answer["picture"],
            "prompt": prompt_text(template, answer["question"]),
        }
        for answer in of(case)
    ]


def ask_llava(python: Path, checkpoints: Path, folder: Path, case: str) -> list[dict[str, Any]]:
    how = "qwen float32" if case.startswith("qwen2") else "official float32"
    results = run_llava(python, checkpoints, asking(folder, case, how))
    assert not any("error" in result for result in results), results
    return results


@pytest.mark.parametrize("case", ASKED)
def test_llava_answers_as_xtuner(
    llava_python: Path, checkpoints: Path, converted: Converted, seen: Seen, case: str
) -> None:
    folder = converted(case, dtype="float32")
    results = ask_llava(llava_python, checkpoints, folder, case)
    for answer, result in zip(of(case), results, strict=True):
        assert result["ids"] == answer["input_ids"]
        assert close(result["pixels"], answer)
        assert result["tokens"] == answer["tokens"]
    if not case.startswith("qwen2"):  # of which only what LLaVA-NeXT does is composed
        seen.ran("llava", "1.2.2", folder)


def test_a_tokenizer_model_that_drops_spaces_is_said(
    llava_python: Path, checkpoints: Path, converted: Converted, tmp_path: Path
) -> None:
    """Official LLaVA tokenizes with tokenizer.model, training did with what was made from it."""
    case = "llama_b_full_frozenvis"
    llm = shutil.copytree(checkpoints / CASES[case].llm, tmp_path / "base")
    (llm / "tokenizer.json").unlink()
    folder = converted(case, dtype="float32", llm=llm)
    notes = json.loads((folder / "conversion.json").read_text())["notes"]
    assert any("A prompt lacks those tokens there" in note for note in notes)
    results = ask_llava(llava_python, checkpoints, folder, case)
    for answer, result in zip(of(case), results, strict=True):
        lost = len(answer["input_ids"]) - len(result["ids"])
        assert lost > 0
        assert [i for i in answer["input_ids"] if i not in (13, 345)] == [
            i for i in result["ids"] if i not in (13, 345)
        ]
