"""The format hf in each transformers that it is for: it computes what was trained, answers what
XTuner answered, also in a batch and in the chat pipeline, and is saved and loaded again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acceptance.environments import environment, run_hf
from consumers.models import PICTURES, WEAK_GEMMA, WIDE, write_hf
from reference.cases import Converted
from reference.seen import Seen

pytestmark = pytest.mark.acceptance

SAME = 1e-5
ANSWERS = json.loads((PICTURES / "answers.json").read_text())
ASKED = sorted({answer["case"] for answer in ANSWERS})
OLDEST = "4.45.2"
VERSIONS = (OLDEST, "4.57.1", "newest")
# Those that XTuner's answers are not of.
FAMILIES = tuple(kind for kind in WIDE if kind not in ("llama", "qwen2", "phi3"))
# What the oldest does not take: a word of its error, and why.
REFUSED = {
    "qwen3": ("qwen3", "Qwen3 is new in transformers 4.51"),
    "mixtral": ("output_router_logits", "its LLaVA cannot generate with a Mixtral"),
}
OLD_IMAGES = (
    "trained on cropped pictures: it refuses LlavaImageProcessor, which pads them; it has no "
    "image-text-to-text pipeline"
)


def questions(case: str) -> list[dict[str, Any]]:
    return [answer for answer in ANSWERS if answer["case"] == case]


@dataclass(frozen=True, slots=True)
class Version:
    """A version of transformers, and what it made of folders by name."""

    version: str
    folders: dict[str, Path]
    results: dict[str, dict[str, Any]]

    @property
    def oldest(self) -> bool:
        return self.version == OLDEST


@pytest.fixture(scope="module", params=VERSIONS)
def made(
    request: pytest.FixtureRequest,
    checkpoints: Path,
    converted: Converted,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Version]:
    oldest = request.param == OLDEST
    python: Path | str = sys.executable
    if request.param != "newest":
        python = environment(f"transformers-{request.param}")
    home = tmp_path_factory.mktemp(request.param)
    jobs = {}
    for case in ASKED:
        folder = converted(case, format="hf", dtype="float32")
        if oldest:
            jobs[case, "padded"] = {"folder": folder, **asking(case)}
            config = home / f"{case}.py"
            text = (checkpoints / case / "config.py").read_text()
            config.write_text(text.replace("image_to_square=True", "image_to_square=False"))
            folder = converted(case, format="hf", dtype="float32", xtuner_config=config)
        reference = checkpoints / case / "reference.npz"
        jobs[case, ""] = {"folder": folder, **asking(case), "reference": reference}
    for kind in FAMILIES:
        folder = write_hf(home / kind, kind, checkpoints, pad=not oldest)
        reference = folder.with_name("reference.npz")
        jobs[kind, ""] = {"folder": folder, **asking(ASKED[0]), "reference": reference}
    wrong = shutil.copytree(jobs[ASKED[-1], ""]["folder"], home / "wrong")
    change(wrong / "tokenizer_config.json", padding_side="right")
    change(wrong / "preprocessor_config.json", image_mean=[0.5] * 3)
    jobs["wrong", ""] = {**jobs[ASKED[-1], ""], "folder": wrong}
    version, results = run_hf(python, [*jobs.values()])
    names = ["-".join(filter(None, key)) for key in jobs]
    yield Version(
        version,
        dict(zip(names, (job["folder"] for job in jobs.values()), strict=True)),
        dict(zip(names, results, strict=True)),
    )
    shutil.rmtree(home)


def asking(case: str) -> dict[str, Any]:
    asked = [
        {"picture": PICTURES / answer["picture"], "question": answer["question"]}
        for answer in questions(case)
    ]
    return {"questions": asked, "tokens": len(questions(case)[0]["tokens"])}


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def consistent(version: Version, name: str) -> dict[str, Any]:
    """The result, which is the same alone, in a batch, in the pipeline, and saved and loaded."""
    result = version.results[name]
    assert "error" not in result, result["error"]
    assert result["batch"] < SAME
    assert result["saved"] == result["answers"]
    answer = result["answers"][0]
    assert result["pipeline"] == (None if version.oldest else answer["text"])
    assert result["one step"] == (None if version.oldest else answer["ids"])
    return result


@pytest.mark.parametrize("case", ASKED)
def test_it_answers_as_xtuner(made: Version, seen: Seen, case: str) -> None:
    result = consistent(made, case)
    assert result["reference"] < SAME
    for answer, expected in zip(result["answers"], questions(case), strict=True):
        assert answer["ids"] == expected["input_ids"]
        if made.oldest and expected["picture"] != "square.png":  # XTuner padded the others
            assert answer["pixels"] != pytest.approx(expected["pixels"], abs=0.05)
            continue
        assert answer["pixels"] == pytest.approx(expected["pixels"], abs=0.05)
        assert answer["tokens"] == expected["tokens"]
    if made.oldest:
        assert "Unrecognized image processor" in made.results[f"{case}-padded"]["error"]
    seen.ran("transformers", made.version, made.folders[case], OLD_IMAGES if made.oldest else "")


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_computes_what_was_trained(made: Version, seen: Seen, kind: str) -> None:
    folder = made.folders[kind]
    if made.oldest and kind in REFUSED:
        error, because = REFUSED[kind]
        assert error in made.results[kind]["error"]
        seen.refuses("transformers", made.version, folder, because)
        return
    result = consistent(made, kind)
    if kind == "gemma" and not made.version.startswith("4."):
        assert result["reference"] > 1000 * SAME
        seen.loads("transformers", made.version, folder, WEAK_GEMMA)
        return
    assert result["reference"] < SAME
    seen.ran("transformers", made.version, folder, OLD_IMAGES if made.oldest else "")


def test_other_padding_and_pixels_are_seen(made: Version) -> None:
    result = made.results["wrong"]
    assert result["batch"] > 1000 * SAME
    assert result["answers"][-1]["pixels"] != pytest.approx(
        questions(ASKED[-1])[-1]["pixels"], abs=0.05
    )
