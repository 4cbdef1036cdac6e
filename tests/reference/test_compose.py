"""The harness itself reproduces XTuner's logits from folders the converter never touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reference.cases import read_reference
from reference.compose import Llava, compose, compose_tensors

if TYPE_CHECKING:
    import torch


def distance(model: Llava, reference: dict[str, Any], name: str) -> float:
    import torch

    logits = model.logits(reference["input_ids"], reference["pixel_values"])
    return (logits - torch.from_numpy(reference[name])).abs().max().item()


def test_xtuners_own_official_export_gives_xtuners_logits(checkpoints: Path) -> None:
    case = checkpoints / "llama_e_full_fullvis"
    model = compose(case / "official", checkpoints / "bases/vision_clip")
    reference = read_reference(checkpoints, case.name)
    assert distance(model, reference, "logits_llm16") < 1e-5
    assert distance(model, reference, "logits_f32") > 1e-4  # it tells roundings apart


def qwen(checkpoints: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Config and tensors of an official-LLaVA Qwen folder, named by hand from XTuner's export."""
    from safetensors.torch import load_file

    folder = checkpoints / "qwen2_e_full_fullvis/iter_2_xtuner"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 48,
        "mm_vision_select_layer": -2,
    }
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in load_file(folder / "projector/model.safetensors").items():
        tensors[f"model.mm_projector.{name.removeprefix('model.')}"] = tensor
    for name, tensor in load_file(folder / "visual_encoder/model.safetensors").items():
        tensors[f"model.vision_tower.vision_tower.{name}"] = tensor
    return config, tensors


def qwen_distance(
    checkpoints: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]
) -> float:
    vision = json.loads((checkpoints / "bases/vision_clip/config.json").read_text())
    reference = read_reference(checkpoints, "qwen2_e_full_fullvis")
    return distance(compose_tensors(config, tensors, vision), reference, "logits_llm16")


def test_qwen_named_by_hand_gives_xtuners_logits(checkpoints: Path) -> None:
    assert qwen_distance(checkpoints, *qwen(checkpoints)) < 1e-5


def test_gate_and_up_exchanged_is_seen(checkpoints: Path) -> None:
    config, tensors = qwen(checkpoints)
    gate, up = (f"model.layers.1.mlp.{which}_proj.weight" for which in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    assert qwen_distance(checkpoints, config, tensors) > 1e-2


def test_another_rope_theta_is_seen(checkpoints: Path) -> None:
    config, tensors = qwen(checkpoints)
    assert config["rope_theta"] == 1000000.0
    assert qwen_distance(checkpoints, config | {"rope_theta": 10000.0}, tensors) > 1e-2


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.mm_projector.2.bias", "lm_head.weight"]
)
def test_a_missing_tensor_is_refused(checkpoints: Path, name: str) -> None:
    config, tensors = qwen(checkpoints)
    del tensors[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        qwen_distance(checkpoints, config, tensors)


def test_a_tensor_too_many_is_refused(checkpoints: Path) -> None:
    config, tensors = qwen(checkpoints)
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        qwen_distance(checkpoints, config, tensors)
