"""Tensors and config against XTuner's own `official` export of the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from reference.cases import Converted
from reference.compose import read_tensors

if TYPE_CHECKING:
    import torch

FULL = ["llama_b_full_frozenvis", "llama_e_full_fullvis"]
TOWER = "model.vision_tower."

# What our config has and XTuner's has not, or says differently, and why that is right.
JUSTIFIED = {
    "_name_or_path": "a path of the machine that exported; no file of ours has one",
    "mlp_bias": "LlamaConfig of transformers 4.37.2 does not know it; false is what it computes",
    "transformers_version": "the vocabulary that the file is written in, 4.37.2",
    "unfreeze_mm_vision_tower": "always true, because the tower's tensors are always written",
}


def is_llm(name: str) -> bool:
    return not name.startswith((TOWER, "model.mm_projector."))


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    import torch

    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("case", FULL)
@pytest.mark.parametrize("source", ["iter_2.pth", "iter_2_xtuner"])
def test_tensors_are_those_of_xtuners_export(
    checkpoints: Path, converted: Converted, case: str, source: str
) -> None:
    theirs = read_tensors(checkpoints / case / "official")
    rounded = read_tensors(converted(case, source, dtype="float16"))
    stored = read_tensors(converted(case, source, dtype="keep"))
    # XTuner leaves a frozen tower out; LLaVA-NeXT then computes NaN.
    assert {n for n in rounded if not n.startswith(TOWER)} == {
        n for n in theirs if not n.startswith(TOWER)
    }
    # It writes the LLM as float16, projector and tower as they were trained.
    for name, tensor in theirs.items():
        assert equal((rounded if is_llm(name) else stored)[name], tensor), name


def test_a_swapped_pair_would_be_seen(checkpoints: Path, converted: Converted) -> None:
    theirs = read_tensors(checkpoints / "llama_e_full_fullvis" / "official")
    ours = read_tensors(converted("llama_e_full_fullvis", dtype="float16"))
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    assert not equal(ours[gate], theirs[up])
    assert not equal(ours[up], theirs[gate])


def test_merged_lora_is_that_of_xtuners_export_but_for_its_rounding(
    checkpoints: Path, converted: Converted
) -> None:
    case = "llama_d_lora_vislora"
    theirs = read_tensors(checkpoints / case / "official")
    ours = read_tensors(converted(case, dtype="float16"))
    exact = read_tensors(converted(case, dtype="float32"))
    for name, tensor in theirs.items():
        mine, truth = ours[name].double(), exact[name].double()
        assert (mine - truth).abs().max() <= (tensor.half().double() - truth).abs().max(), name
        assert (mine - tensor.double()).abs().max() <= 2**-10 * truth.abs().max(), name


@pytest.mark.parametrize("case", [*FULL, "llama_d_lora_vislora"])
def test_config_is_that_of_xtuners_export_but_for_what_is_justified(
    checkpoints: Path, converted: Converted, case: str
) -> None:
    theirs = json.loads((checkpoints / case / "official" / "config.json").read_text())
    ours = json.loads((converted(case, dtype="float16") / "config.json").read_text())
    different = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert different <= set(JUSTIFIED)
    assert set(ours) <= set(theirs)
