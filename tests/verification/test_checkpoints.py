"""Every checkpoint that XTuner wrote: converted, then verified tensor by tensor and at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from damage import results
from reference.cases import CASES, Converted
from xtuner2llava import verify

# The dtype goes around, so that each layout and each kind of training meets several.
DTYPES = ("float16", "float32", "bfloat16")
RUNS = [(case, DTYPES[index % 3]) for index, case in enumerate(CASES)]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_all_true(checkpoints: Path, converted: Converted, case: str, dtype: str) -> None:
    base = CASES[case]
    found = verify(
        converted(case, dtype=dtype),
        against=checkpoints / case / "iter_2.pth",
        logits=True,
        llm=checkpoints / base.llm,
        vision=checkpoints / base.vision,
    )
    # The folder of Phi-3 becomes a Llama; its name here is that of the case.
    assert results(found) == {}
    distances: Any = found.figures["logits"]["distances"]  # type: ignore[index, call-overload]
    tensors: Any = found.figures["tensors"]
    assert tensors["differing"] == []
    assert bool(tensors["computed"]) is base.has_lora
    assert distances["rounded - folder"]["largest_difference"] < 1e-3
    assert distances["rounded - folder"]["top1"] == 1.0
    assert distances["rounded - wrong: gate and up"]["largest_difference"] > 0.1
