"""What each case of `tests/checkpoints` was made from, and what XTuner computed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Case:
    """Base models, relative to `tests/checkpoints`, and what kind of checkpoint it is."""

    llm: str
    vision: str = "bases/vision_clip"
    has_lora: bool = False
    is_zero: bool = False

    @property
    def best(self) -> str:
        """The logits of the weights as exactly as the checkpoint has them."""
        return "logits_master32" if self.is_zero else "logits_f32"

    def options(self, checkpoints: Path) -> dict[str, Any]:
        """What `convert` must be told: where the base models lie, and a name for the tower."""
        return {
            "llm": checkpoints / self.llm,
            "vision": checkpoints / self.vision,
            "vision_tower_name": "openai/x",
        }


CASES: Mapping[str, Case] = {
    "qwen2_a_pretrain": Case("bases/llm_qwen2"),
    "qwen2_b_full_frozenvis": Case("bases/llm_qwen2"),
    "qwen2_c_full_vislora": Case("bases/llm_qwen2", has_lora=True),
    "qwen2_d_lora_vislora": Case("bases/llm_qwen2", has_lora=True),
    "qwen2_e_full_fullvis": Case("bases/llm_qwen2"),
    "qwen2_f_zero2_full": Case("bases/llm_qwen2", is_zero=True),
    "qwen2_f_zero3_full": Case("bases/llm_qwen2", is_zero=True),
    "llama_b_full_frozenvis": Case("bases/llm_llama"),
    "llama_d_lora_vislora": Case("bases/llm_llama_gqa", "bases/vision_clip_full", has_lora=True),
    "llama_e_full_fullvis": Case("bases/llm_llama"),
    "phi3_e_full_fullvis": Case("bases/llm_phi3"),
}


class Converted(Protocol):
    def __call__(self, case: str, source: str = ..., **options: Any) -> Path:
        """The folder that `convert` makes of `source` of `case`, made once for the same arguments.

        Base models are given, and the tower is named relative to `checkpoints`. Treat the folder as
        read-only: other tests get the same one.
        """


def read_reference(checkpoints: Path, case: str) -> dict[str, Any]:
    """The arrays of `reference.npz`: `input_ids`, `pixel_values`, and logits by name."""
    import numpy

    with numpy.load(checkpoints / case / "reference.npz") as file:
        return dict(file)
