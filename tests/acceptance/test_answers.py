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
from xtuner2llava.tokenizers.sentencepiece import field_bytes, fields

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


def keep_spaces(tokenizer_model: Path) -> None:
    """Makes a SentencePiece model keep spaces and line feeds, as those of published Llamas do."""
    # NormalizerSpec of google/sentencepiece: field 1 is its name, field 4 remove_extra_whitespaces.
    identity = field_bytes(1, b"identity") + bytes([4 << 3, 0])
    kept = [field.raw for field in fields(tokenizer_model.read_bytes()) if field.number != 3]
    tokenizer_model.write_bytes(b"".join([*kept, field_bytes(3, identity)]))


@pytest.mark.parametrize("case", ASKED)
def test_llava_answers_as_xtuner(
    llava_python: Path,
    checkpoints: Path,
    converted: Converted,
    tmp_path: Path,
    seen: Seen,
    case: str,
) -> None:
    llm = tmp_path / "base"
    shutil.copytree(checkpoints / CASES[case].llm, llm)
    if (llm / "tokenizer.model").exists():
        keep_spaces(llm / "tokenizer.model")
    folder = converted(case, dtype="float32", llm=llm)
    results = ask_llava(llava_python, checkpoints, folder, case)
    for answer, result in zip(of(case), results, strict=True):
        assert result["ids"] == answer["input_ids"]
        assert close(result["pixels"], answer)
        assert result["tokens"] == answer["tokens"]
    if not case.startswith("qwen2"):  # of which only what LLaVA-NeXT does is composed
        seen.ran("llava", "1.2.2", folder)


def test_a_tokenizer_model_that_drops_spaces_is_said(
    llava_python: Path,
    checkpoints: Path,
    converted: Converted,
) -> None:
    """Official LLaVA tokenizes with tokenizer.model, training did with tokenizer.json."""
    case = "llama_b_full_frozenvis"
    folder = converted(case, dtype="float32")
    notes = json.loads((folder / "conversion.json").read_text())["notes"]
    assert any("A prompt lacks those tokens there" in note for note in notes)
    results = ask_llava(llava_python, checkpoints, folder, case)
    for answer, result in zip(of(case), results, strict=True):
        lost = len(answer["input_ids"]) - len(result["ids"])
        assert lost > 0
        assert [i for i in answer["input_ids"] if i not in (13, 345)] == [
            i for i in result["ids"] if i not in (13, 345)
        ]
