"""Whole folders of the format hf load, and are saved again, in the oldest transformers and in this
one, whichever transformers saved the base's tokenizer, with the same ids in both.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from acceptance.environments import environment, run_hf
from builders.saved_tokenizers import DATA, write_saved
from xtuner2llava import convert

pytestmark = pytest.mark.acceptance

CASES = {
    "llama3": "llama_e_full_fullvis",
    "phi3": "phi3_e_full_fullvis",
    "qwen2": "qwen2_e_full_fullvis",
    "vicuna": "llama_e_full_fullvis",
}
BASES = {"llama_e_full_fullvis": "llm_llama", "phi3_e_full_fullvis": "llm_phi3"}
# The last two are without their tokenizer.json.
SAVED = [
    *(("4.37.2", kind) for kind in ("llama3", "phi3")),
    ("4.40.2", "qwen2"),
    *(("4.57.1", kind) for kind in CASES),
    *(("5.24.0", kind) for kind in CASES),
    ("4.37.2", "qwen2"),
    ("4.40.2", "vicuna"),
]
PICTURE = DATA.parent / "answers/wide.png"
TEXTS = json.loads((DATA / "expected.json").read_text())["texts"]


def write_base(folder: Path, version: str, kind: str, checkpoints: Path) -> Path:
    write_saved(folder, version, kind, checkpoints)
    base = checkpoints / "bases" / BASES.get(CASES[kind], "llm_qwen2")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(base / name, folder / name)
    if (version, kind) in SAVED[-2:]:
        (folder / "tokenizer.json").unlink()
    return folder


def run(python: Path | str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    asked = {"picture": PICTURE, "question": "what is  it?"}
    _, results = run_hf(
        python,
        [{"folder": f, "texts": TEXTS, "questions": [asked], "tokens": 3} for f in folders],
    )
    return results


def named(folder: Path, kind: str) -> None:
    """The folder with another image processor."""
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_processor_type": kind}))


def test_oldest_and_newest_make_the_same(checkpoints: Path, tmp_path: Path) -> None:
    oldest = environment("transformers-4.45.2")
    folders = []
    for version, kind in SAVED:
        base = write_base(tmp_path / f"{version}-{kind}", version, kind, checkpoints)
        out = tmp_path / f"{version}-{kind}-hf"
        convert(
            checkpoints / CASES[kind] / "iter_2.pth",
            out,
            llm=base,
            vision=checkpoints / "bases/vision_clip",
            format="hf",
            dtype="float32",
        )
        folders.append(out)
    # The oldest lacks the image processor that pads: it says so, and loads all else.
    (padded,) = run(oldest, folders[:1])
    assert "Unrecognized image processor" in padded["error"]
    for folder in folders:
        named(folder, "CLIPImageProcessor")
    # Without the tokenizer.json that was made, the newest makes another, or does not load.
    wrong = tmp_path / "wrong"
    shutil.copytree(folders[-1], wrong)
    (wrong / "tokenizer.json").unlink()
    *olds, old_wrong = run(oldest, [*folders, wrong])
    *news, new_wrong = run(sys.executable, [*folders, wrong])
    assert "error" not in old_wrong, old_wrong
    assert "error" in new_wrong or new_wrong["ids"] != old_wrong["ids"]
    for saved, old, new in zip(SAVED, olds, news, strict=True):
        for made in (old, new):
            assert "error" not in made, (saved, made)
            assert (made["saved ids"], made["saved"]) == (made["ids"], made["answers"]), saved
        (answer,), (expected,) = new["answers"], old["answers"]
        assert new["ids"] == old["ids"], saved
        assert (answer["ids"], answer["tokens"]) == (expected["ids"], expected["tokens"]), saved
