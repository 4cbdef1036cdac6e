"""What `--format hf` writes has the names and config keys that vLLM's LLaVA loads.

vLLM itself is not run. What it takes was read in vllm-project/vllm, vllm/model_executor/models/:
llava.py (modules, `hf_to_vllm_mapper`, `load_weights`) at 35d3c24b, and its beginning at 0004c540,
which has the same modules and no renames; clip.py (modules, `post_layernorm`) at 030ea52e. Its
loader refuses any name that is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from xtuner2llava import plan

# Prefixes of a checkpoint that it renames, since 2025; other names stand for themselves.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
# What comes after `vision_tower.vision_model.` and `multi_modal_projector.`.
TOWER = re.compile(
    r"embeddings\.(class_embedding|(patch|position)_embedding\.weight)"
    r"|(pre_layrnorm|post_layernorm)\.(weight|bias)"
    r"|encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])\.(weight|bias)"
)
PROJECTOR = re.compile(r"linear_[12]\.(weight|bias)")
# Keys that its code reads without a default.
CONFIG = {
    "image_token_index",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
}


def refused(names: Iterable[str], llm: set[str], renamed: Mapping[str, str]) -> list[str]:
    """Names that no module takes; `llm` are those that the LLM's own class takes."""
    wrong = []
    for name in names:
        for old, new in renamed.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        part, _, rest = name.partition(".")
        taken = (
            (part == "language_model" and rest in llm)
            or (part == "multi_modal_projector" and PROJECTOR.fullmatch(rest))
            or (
                part == "vision_tower"
                and rest.startswith("vision_model.")
                and TOWER.fullmatch(rest.removeprefix("vision_model."))
            )
        )
        if not taken:
            wrong.append(name)
    return wrong


def made(tmp_path: Path, checkpoints: Path, kind: str, format: str = "hf") -> tuple[Any, set[str]]:
    """A plan, and the names of the LLM alone, which its own class in vLLM takes."""
    import transformers

    if not hasattr(transformers, KINDS[kind].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    source = KINDS[kind].make(tmp_path / "source")
    trained = write_trained(tmp_path / "trained", source, checkpoints)
    return plan(trained.checkpoint, format=format, **trained.bases), {*source.tensors}


@pytest.mark.parametrize("renamed", [{}, RENAMED], ids=["before", "since"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "mixtral", "gemma", "qwen2_moe"])
def test_vllm_takes_every_name(
    checkpoints: Path, tmp_path: Path, kind: str, renamed: Mapping[str, str]
) -> None:
    planned, llm = made(tmp_path, checkpoints, kind)
    names = [tensor.name for tensor in planned.tensors]
    assert len(names) > 60
    assert refused(names, llm, renamed) == []
    parts = {name.partition(".")[0] for name in names}
    assert parts == {"language_model", "vision_tower", "multi_modal_projector"}


def test_vllm_finds_the_classes_and_keys(checkpoints: Path, tmp_path: Path) -> None:
    config = made(tmp_path, checkpoints, "mistral")[0].config
    assert config.keys() >= CONFIG
    assert all(config[key] is not None for key in CONFIG)
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["model_type"] == "llava"
    # It makes the LLM by this name, and takes a Mistral without one for Pixtral.
    assert config["text_config"]["architectures"] == ["MistralForCausalLM"]
    assert config["vision_config"]["model_type"] == "clip_vision_model"


def test_names_of_official_llava_are_none_of_vllms(checkpoints: Path, tmp_path: Path) -> None:
    planned, llm = made(tmp_path, checkpoints, "llama", format="llava")
    names = [tensor.name for tensor in planned.tensors]
    assert len(refused(names, llm, {})) == len(names)
    assert "model.mm_projector.0.weight" in refused(names, llm, RENAMED)


def test_a_buffer_of_the_tower_would_be_refused() -> None:
    name = "vision_tower.vision_model.embeddings.position_ids"
    assert refused([name], set(), RENAMED) == [name]
