"""The format hf in the transformers of this environment: batches, chat pipeline, saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from consumers.models import PICTURES
from reference.cases import Converted
from reference.seen import Seen

pytestmark = pytest.mark.acceptance

SAME = 1e-5
CASES = ("llama_e_full_fullvis", "qwen2_e_full_fullvis", "phi3_e_full_fullvis")
QUESTIONS = {
    "wide.png": "What is it?",
    "tall.png": "Describe it.\nIn one  line, please",
    "square.png": "Why?",
}


class Loaded:
    """A folder with its processor, which generate six tokens for each question."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
        self.model.generation_config.eos_token_id = None
        self.pictures = [Image.open(PICTURES / name).convert("RGB") for name in QUESTIONS]

    def message(self, question: str, **image: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", **image}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]

    def generate(self, *chosen: int) -> tuple[list[list[int]], list[Any]]:
        """The tokens and the logits of the questions with these indices, in one batch."""
        texts = [
            self.processor.apply_chat_template(self.message(question), add_generation_prompt=True)
            for question in QUESTIONS.values()
        ]
        inputs = self.processor(
            images=[self.pictures[i] for i in chosen],
            text=[texts[i] for i in chosen],
            padding=True,
            return_tensors="pt",
        )
        made = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=6,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = made.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return new, [[step[i] for step in made.logits] for i in range(len(chosen))]

    def batch_difference(self) -> float:
        """The largest of logits, between three prompts in a batch and each alone."""
        _, together = self.generate(0, 1, 2)
        alone = [self.generate(i)[1][0] for i in range(3)]
        return max(
            (one[0] - two[0]).abs().max().item() for one, two in zip(together, alone, strict=True)
        )


@pytest.mark.parametrize("case", CASES)
def test_batch_pipeline_and_saved_again(
    converted: Converted, tmp_path: Path, seen: Seen, case: str
) -> None:
    import transformers

    folder = converted(case, format="hf", dtype="float32")
    loaded = Loaded(folder)
    assert loaded.batch_difference() < SAME
    ((tokens,), _) = loaded.generate(0)

    pipe = transformers.pipeline(
        "image-text-to-text", model=loaded.model, processor=loaded.processor
    )
    (answered,) = pipe(
        text=loaded.message(QUESTIONS["wide.png"], image=loaded.pictures[0]),
        max_new_tokens=6,
        return_full_text=False,
        generate_kwargs={"do_sample": False},
    )
    text = loaded.processor.decode(tokens, skip_special_tokens=True)
    assert answered["generated_text"].strip() == text.strip()

    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.processor.save_pretrained(tmp_path / "saved")
    assert Loaded(tmp_path / "saved").generate(0)[0] == [tokens]
    seen.ran("transformers", transformers.__version__, folder)


def test_prompts_padded_after_their_end_are_answered_otherwise(
    converted: Converted, tmp_path: Path
) -> None:
    folder = tmp_path / "right"
    shutil.copytree(converted("qwen2_e_full_fullvis", format="hf", dtype="float32"), folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "right"}))
    assert Loaded(folder).batch_difference() > 1000 * SAME
