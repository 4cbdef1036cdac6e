"""Configs of any transformers, in the vocabulary of 4.37."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.sources.model_config import (
    ModelConfig,
    in_437_vocabulary,
    read_model_config,
    vision_tower_config,
)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # transformers 5: dtype, rope_parameters.
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "torch.float16"}, {"torch_dtype": "float16"}),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            {"rope_theta": 1e6, "rope_scaling": None},
        ),
        ({"rope_parameters": {"rope_theta": 1e4}}, {"rope_theta": 1e4, "rope_scaling": None}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        ),
        # 4.45 to 4.57: rope_type in rope_scaling, sometimes beside type.
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        ),
        (
            {"rope_scaling": {"factor": 2.0, "rope_type": "linear", "type": "linear"}},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ({"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": None}),
        # 5 takes both names for its table; of two places, all others read the one outside.
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_scaling": None},
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_theta": 1e4, "rope_scaling": None},
        ),
        # 4.37 itself, and keys that no version knows.
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
        ),
        ({"rope_scaling": None, "other": [1]}, {"rope_scaling": None, "other": [1]}),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ),
    ],
)
def test_the_vocabulary_of_437(given: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(given)
    assert in_437_vocabulary(given) == expected
    assert json.dumps(given) == before


def test_a_config_is_read_from_its_folder(tmp_path: Path) -> None:
    values = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM", 5], "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_model_config(tmp_path)
    assert (config.model_type, config.architectures) == ("qwen2", ("Qwen2ForCausalLM",))
    assert config.values["torch_dtype"] == "float16"
    assert config.path == tmp_path / "config.json"


@pytest.mark.parametrize("values", [{"model_type": 5}, {"architectures": "Qwen2ForCausalLM"}])
def test_keys_of_a_wrong_type_are_missing(values: dict[str, Any]) -> None:
    config = ModelConfig(Path("config.json"), values)
    assert (config.model_type, config.architectures) == (None, ())


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"config\.json: cannot be read \(No such file"):
        read_model_config(tmp_path)


def test_the_vision_part_of_a_whole_clip_model() -> None:
    # Without sizes, it is openai/clip-vit-base-patch32.
    whole = {"model_type": "clip", "vision_config": {"patch_size": 14}, "hidden_size": 9}
    values = vision_tower_config(ModelConfig(Path("c"), whole)).values
    assert values["model_type"] == "clip_vision_model"
    assert (values["patch_size"], values["hidden_size"], values["image_size"]) == (14, 768, 224)


@pytest.mark.parametrize("value", [0, -1, 14.0, "14", None, True, [14]])
def test_sizes_that_are_none(value: object) -> None:
    given = {"model_type": "clip_vision_model", "patch_size": value}
    with pytest.raises(CorruptFileError, match=r"'patch_size' is .*, expected a positive integer"):
        vision_tower_config(ModelConfig(Path("config.json"), given))  # type: ignore[arg-type]
