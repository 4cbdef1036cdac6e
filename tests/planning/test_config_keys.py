"""`config.json` of official LLaVA: each key that LLaVA, LLaVA-NeXT or a server looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reference.cases import Converted

MM_KEYS = {
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 48,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "bases/vision_clip",
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(
    ("case", "architecture", "model_type"),
    [
        ("llama_e_full_fullvis", "LlavaLlamaForCausalLM", "llava_llama"),
        ("qwen2_e_full_fullvis", "LlavaQwenForCausalLM", "llava_qwen"),
        ("phi3_e_full_fullvis", "LlavaLlamaForCausalLM", "llava_llama"),
    ],
)
def test_the_keys_of_a_good_config(
    converted: Converted, case: str, architecture: str, model_type: str
) -> None:
    config = config_of(converted(case, dtype="float16"))
    assert {key: config[key] for key in MM_KEYS} == MM_KEYS
    assert config["architectures"] == [architecture]
    assert config["model_type"] == model_type
    assert config["torch_dtype"] == "float16"
    # Both would change what is computed, or cut the text, if they were there.
    assert "tokenizer_model_max_length" not in config and "mm_patch_merge_type" not in config
    # transformers 4.37.2 would not know them, and silently take defaults.
    assert "rope_parameters" not in config and "dtype" not in config
    assert "_name_or_path" not in config


def test_a_llama_has_what_the_loaders_need(converted: Converted) -> None:
    config = config_of(converted("llama_e_full_fullvis", dtype="float16"))
    assert config["pretraining_tp"] == 1
    assert config["rope_scaling"] is None
    assert config["rope_theta"] == 10000.0
    assert config["attention_bias"] is False


def test_a_frozen_tower_is_written_and_unfrozen_all_the_same(converted: Converted) -> None:
    """The only layout that LLaVA and LLaVA-NeXT both load right."""
    from reference.compose import read_tensors

    folder = converted("qwen2_b_full_frozenvis", dtype="float16")
    assert config_of(folder)["unfreeze_mm_vision_tower"] is True
    assert any("vision_tower" in name for name in read_tensors(folder))


def test_no_file_names_a_path_of_this_machine(converted: Converted) -> None:
    folder = converted("llama_e_full_fullvis", dtype="float16")
    for path in folder.iterdir():
        if path.suffix in (".json", ".md"):
            assert str(Path(__file__).parents[1]) not in path.read_text(), path.name
