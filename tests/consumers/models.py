"""Models that other programs are asked with, and what transformers answers for them.

vLLM on CPU needs attention heads of 32 or wider; those of `tests/checkpoints` have 16, see
widened.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from builders.training_config import write_training_config
from reference.trained import write_reference
from xtuner2llava import convert

if TYPE_CHECKING:
    import torch

TOKENS = 12
PICTURES = Path(__file__).parents[1] / "data/answers"
# mappings/families/gemma.yaml
WEAK_GEMMA = "Gemma sees pictures too weakly, as in transformers 5.4 and later"
WIDE: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "mixtral": {"num_key_value_heads": 1},
    "phi3": {"num_key_value_heads": 2},
    "phi3_long": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + place / 8 for place in range(16)],
            "long_factor": [2.0 + place for place in range(16)],
        },
        # None of the prompts is longer.
        "original_max_position_embeddings": 128,
    },
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
    "qwen2_moe": {"num_key_value_heads": 1},
    "internlm2": {"num_key_value_heads": 1},
}


def write_hf(folder: Path, kind: str, checkpoints: Path, *, pad: bool = True) -> Path:
    """A model of this kind, random, as XTuner leaves it, converted to the format hf in float32.

    Beside it lies the `reference.npz` of what it computes. `pad` is how training made squares.
    """
    source = KINDS[kind].make(folder / "source", num_attention_heads=2, **WIDE[kind])
    trained = write_trained(folder / "trained", source, checkpoints)
    template = "qwen_chat" if "qwen" in source.config["model_type"] else "vicuna"
    write_reference(source, trained, numpy.array([[1, 300, 21, -200, 55, 131, 380, 7]]))
    config = write_training_config(
        folder / "config.py", trained.llm, trained.vision, prompt_template=template, pad=pad
    )
    shutil.move(trained.checkpoint.with_name("reference.npz"), folder)
    out = folder / "llava-hf"
    convert(
        trained.checkpoint,
        out,
        format="hf",
        dtype="float32",
        xtuner_config=config,
        **trained.bases,
    )
    return out


# For official LLaVA, in which Mistral has no window by default.
LLAVA: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "mixtral": {"sliding_window": None},
    "internlm2": {},
}
TOWER = "bases/vision_clip"  # relative to `tests/checkpoints`


def write_llava(folder: Path, kind: str, checkpoints: Path, **options: Any) -> Path:
    """The same in the format llava, with its `reference.npz` beside it."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    source = KINDS[kind].make(folder / "source", **tokens, **LLAVA[kind])
    trained = write_trained(folder / "trained", source, checkpoints)
    write_reference(source, trained, numpy.array([[1, 300, 21, -200, 55, 131, 380, 7]]))
    out = folder / "trained" / f"llava-{kind}"
    options |= {**trained.bases, "vision_tower_name": TOWER}
    convert(trained.checkpoint, out, dtype="float32", **options)
    return out


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model generates greedily after `ids`; `top` are log-probabilities by token, a step."""

    ids: list[int]
    tokens: list[int]
    top: list[dict[int, float]]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Answer:
        top = [{int(token): value for token, value in step.items()} for step in found["top"]]
        return cls(found.get("ids", []), found["tokens"], top)

    def difference(self, other: Answer) -> float:
        """The largest of log-probabilities, of each one's likeliest five tokens, in order."""
        assert self.tokens == other.tokens
        return max(
            abs(one - two)
            for mine, others in zip(self.top, other.top, strict=True)
            for one, two in zip(_five(mine), _five(others), strict=True)
        )


def _five(step: Mapping[int, float]) -> list[float]:
    return sorted(step.values(), reverse=True)[:5]


class Transformers:
    """A folder of the format hf, in the transformers of this environment."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
        self.model.generation_config.eos_token_id = None

    def prompt(self, question: str, picture: bool = True) -> str:
        """The chat template's text of one turn."""
        content = [{"type": "image"}] if picture else []
        content.append({"type": "text", "text": question})
        made = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert isinstance(made, str)
        return made

    def ids(self, text: str) -> list[int]:
        ids = self.processor.tokenizer(text)["input_ids"]
        return [int(index) for index in ids]

    def ask(self, text: str, picture: Path) -> Answer:
        """What follows a prompt with a picture."""
        from PIL import Image

        image = Image.open(picture).convert("RGB")
        return self._generate(**self.processor(images=image, text=text, return_tensors="pt"))

    def follow(self, ids: Sequence[int]) -> Answer:
        """What follows tokens without a picture."""
        import torch

        given = torch.tensor([[*ids]])
        return self._generate(input_ids=given, attention_mask=torch.ones_like(given))

    def _generate(self, **inputs: torch.Tensor) -> Answer:
        made = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = inputs["input_ids"][0].tolist()
        likeliest = [step[0].log_softmax(-1).topk(5) for step in made.logits]
        top = [
            dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))
            for found in likeliest
        ]
        return Answer(ids, made.sequences[0, len(ids) :].tolist(), top)
