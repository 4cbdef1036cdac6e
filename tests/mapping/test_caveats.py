"""What is only as right as its user: mappings of their own, and defaults that stand unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from builders.families.checkpoints import write_trained
from builders.families.models import SIZES, Source, random_tensors, shapes_of_class
from xtuner2llava import PlanError, convert, plan, verify
from xtuner2llava.cli.commands import main
from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.family import Family
from xtuner2llava.planning.language_model import choose_family, translate
from xtuner2llava.planning.plan import Fidelity

CATALOGUE = Catalogue(Path(__file__).parents[2] / "mappings")
HF = CATALOGUE.formats["hf"]
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data/published_configs.json").read_text()
)


def doubts(family: Family, config: dict[str, Any]) -> list[str]:
    return [limit.text for limit in family.translate_config(config).doubts]


def own(tmp_path: Path, config: str = "", becomes: str = "llama") -> Family:
    """A mapping that keeps the sizes, and what `config` says besides."""
    keys = ", ".join(key for key in SIZES if key.endswith(("_size", "_heads", "_layers")))
    path = tmp_path / "lab.yaml"
    path.write_text(
        f"schema: 1\nfamily: lab\nbecomes: {becomes}\ntensors: [{{move: '', to: ''}}]\n"
        f"config:\n  keep: [{keys}]\n{config}"
    )
    return CATALOGUE.with_family_file(path)


LAB = {key: value for key, value in SIZES.items() if not key.startswith(("rms", "max"))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_families_have_no_doubts_about_what_is_published(name: str) -> None:
    config = PUBLISHED[name]
    family = CATALOGUE.detect(config, None)
    assert family.name == name.partition(":")[0]
    assert doubts(family, config) == []
    assert family.chosen_for(config, None).if_right is None


def test_every_family_has_a_published_config() -> None:
    assert {name.partition(":")[0] for name in PUBLISHED} == {*CATALOGUE.families}


@pytest.mark.parametrize(
    ("becomes", "key", "other", "value"),
    [
        ("llama", "rope_theta", "rope_theta", 5000000.0),
        ("llama", "rope_theta", "rotary_base", 1000000),
        ("llama", "rope_theta", "rotary_emb_base", 1000000),
        ("llama", "rope_theta", "rope_freq_base", 500000.0),
        ("llama", "rope_theta", "rotary_embedding_base", 500000.0),
        ("llama", "rope_theta", "rotary", {"base": 500000.0}),
        ("llama", "rms_norm_eps", "layer_norm_epsilon", 1e-5),
        ("llama", "rms_norm_eps", "layernorm_epsilon", 1e-5),
        ("llama", "rms_norm_eps", "norm_eps", 1e-5),
        ("llama", "num_key_value_heads", "n_kv_heads", 2),
        ("llama", "num_key_value_heads", "multi_query_group_num", 2),
        ("llama", "num_key_value_heads", "num_query_groups", 2),
        ("llama", "num_key_value_heads", "n_head_kv", 2),
        ("llama", "hidden_act", "activation_function", "gelu"),
        ("llama", "hidden_act", "activation", "relu2"),
        ("llama", "tie_word_embeddings", "tie_embeddings", True),
        ("llama", "rope_scaling", "rope_scaling_factor", 8.0),
        ("llama", "rope_scaling", "rope_scaling", {"type": "linear", "factor": 8.0}),
        ("llama", "max_position_embeddings", "seq_length", 8192),
        ("llama", "attention_bias", "qkv_bias", True),
        ("mistral", "sliding_window", "window_size", 512),
        ("mixtral", "num_local_experts", "num_experts", 16),
        ("mixtral", "num_experts_per_tok", "top_k", 1),
    ],
)
def test_a_default_beside_a_key_like_it_is_named(
    tmp_path: Path, becomes: str, key: str, other: str, value: object
) -> None:
    config = {**LAB, other: value}
    named = f"{other}.base" if isinstance(value, dict) and "base" in value else other
    found = doubts(own(tmp_path, becomes=becomes), config)
    (said,) = [text for text in found if text.startswith(f"{key} is ")]
    assert f"nothing reads {named}, which the LLM's config says is " in said

    # Neither a key that the file makes nor an equal value is in doubt.
    if key != "rope_scaling" and key == other:
        assert doubts(own(tmp_path, f"  set: {{{key}: {value}}}\n", becomes), config) == []
    default = CATALOGUE.classes[becomes].config.default[key]
    if default is not None and named == other:
        assert doubts(own(tmp_path, becomes=becomes), {**LAB, other: default}) == []
    scaling = key == "rope_scaling"
    made = "set: {rope_scaling: null}" if scaling else f"derive: {{{key}: {named}}}"
    found = doubts(own(tmp_path, f"  {made}\n", becomes), config)
    assert [text for text in found if text.startswith(f"{key} is ")] == []


@pytest.mark.parametrize(
    ("key", "other", "value", "advice"),
    [
        ("rope_theta", "rotary_base", 5.0, "`derive: {rope_theta: rotary_base}` reads it"),
        ("rope_theta", "rotary", {"base": 5.0}, "`derive: {rope_theta: rotary.base}` reads it"),
        ("rope_theta", "rope_theta", 5.0, "`keep: [rope_theta]` keeps it"),
        # What no expression reads.
        ("rope_theta", "rotary-base", 5.0, "`set: {rope_theta: 5.0}` says the same"),
        ("rope_theta", "rotary.base", 5.0, "`set: {rope_theta: 5.0}` says the same"),
        ("rms_norm_eps", "layer norm eps", 3e-6, "`set: {rms_norm_eps: 3e-06}` says the same"),
        # A rope_scaling is a table of a type and a factor, and nothing else is one.
        ("rope_scaling", "rotary", {"base": 10000, "type": "dynamic"}, "{type: TYPE, factor: N"),
        ("rope_scaling", "rope_scaling_factor", 8.0, "`set: {rope_scaling: {type: TYPE, factor: N"),
        ("rope_scaling", "rotary", {"scaling_factor": 2.0}, "{type: TYPE, factor: NUMBER}}` says"),
        ("rope_scaling", "rotary_scaling", {"type": "linear", "factor": 2.0},
         "`derive: {rope_scaling: rotary_scaling}` reads it"),
    ],
)  # fmt: skip
def test_what_is_advised_for_such_a_default_works(
    tmp_path: Path, key: str, other: str, value: object, advice: str
) -> None:
    config = {**LAB, other: value}
    (said,) = [text for text in doubts(own(tmp_path), config) if text.startswith(f"{key} is ")]
    assert f"in a mapping, {advice}" in said or f"`set: {{rope_scaling: {advice}" in said
    if key == "rope_scaling" and "derive" not in advice:
        assert "derive" not in said and "keep" not in said
        return
    rule = advice.split("`")[1]
    family = own(tmp_path, "" if rule.startswith("keep") else f"  {rule}\n")
    if rule.startswith("keep"):
        path = tmp_path / "lab.yaml"
        path.write_text(path.read_text().replace("keep: [", f"keep: [{key}, "))
        family = CATALOGUE.with_family_file(path)
    translated = family.translate_config(config)
    expected = 5.0 if key == "rope_theta" else value
    assert (translated.values[key], translated.doubts) == (expected, ())


def test_names_and_values_of_a_config_stay_on_their_line(tmp_path: Path) -> None:
    config = {**LAB, "rotary\nbase": 5}
    (said,) = doubts(own(tmp_path), config)
    assert "nothing reads 'rotary\\nbase', which" in said
    path = tmp_path / "lab.yaml"
    path.write_text(path.read_text() + "caveats: [{say: 'is {said}'}]\n")
    family = CATALOGUE.with_family_file(path)
    said = [limit.text for limit in family.limits({**LAB, "said": "a\nNote: b"})][-1]
    assert said == "is 'a\\nNote: b'"


@pytest.mark.parametrize(
    ("other", "value"),
    [
        ("rope_theta", None),
        ("rotary_base", "large"),
        ("rotary_dim", 64),
        ("activation", "swiglu"),
        ("attn_dropout", 0.1),
        ("init_std", 0.3),
        ("hidden_dropout", 0.1),
        ("use_rope_scaling", True),
        ("layer_norm_type", "rms"),
        ("num_heads_of_something_else", 3),
    ],
)
def test_what_is_of_another_kind_or_computes_nothing_is_not(
    tmp_path: Path, other: str, value: object
) -> None:
    assert doubts(own(tmp_path), {**LAB, other: value}) == []


def test_a_mapping_of_ones_own_is_exact_if_it_is_right(tmp_path: Path) -> None:
    _, limits = translate(own(tmp_path), LAB, HF)
    verdict = Fidelity.of(limits)
    assert str(verdict) == "exact if lab.yaml is right; its logits were not compared"
    assert verdict.to_dict()["verdict"] == "exact_if_right"
    _, limits = translate(own(tmp_path), {**LAB, "rotary_base": 5}, HF)
    assert str(Fidelity.of(limits)) == "possible, not exact"
    assert not any(limit.text.startswith("Exact") for limit in limits)


def test_so_is_a_shipped_family_for_another_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = {**LAB, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert choose_family(CATALOGUE, "llama", llama, None).if_right is None
    # A folder of that name is not the mapping.
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert choose_family(CATALOGUE, "llama", llama, None).if_right is None
    with pytest.raises(MappingError, match="is not a file"):
        choose_family(CATALOGUE, "./llama", llama, None)
    other = {**llama, "architectures": ["LabForCausalLM"], "model_type": "lab"}
    family = choose_family(CATALOGUE, "llama", other, None)
    assert str(Fidelity.of(family.limits(other))) == (
        "exact if family llama for this LLM is right; its logits were not compared"
    )
    with pytest.raises(MappingError, match="no family fits"):
        choose_family(CATALOGUE, None, other, None)


RENAMED = {
    "model.embed_tokens": "tok",
    "model.norm": "norm",
    "lm_head": "out",
    "model.layers": "blocks",
    "self_attn.": "",
    "_proj": "",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "block_sparse_moe.gate": "router",
    "block_sparse_moe.": "",
    "w2": "down",
}


def moe(folder: Path) -> tuple[Path, Source, dict[str, torch.Tensor]]:
    """The page's mixture of experts: its mapping, the model, and the Mixtral that it is."""
    text = (Path(__file__).parents[2] / "docs/mappings.md").read_text()
    path = folder / "lab-moe.yaml"
    path.write_text(text.split("```yaml\n")[2].split("```")[0])
    config = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 3, "rope_theta": 5000.0}
    expected = random_tensors(shapes_of_class({**config, "model_type": "mixtral"}))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in expected.items():
        if name.endswith(("w1.weight", "w3.weight")):
            continue
        for one, other in RENAMED.items():
            name = name.replace(one, other)
        tensors[name] = tensor
    for layer in range(2):
        at = f"model.layers.{layer}.block_sparse_moe.experts"
        experts = [
            torch.cat([expected[f"{at}.{e}.w1.weight"], expected[f"{at}.{e}.w3.weight"]])
            for e in range(3)
        ]
        tensors[f"blocks.{layer}.experts.gate_up"] = torch.stack(experts)
    source = {k: v for k, v in config.items() if k not in ("intermediate_size", "rms_norm_eps")}
    names = {"ffn": 96, "eps": 1e-5, "n_experts": 3, "top_k": 2, "hidden_size": 64}
    source |= {**names, "architectures": ["LabMoeForCausalLM"], "model_type": "lab_moe"}
    del source["num_local_experts"]
    return path, Source(source, tensors, None), expected


def test_the_readmes_mixture_of_experts_is_converted(tmp_path: Path, checkpoints: Path) -> None:
    from safetensors.torch import load_file

    path, source, expected = moe(tmp_path)
    assert Catalogue.shipped().check(path) == []
    trained = write_trained(tmp_path / "trained", source, checkpoints)
    out = tmp_path / "llava-mixtral-lab"
    report = convert(trained.checkpoint, out, mapping=path, dtype="keep", **trained.bases)
    made = load_file(out / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(made[name], tensor), name
    how = {planned.name: planned.how for planned in report.plan.tensors}
    assert how["model.layers.1.block_sparse_moe.experts.2.w3.weight"] == "copy"
    said = json.loads((out / "config.json").read_text())
    assert [said[k] for k in ("num_local_experts", "num_experts_per_tok")] == [3, 2]
    again = verify(out, against=trained.checkpoint, mapping=path, dtype="keep", **trained.bases)
    assert again.passed

    phrase = "if lab-moe.yaml is right; its logits were not compared"
    assert report.to_dict()["plan"]["verdict"] == "exact_if_right"  # type: ignore[index,call-overload]
    assert json.loads((out / "conversion.json").read_text())["if_right"] == "lab-moe.yaml"
    assert phrase in (out / "README.md").read_text()
    assert phrase in (out / "conversion.json").read_text()
    bases = ["--llm", str(trained.llm), "--vision", str(trained.vision), "--mapping", str(path)]
    named = ["--vision-tower-name", str(trained.bases["vision_tower_name"])]
    for command, more in (("inspect", []), ("plan", named)):
        result = CliRunner().invoke(main, [command, str(trained.checkpoint), *bases, *more])
        assert phrase in result.stdout, result.output

    # A slip in the name of a token is said.
    slip = tmp_path / "slip.yaml"
    slip.write_text(path.read_text() + 'generation: {eos: ["</S>"]}\n')
    text = "none of the tokens that slip.yaml names as eos (</S>)"
    assert any(text in n for n in plan(trained.checkpoint, mapping=slip, **trained.bases).notes)
    assert not any("names as eos" in note for note in report.plan.notes)

    # One expert too few in the config is said by both rules.
    config = {**source.config, "n_experts": 2}
    wrong = write_trained(tmp_path / "wrong", Source(config, source.tensors, None), checkpoints)
    with pytest.raises(PlanError, match=r"shape \[3, 192, 64\] is not 2 tensors, stacked"):
        convert(wrong.checkpoint, tmp_path / "no", mapping=path, **wrong.bases)
