"""The transformers that LLaVA pins, 4.37.2, loads the Hugging Face format and the tokenizers.

And LLaVA's own `tokenizer_image_token` keeps every token of a prompt with the tokenizers that are
written, and loses some with the bos token that XTuner advises for Qwen.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from builders import internlm2_tokenizer, qwen_tokenizer
from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from builders.prepared_tokenizer import write_prepared
from reference.cases import Converted
from xtuner2llava import convert

pytestmark = pytest.mark.acceptance

SAME = 1e-5
MODELS = ("llama_d_lora_vislora", "llama_e_full_fullvis", "qwen2_e_full_fullvis")
IMAGE = -200
BEGIN = "<|im_start|>"


def run(llava_python: Path, *jobs: dict[str, Any]) -> list[Any]:
    """One result for each job, see `run_transformers.py`; none is an error."""
    ran = subprocess.run(
        [llava_python, Path(__file__).with_name("run_transformers.py")],
        input=json.dumps(jobs, default=str),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    results = list(json.loads(ran.stdout))
    for result in results:
        assert "error" not in result, result["error"]
    return results


# The Hugging Face format


@pytest.fixture(scope="module")
def loaded(
    llava_python: Path, checkpoints: Path, converted: Converted, tmp_path_factory: Any
) -> dict[str, dict[str, Any]]:
    """The results for all models, made in one process, as it takes long to start."""
    folders = {case: converted(case, format="hf", dtype="float32") for case in MODELS}
    source = KINDS["qwen2"].make(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)
    trained = write_trained(tmp_path_factory.mktemp("trained"), source, checkpoints)
    tied = tmp_path_factory.mktemp("out") / "tied"
    convert(trained.checkpoint, tied, format="hf", dtype="float32", **trained.bases)
    jobs = [
        {"do": "model", "folder": folder, "reference": checkpoints / case / "reference.npz"}
        for case, folder in folders.items()
    ]
    jobs.append({**jobs[-1], "folder": tied})
    return dict(zip((*MODELS, "tied"), run(llava_python, *jobs), strict=True))


@pytest.mark.parametrize("case", MODELS)
def test_it_loads_the_hugging_face_format(loaded: dict[str, dict[str, Any]], case: str) -> None:
    result = loaded[case]
    assert result["info"] == {}
    assert result["differences"]["logits_f32"] < SAME
    assert len(result["generated"]) > 1


def test_it_ties_the_head_of_a_tied_model(loaded: dict[str, dict[str, Any]]) -> None:
    assert loaded["tied"]["info"] == {}
    assert loaded["tied"]["differences"]["logits_f32"] > 0.1  # of another model


# Tokenizers


def test_qwen_s_tokenizer_fast_and_slow(llava_python: Path, tmp_path: Path) -> None:
    base = qwen_tokenizer.write_base(tmp_path / "base")
    folder = qwen_tokenizer.write_converted(base, tmp_path / "out")
    texts = list(qwen_tokenizer.texts(3000))
    oracle = qwen_tokenizer.oracle()
    expected = [oracle.encode(text) for text in texts]
    job = {"do": "tokenize", "folder": folder, "texts": texts}
    fast, slow = run(llava_python, {**job, "fast": True}, {**job, "fast": False})
    assert (fast["class"], slow["class"]) == ("Qwen2TokenizerFast", "Qwen2Tokenizer")
    assert fast["length"] == slow["length"] == 151851
    assert fast["bos"] is slow["bos"] is None
    assert fast["ids"] == expected
    # The slow one of this version takes merges that begin with "#" for comments, those of the
    # published Qwen2 tokenizers too (`tokenization_qwen2.py`; mended in 4.38).
    rows = zip(texts, slow["ids"], expected, strict=True)
    compared = [(ids, right) for text, ids, right in rows if "#" not in text]
    assert len(compared) > 2000
    assert all(ids == right for ids, right in compared)


@pytest.mark.parametrize("name", internlm2_tokenizer.NAMES)
def test_internlm2_s_tokenizer_fast_and_slow(llava_python: Path, tmp_path: Path, name: str) -> None:
    model = (internlm2_tokenizer.DATA / f"{name}.model").read_bytes()
    base = internlm2_tokenizer.write_base(tmp_path / "base", model)
    folder = write_prepared(internlm2_tokenizer.prepare(base), tmp_path / "out")
    texts = [text for text, _ in internlm2_tokenizer.expected(name)]
    expected = [[1, *ids] for _, ids in internlm2_tokenizer.expected(name)]
    job = {"do": "tokenize", "folder": folder, "texts": texts}
    fast, slow = run(llava_python, {**job, "fast": True}, {**job, "fast": False})
    assert (fast["class"], slow["class"]) == ("LlamaTokenizerFast", "LlamaTokenizer")
    # More tokens than rows would make LLaVA add random ones.
    assert fast["length"] == slow["length"] == 520
    assert fast["ids"] == expected
    assert slow["ids"] == expected


# LLaVA's prompts


PROMPT = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


def prompt_tokens(llava_python: Path, folder: Path) -> list[dict[str, Any]]:
    job = {"do": "image_token", "folder": folder, "prompts": [PROMPT]}
    results = run(llava_python, {**job, "fast": True}, {**job, "fast": False})
    return [result[0] for result in results]


def make(checkpoints: Path, out: Path, **options: Any) -> Path:
    convert(
        checkpoints / "qwen2_e_full_fullvis/iter_2.pth",
        out,
        llm=checkpoints / "bases/llm_qwen2",
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/clip",
        **options,
    )
    return out


def test_llava_keeps_every_token_of_a_prompt(
    llava_python: Path, checkpoints: Path, tmp_path: Path
) -> None:
    for result in prompt_tokens(llava_python, make(checkpoints, tmp_path / "llava-qwen")):
        before, after = result["chunks"]
        assert result["ids"] == [*before, IMAGE, *after]


def test_with_the_workaround_it_loses_one(
    llava_python: Path, checkpoints: Path, tmp_path: Path
) -> None:
    folder = make(checkpoints, tmp_path / "llava-qwen", bos_token=BEGIN)
    for result in prompt_tokens(llava_python, folder):
        before, after = result["chunks"]
        assert result["ids"] == [*before, IMAGE, *after[1:]]


def test_taken_off_it_keeps_them(llava_python: Path, checkpoints: Path, tmp_path: Path) -> None:
    """A base whose tokenizer XTuner saved with the workaround."""
    llm = tmp_path / "base"
    shutil.copytree(checkpoints / "bases/llm_qwen2", llm)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((llm / name).read_text())
        (llm / name).write_text(json.dumps({**values, "bos_token": BEGIN}))
    spoiled, mended = llm, tmp_path / "llava-qwen"
    convert(
        checkpoints / "qwen2_e_full_fullvis/iter_2.pth",
        mended,
        llm=llm,
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/clip",
    )
    kept, lost = (prompt_tokens(llava_python, folder)[0] for folder in (mended, spoiled))
    assert kept["chunks"] == lost["chunks"]
    before, after = kept["chunks"]
    assert kept["ids"] == [*before, IMAGE, *after]
    assert lost["ids"] == [*before, IMAGE, *after[1:]]
