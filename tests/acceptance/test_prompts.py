"""Official LLaVA makes of the card's prompt the ids that XTuner made, for every prompt template."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from acceptance.test_transformers import run
from reference.cases import Converted
from reference.seen import Seen
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.planning.chat_template import prompt_text

pytestmark = pytest.mark.acceptance

REFERENCE = json.loads((Path(__file__).parents[1] / "data/prompts/reference.json").read_text())
CATALOGUE = Catalogue(Path(__file__).parents[2] / "mappings")
ASKED = {
    "llm_qwen2": "qwen2_e_full_fullvis",
    "llm_llama": "llama_e_full_fullvis",
    "llm_phi3": "phi3_e_full_fullvis",
}


def prompts(base: str) -> list[tuple[str, str, list[int]]]:
    """The template, the prompt and its ids, of each conversation's first turn."""
    found = []
    for name, template, conversation, ids, starts in REFERENCE["encoded"]:
        (_, question), *_ = REFERENCE["conversations"][conversation]
        text = question.replace("<image>", "").strip()
        if name == base:
            prompt = prompt_text(CATALOGUE.prompt_templates[template], text)
            assert prompt is not None
            found.append((template, prompt, ids[: starts[0]]))
    return found


@pytest.mark.parametrize("base", ASKED)
def test_every_template_gives_the_ids_of_xtuner(
    llava_python: Path, converted: Converted, seen: Seen, base: str
) -> None:
    folder = converted(ASKED[base], dtype="float32")
    asked = prompts(base)
    texts = [text for _, text, _ in asked]
    job = {"do": "image_token", "folder": folder, "fast": False}
    right, wrong = run(
        llava_python,
        {**job, "prompts": texts},
        {**job, "prompts": [text.replace("\n", " ") for text in texts]},
    )
    compared = Counter[str]()
    for (template, _, ids), made, other in zip(asked, right, wrong, strict=True):
        assert made["ids"] == ids, template
        assert other["ids"] != ids, template
        compared[template] += len(ids)
    assert len(compared) == 26
    for template, count in compared.items():
        seen.compared(template, base, "llava", count)
