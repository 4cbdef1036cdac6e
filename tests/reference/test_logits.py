"""What the converter writes computes what XTuner computed, for every case and kind of input."""

from __future__ import annotations

from pathlib import Path

import pytest

from reference.cases import CASES, Converted, read_reference
from reference.compose import compose, read_tensors
from reference.exchange import write_exchanged
from reference.measured import Measured

# Float32 sums in another order; logits are up to 2.5, and rounding weights to float16 moves them
# by 5e-4 to 2e-3.
SAME = 1e-5
DIFFERENT = 1e-4


def distance(checkpoints: Path, folder: Path, case: str, name: str) -> float:
    """Largest difference between the logits of `folder` and the reference's `name`."""
    import torch

    model = compose(folder, checkpoints / CASES[case].vision)
    reference = read_reference(checkpoints, case)
    logits = model.logits(reference["input_ids"], reference["pixel_values"])
    return (logits - torch.from_numpy(reference[name])).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_float32_is_the_trained_model(
    checkpoints: Path, converted: Converted, measured: Measured, case: str
) -> None:
    folder = converted(case, dtype="float32")
    found = distance(checkpoints, folder, case, CASES[case].best)
    assert found < SAME
    measured.exact(folder, found, real=True)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.has_lora])
def test_float16_is_the_trained_model_rounded_once(
    checkpoints: Path, converted: Converted, case: str
) -> None:
    folder = converted(case, dtype="float16")
    assert distance(checkpoints, folder, case, "logits_all16") < SAME
    assert distance(checkpoints, folder, case, CASES[case].best) > DIFFERENT


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.has_lora])
def test_float16_of_merged_lora_is_near(checkpoints: Path, converted: Converted, case: str) -> None:
    # No reference has this rounding: XTuner's rounds LoRA matrices before they are multiplied.
    folder = converted(case, dtype="float16")
    assert DIFFERENT < distance(checkpoints, folder, case, CASES[case].best) < 3e-3


@pytest.mark.parametrize("case", CASES)
def test_an_exported_folder_is_the_trained_model_with_a_float16_llm(
    checkpoints: Path, converted: Converted, measured: Measured, case: str
) -> None:
    folder = converted(case, "iter_2_xtuner", dtype="float32")
    found = distance(checkpoints, folder, case, "logits_llm16")
    assert found < SAME
    measured.exact(folder, found, real=True)


@pytest.mark.parametrize(
    "case", ["qwen2_b_full_frozenvis", "qwen2_d_lora_vislora", "llama_d_lora_vislora"]
)
def test_an_exported_folder_of_bin_files_is_the_same(converted: Converted, case: str) -> None:
    import torch

    safe = read_tensors(converted(case, "iter_2_xtuner", dtype="float32"))
    pickled = read_tensors(converted(case, "iter_2_xtuner_bin", dtype="float32"))
    assert set(pickled) == set(safe)
    assert all(torch.equal(pickled[name], safe[name]) for name in safe)


def test_shards_hold_the_same_tensors(converted: Converted) -> None:
    import torch

    whole = read_tensors(converted("qwen2_e_full_fullvis", dtype="float16"))
    folder = converted("qwen2_e_full_fullvis", dtype="float16", max_shard_size="200KB")
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    sharded = read_tensors(folder)
    assert set(sharded) == set(whole)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "exchanged",
    [
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ],
)
def test_a_wrong_mapping_whose_shapes_fit_would_be_seen(
    checkpoints: Path, converted: Converted, tmp_path: Path, exchanged: tuple[str, str]
) -> None:
    right = converted("qwen2_e_full_fullvis", dtype="float32")
    wrong = write_exchanged(right, tmp_path / "wrong", exchanged)
    assert distance(checkpoints, wrong, "qwen2_e_full_fullvis", "logits_f32") > 1e-2
