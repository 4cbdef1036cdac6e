"""What a plan says besides: dtypes that are rounded, images, and names of the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import plan
from xtuner2llava.planning.plan import Plan


def make(checkpoints: Path, case: str, llm: str, **options: Any) -> Plan:
    return plan(
        checkpoints / case,
        llm=checkpoints / "bases" / llm,
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/clip",
        **options,
    )


def test_float32_that_is_rounded_to_bfloat16_is_said(checkpoints: Path) -> None:
    made = make(checkpoints, "qwen2_e_full_fullvis/iter_2.pth", "llm_qwen2")
    assert made.dtype == made.config["torch_dtype"] == "bfloat16"
    assert any(
        "--dtype float16 rounds once for that, instead of twice" in note for note in made.notes
    )


def test_float16_that_is_rounded_to_bfloat16_is_said(checkpoints: Path) -> None:
    made = make(checkpoints, "qwen2_e_full_fullvis/iter_2_xtuner", "llm_qwen2")
    assert any("stored as float16 and is rounded to bfloat16" in note for note in made.notes)


def test_as_stored(checkpoints: Path) -> None:
    made = make(checkpoints, "qwen2_e_full_fullvis/iter_2_xtuner", "llm_qwen2", dtype="keep")
    dtypes = {planned.component: planned.tensor.dtype.name for planned in made.tensors}
    assert dtypes == {"llm": "float16", "visual_encoder": "float32", "projector": "float32"}
    assert made.config["torch_dtype"] == "float16"
    assert {planned.how for planned in made.tensors} == {"copy"}


def test_a_given_config_that_is_not_the_checkpoints_own_is_said(
    checkpoints: Path, tmp_path: Path
) -> None:
    bases = {"llm": tmp_path / "llm_qwen2", "vision": tmp_path / "vision_clip"}
    changes: dict[str, dict[str, Any]] = {
        "llm": {"rope_theta": 10000.0, "use_cache": False},
        "vision": {"hidden_act": "gelu"},
    }
    for part, folder in bases.items():
        shutil.copytree(checkpoints / "bases" / folder.name, folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes[part]}))
    folder = checkpoints / "qwen2_e_full_fullvis/iter_2_xtuner"
    made = plan(folder, vision_tower_name="openai/clip", **bases)
    llm, tower = (note for note in made.notes if "is that of the training" in note)
    assert llm.startswith(f"{bases['llm']}/config.json is used, and the checkpoint's own ")
    assert "training: rope_theta is 10000.0 here and 1000000.0 there. Without --llm" in llm
    assert "training: hidden_act is gelu here and quick_gelu there." in tower
    same = make(checkpoints, "qwen2_e_full_fullvis/iter_2_xtuner", "llm_qwen2")
    assert not any("is that of the training" in note for note in same.notes)


def test_code_of_the_base_is_not_called_the_plain_class(checkpoints: Path, tmp_path: Path) -> None:
    llm = shutil.copytree(checkpoints / "bases/llm_qwen2", tmp_path / "llm_qwen2")
    values = json.loads((llm / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (llm / "config.json").write_text(json.dumps(values))
    bases = {"llm": llm, "vision": checkpoints / "bases/vision_clip"}
    made = plan(checkpoints / "qwen2_a_pretrain/iter_2.pth", vision_tower_name="openai/c", **bases)
    assert made.fidelity.kind == "exact_if_right"
    assert any("Qwen2ForCausalLM in place of modeling_own.OwnForCausalLM" in n for n in made.notes)


@pytest.mark.parametrize(
    ("case", "llm", "needs"),
    [
        ("qwen2_e_full_fullvis/iter_2.pth", "llm_qwen2", ("llava", "qwen")),
        ("llama_e_full_fullvis/iter_2.pth", "llm_llama", ("llava",)),
    ],
)
def test_the_suggested_name_is_one_that_works(
    checkpoints: Path, case: str, llm: str, needs: tuple[str, ...]
) -> None:
    made = make(checkpoints, case, llm)
    assert made.suggested_name == f"llava-{llm}-xtuner"
    assert made.folder_name.needs == needs
    assert made.folder_name.reasons(made.suggested_name) == ""
    assert make(checkpoints, case, llm, format="hf").folder_name.reasons("anything") == ""


SPACES = "tokenizer.model, which drops repeated spaces"


@pytest.mark.parametrize(
    ("case", "llm", "format", "is_said"),
    [
        ("llama_e_full_fullvis/iter_2.pth", "llm_llama", "llava", True),
        ("llama_e_full_fullvis/iter_2.pth", "llm_llama", "hf", False),
        ("qwen2_e_full_fullvis/iter_2.pth", "llm_qwen2", "llava", False),
    ],
)
def test_spaces_that_official_llava_drops_are_said(
    checkpoints: Path, case: str, llm: str, format: str, is_said: bool
) -> None:
    notes = make(checkpoints, case, llm, format=format).notes
    assert any(SPACES in note for note in notes) is is_said


def test_they_are_lost_without_a_tokenizer_json(checkpoints: Path, tmp_path: Path) -> None:
    llm = shutil.copytree(checkpoints / "bases/llm_llama", tmp_path / "llm")
    (llm / "tokenizer.json").unlink()
    case = checkpoints / "llama_e_full_fullvis/iter_2.pth"
    made = plan(case, llm=llm, vision=checkpoints / "bases/vision_clip", vision_tower_name="x")
    (note,) = [note for note in made.notes if SPACES in note]
    assert "A prompt lacks those tokens there" in note
    config = tmp_path / "config.py"
    text = (case.parent / "config.py").read_text()
    config.write_text(text.replace("padding_side=", "use_fast=False, padding_side="))
    made = plan(
        case,
        llm=llm,
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="x",
        xtuner_config=config,
    )
    assert not any(SPACES in note for note in made.notes)


@pytest.mark.parametrize("left_out", ["", "decoder", "pre_tokenizer"])
@pytest.mark.parametrize("drops", [True, False])
def test_spaces_that_training_drops_too_are_not_said(
    drops: bool, left_out: str, checkpoints: Path, tmp_path: Path
) -> None:
    """Also where LLaVA's transformers does not read the tokenizer.json that training had."""
    llm = shutil.copytree(checkpoints / "bases/llm_llama", tmp_path / "llm")
    values = json.loads((llm / "tokenizer.json").read_text())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    written = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    values["normalizer"] = {"type": "Sequence", "normalizers": [strip] * drops + written}
    values["pre_tokenizer"] = None
    if left_out:
        values[left_out] = {"type": "OfALaterVersion"}
    (llm / "tokenizer.json").write_text(json.dumps(values))
    case = checkpoints / "llama_e_full_fullvis/iter_2.pth"
    made = plan(case, llm=llm, vision=checkpoints / "bases/vision_clip", vision_tower_name="x")
    assert ("tokenizer.json" in made.files) is not bool(left_out)
    assert any(SPACES in note for note in made.notes) is not drops


def test_every_tensor_says_what_it_is_made_of(checkpoints: Path) -> None:
    made = make(checkpoints, "llama_e_full_fullvis/iter_2.pth", "llm_llama", format="hf")
    by_name = {planned.name: planned for planned in made.tensors}
    embed = by_name["language_model.model.embed_tokens.weight"]
    assert embed.sources == ("model.embed_tokens.weight",)
    assert embed.rule.startswith("move families/llama.yaml:")
    assert (embed.how, embed.tensor.shape) == ("compute", (448, 64))
    linear = by_name["multi_modal_projector.linear_2.bias"]
    assert linear.sources == ("model.2.bias",)
    assert linear.rule.startswith("move formats/hf.yaml:")
    assert by_name["language_model.model.norm.weight"].how == "cast from float32"


def test_the_plan_as_json_names_what_is_made(checkpoints: Path) -> None:
    found = make(checkpoints, "llama_e_full_fullvis/iter_2.pth", "llm_llama", format="hf").to_dict()
    assert found["copied_files"] == ["tokenizer.model"]
    assert found["made_files"] == [
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
        "processor_config.json",
    ]
