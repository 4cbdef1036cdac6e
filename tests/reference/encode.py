"""Conversations as XTuner encodes them, piece by piece (`xtuner/dataset/utils.py`, encode_fn)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IMAGE = -200
Turns = Sequence[tuple[str, str]]


def encode(tokenizer: Any, template: Any, turns: Turns, system: str = "") -> list[int]:
    """The ids of all turns, each a question and an answer, where the image is `IMAGE`."""
    qwen = type(tokenizer).__name__ in ("QWenTokenizer", "Qwen2TokenizerFast", "Qwen2Tokenizer")
    bos = [] if qwen else [tokenizer.bos_token_id]

    def of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    ids: list[int] = []
    needs_bos = True
    for number, (question, answer) in enumerate(turns, 1):
        if "<image>" in question:
            question = f"<image>\n{question.replace('<image>', '').strip()}".strip()
        text = template.instruction.format(input=question, round=number)
        if system and number == 1:
            text = template.system.format(system=system) + text
        ids += bos if needs_bos else []
        before, image, after = text.partition("<image>")
        ids += of(before) + ([IMAGE] if image else []) + of(after)
        ids += of(answer + template.suffix)
        needs_bos = not template.suffix_as_eos
        ids += [tokenizer.eos_token_id] if needs_bos else []
        ids += of(template.sep) if template.sep else []
    return ids
