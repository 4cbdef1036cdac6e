"""The converted model answers as XTuner's own did: same picture, same question, same tokens.

In `hf`, through the processor and its chat template, in the transformers of this environment; in
official LLaVA, through its `process_images` and the prompt of the model card.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reference.cases import CASES, Converted
from reference.encode import IMAGE
from xtuner2llava.mapping import Catalogue
from xtuner2llava.planning.chat_template import prompt_text
from xtuner2llava.tokenizers.protobuf import field_bytes, fields

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


def ask(
    folder: Path, answer: dict[str, Any], **change: Any
) -> tuple[list[int], list[float], list[int]]:
    """The ids with -200 for the image, sums of pixels, and the answer's tokens."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
    model.generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(folder, **change)
    question = [{"type": "image"}, {"type": "text", "text": answer["question"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    image = Image.open(DATA / answer["picture"]).convert("RGB")
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    once = [
        IMAGE if index == place else index
        for before, index in zip([None, *ids], ids, strict=False)
        if index != place or before != place
    ]
    pixels = inputs["pixel_values"]
    made = model.generate(**inputs, do_sample=False, max_new_tokens=len(answer["tokens"]))
    sums = [pixels.sum().item(), pixels.abs().sum().item()]
    return once, sums, made[0, len(ids) :].tolist()


@pytest.mark.parametrize("case", ASKED)
def test_transformers_answers_as_xtuner(converted: Converted, case: str) -> None:
    folder = converted(case, format="hf", dtype="float32")
    for answer in of(case):
        ids, pixels, tokens = ask(folder, answer)
        assert ids == answer["input_ids"]
        assert close(pixels, answer)
        assert tokens == answer["tokens"]


def test_pictures_that_are_cropped_are_answered_otherwise(converted: Converted) -> None:
    folder = converted("llama_e_full_fullvis", format="hf", dtype="float32")
    wide = [answer for answer in of("llama_e_full_fullvis") if answer["picture"] == "wide.png"]
    found = [ask(folder, answer, do_pad=False, do_center_crop=True) for answer in wide]
    assert not any(
        close(pixels, answer) for answer, (_, pixels, _) in zip(wide, found, strict=True)
    )


def ask_llava(python: Path, checkpoints: Path, folder: Path, case: str) -> list[dict[str, Any]]:
    """What official LLaVA answers, with the prompt of the model card."""
    family = case.partition("_")[0]
    template = CATALOGUE.prompt_templates[TEMPLATES[family]]
    how = "qwen float32" if family == "qwen2" else "official float32"
    jobs = [
        {
            "folder": str(folder),
            "how": how,
            "picture": str(DATA / answer["picture"]),
            "prompt": prompt_text(template, answer["question"]),
        }
        for answer in of(case)
    ]
    ran = subprocess.run(
        [python, Path(__file__).with_name("run_llava.py")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=checkpoints,  # where `mm_vision_tower: bases/…` leads to
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    results: list[dict[str, Any]] = json.loads(ran.stdout)
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
