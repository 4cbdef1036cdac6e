"""Families that only the Hugging Face format can carry: the plain model that comes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS, Source, load_plain
from xtuner2llava import PlanError, plan
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.family import Family
from xtuner2llava.mapping.plain_class import check_against_class
from xtuner2llava.storage.weights import open_weights

CATALOGUE = Catalogue(Path(__file__).parents[2] / "mappings")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3_gqa_tied": ("qwen3", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3_biases": ("qwen3", {"attention_bias": True}),
    "phi3_long": ("phi3_long", {}),
    "phi3_long_tied": ("phi3_long", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma": ("gemma", {}),
    "gemma_mha": ("gemma", {"num_key_value_heads": 4}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe_gqa": ("qwen2_moe", {"num_key_value_heads": 2, "decoder_sparse_step": 2}),
    "llama_3_1": ("llama_3_1", {}),
    "llama_3_2_gqa_tied": ("llama_3_1", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}
SAME, DIFFERENT = 1e-5, 1e-2


@dataclass(frozen=True, slots=True)
class Plain:
    """A source model, and the config and tensors that its family makes of it."""

    source: Source
    config: dict[str, Any]
    tensors: dict[str, Any]

    def distance(self, folder: Path) -> float:
        """The largest difference between logits of the source and of the plain model."""
        import torch

        architecture = self.config.pop("architecture")
        config = {**self.config, "architectures": [architecture], "torch_dtype": "float32"}
        made = load_plain(folder, config, self.tensors)
        embeddings = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected = self.source.model(inputs_embeds=embeddings, use_cache=False).logits
            found = made(inputs_embeds=embeddings, use_cache=False).logits
        assert expected.abs().max() > 0.5
        return (found - expected).abs().max().item()


def make(case: str, folder: Path) -> tuple[Source, Any]:
    """The source model of a case, and its tensors as the converter opens them."""
    import transformers

    kind, change = CASES[case]
    if not hasattr(transformers, KINDS[kind].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    source = KINDS[kind].make(folder / "source", **change)
    return source, open_weights(folder / "source/model.safetensors").tensors


def plain(source: Source, tensors: Any, family: Family) -> Plain:
    values = family.translate_config(source.config).values
    made = family.apply(source.config, tensors)
    shapes = {name: tensor.shape for name, tensor in made.outputs.items()}
    assert check_against_class(family.target_class, values, shapes, made.origins) == []
    config = {
        **values,
        "model_type": family.target_class.model_type,
        "architecture": family.target_class.architecture,
        "pad_token_id": source.config.get("pad_token_id"),
    }
    read = {name: tensor.read(0, tensor.rows) for name, tensor in made.outputs.items()}
    return Plain(source, config, read)


@pytest.mark.parametrize("case", CASES)
def test_a_family_computes_what_it_did(tmp_path: Path, case: str) -> None:
    source, tensors = make(case, tmp_path)
    family = CATALOGUE.detect(source.config, tensors.keys())
    assert family.name == ("llama" if case.startswith("llama") else CASES[case][0])
    assert plain(source, tensors, family).distance(tmp_path / "made") < SAME


@pytest.mark.parametrize(
    ("case", "extends", "change"),
    [
        ("qwen3", "qwen3", "mlp.gate_proj.weight: mlp.up_proj.weight"),
        ("qwen3_gqa_tied", "qwen3", "self_attn.q_norm.weight: self_attn.k_norm.weight"),
        ("qwen3", "qwen3", "self_attn.k_proj.weight: self_attn.v_proj.weight"),
        ("gemma", "gemma", "mlp.gate_proj.weight: mlp.up_proj.weight"),
        ("gemma_mha", "gemma", "self_attn.k_proj.weight: self_attn.v_proj.weight"),
        ("qwen2_moe", "qwen2_moe", "self_attn.k_proj.weight: self_attn.v_proj.weight"),
        ("llama_3_1", "llama", "mlp.gate_proj.weight: mlp.up_proj.weight"),
    ],
)
def test_two_tensors_exchanged_are_seen(
    tmp_path: Path, case: str, extends: str, change: str
) -> None:
    source, tensors = make(case, tmp_path)
    one, other = change.split(": ")
    path = tmp_path / "wrong.yaml"
    path.write_text(f"""\
schema: 1
family: wrong
extends: {extends}
tensors:
  - for: {{i: num_hidden_layers}}
    from: model.layers.{{i}}
    to: model.layers.{{i}}
    rules: [{{rename: {{{one}: {other}, {other}: {one}}}}}]
""")
    wrong = plain(source, tensors, CATALOGUE.with_family_file(path))
    assert wrong.distance(tmp_path / "made") > DIFFERENT


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama_3_1", {"rope_scaling": None}),
        ("qwen3_gqa_tied", {"rope_theta": 500.0}),
        ("phi3_long", {"rope_scaling": None}),
        ("phi3_long", {"original_max_position_embeddings": 256}),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "silu"}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen2_moe", {"num_experts_per_tok": 1}),
    ],
)
def test_another_config_is_seen(tmp_path: Path, case: str, change: dict[str, Any]) -> None:
    source, tensors = make(case, tmp_path)
    made = plain(source, tensors, CATALOGUE.detect(source.config, tensors.keys()))
    assert {key: made.config[key] for key in change} != change
    made.config.update(change)
    assert made.distance(tmp_path / "made") > DIFFERENT


def test_the_experts_of_a_layer_are_not_interchangeable(tmp_path: Path) -> None:
    source, tensors = make("qwen2_moe", tmp_path)
    made = plain(source, tensors, CATALOGUE.families["qwen2_moe"])
    one, other = (f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in (0, 1))
    made.tensors[one], made.tensors[other] = made.tensors[other], made.tensors[one]
    assert made.distance(tmp_path / "made") > DIFFERENT


@pytest.mark.parametrize(
    ("case", "reason", "advice"),
    [
        ("qwen3", "Qwen 3 has norms on q and k", '`format="hf"`, which carries it'),
        (
            "phi3_long",
            "scales its rotary embedding per dimension",
            '`format="hf"`, which carries it',
        ),
        ("gemma", "no class for Gemma", '`format="hf"`, which carries it'),
        ("qwen2_moe", "no class for Qwen2-MoE", '`format="hf"`, which carries it'),
        ("llama_3_1", "rope_scaling {type: 'llama3'", "Expected"),
    ],
)
def test_official_llava_has_no_place_for_them(
    tmp_path: Path, checkpoints: Path, case: str, reason: str, advice: str
) -> None:
    source, _ = make(case, tmp_path)
    trained = write_trained(tmp_path / "trained", source, checkpoints)
    with pytest.raises(PlanError) as caught:
        plan(trained.checkpoint, **trained.bases)
    (fault,) = caught.value.faults
    assert reason in fault.what
    assert advice in fault.advice
