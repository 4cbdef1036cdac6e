"""Every family, put into XTuner's form and converted, computes what its own architecture computes.

Each is shown together with a tempting wrong mapping, whose shapes fit and whose logits do not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders.families.checkpoints import Trained, write_trained
from builders.families.models import KINDS, Source, load_plain
from reference.compose import compose, read_tensors
from reference.measured import Measured
from xtuner2llava import PlanError, convert, plan
from xtuner2llava.mapping.catalogue import Catalogue

# Float32 sums in another order; logits are about 1.
SAME = 1e-5
DIFFERENT = 1e-2
CATALOGUE = Catalogue(Path(__file__).parents[2] / "mappings")

# A kind, and what of its config is changed: grouped queries, a tied head, a switch.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_gqa": ("llama", {"num_key_value_heads": 2}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2_gqa_tied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "mistral_gqa": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "phi3": ("phi3", {}),
    "phi3_gqa": ("phi3", {"num_key_value_heads": 1}),
    "qwen": ("qwen", {}),
    "qwen_early": ("qwen_early", {}),
    "internlm": ("internlm", {}),
    "internlm_20b": ("internlm", {"bias": False}),
    "internlm2": ("internlm2", {}),
    "internlm2_gqa": ("internlm2", {"num_key_value_heads": 2}),
    "internlm2_dynamic": (
        "internlm2",
        {"num_key_value_heads": 1, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "internlm2_early": ("internlm2_early", {}),
    "internlm3": ("internlm3", {"num_key_value_heads": 4}),
    "internlm3_gqa": ("internlm3", {}),
    "yi": ("yi", {"num_key_value_heads": 4}),
    "yi_gqa": ("yi", {}),
    "baichuan": ("baichuan", {}),
    "baichuan2": ("baichuan2", {}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Any:
    """Source and checkpoint of a kind, made once for the same changes."""
    made: dict[str, tuple[Source, Trained]] = {}

    def make(kind: str, change: dict[str, Any]) -> tuple[Source, Trained]:
        key = f"{kind} {change}"
        if key not in made:
            folder = tmp_path_factory.mktemp("family")
            source = KINDS[kind].make(folder / "model", **change)
            made[key] = source, write_trained(folder / "trained", source, checkpoints)
        return made[key]

    return make


def distance(source: Source, trained: Trained, out: Path, **options: Any) -> float:
    """The largest difference between logits before and after a conversion, for text and image."""
    import numpy
    import torch

    convert(trained.checkpoint, out, dtype="float32", **trained.bases, **options)
    ids = numpy.array([[7, 300, 21, -200, 55, 131, 399, 2]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(2)).numpy()
    after = compose(out, trained.vision)
    before = replace(after, language_model=source.model)
    expected = before.logits(ids, pixels)
    assert len(expected) > 20  # the image's patches are in it
    assert expected.abs().max() > 0.5
    return (after.logits(ids, pixels) - expected).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_a_family_computes_what_it_did(
    sources: Any, tmp_path: Path, measured: Measured, case: str
) -> None:
    kind, change = CASES[case]
    source, trained = sources(kind, change)
    found = distance(source, trained, tmp_path / f"llava-{kind}")
    assert found < SAME
    measured.exact(tmp_path / f"llava-{kind}", found)


REFUSED = sorted(
    name
    for name, family in CATALOGUE.families.items()
    if family.target_class.name in CATALOGUE.formats["llava"].refused
)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_without_a_class_is_refused(sources: Any, measured: Measured, kind: str) -> None:
    import transformers

    if not hasattr(transformers, KINDS[kind].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    _, trained = sources(kind, {})
    with pytest.raises(PlanError, match='format="hf"') as error:
        plan(trained.checkpoint, **trained.bases)
    (where,) = {fault.where for fault in error.value.faults}
    assert where.startswith("refusals.yaml:")
    measured.refused(where)


def test_every_family_is_tried() -> None:
    kinds = {"mixtral", *(kind for kind, _ in CASES.values())}
    assert not kinds & {*REFUSED}
    assert kinds | {*REFUSED} == {*CATALOGUE.families}


def wrong_mapping(folder: Path, family: str, *changes: tuple[str, str]) -> Path:
    """The family's file with some text changed; each text must be there once."""
    text = CATALOGUE.text_of(family)
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"wrong-{family}.yaml"
    path.write_text(text)
    return path


def exchanging(folder: Path, family: str, one: str, other: str) -> Path:
    """A mapping that extends `family`, and gives two tensors of each layer each other's name."""
    path = folder / f"wrong-{family}.yaml"
    path.write_text(f"""\
schema: 1
family: wrong
extends: {family}
tensors:
  - for: {{i: num_hidden_layers}}
    from: model.layers.{{i}}
    to: model.layers.{{i}}
    rules: [{{rename: {{{one}: {other}, {other}: {one}}}}}]
""")
    return path


GATE_AND_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
KEYS_AND_VALUES = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")


@pytest.mark.parametrize(
    ("case", "exchanged"),
    [
        ("llama", GATE_AND_UP),
        ("llama_gqa", KEYS_AND_VALUES),
        ("llama_tied", ("input_layernorm.weight", "post_attention_layernorm.weight")),
        ("qwen2", GATE_AND_UP),
        ("qwen2_gqa_tied", KEYS_AND_VALUES),
        ("qwen2", ("self_attn.k_proj.bias", "self_attn.v_proj.bias")),
        ("mistral", GATE_AND_UP),
        ("mistral_gqa", KEYS_AND_VALUES),
        ("internlm", GATE_AND_UP),
        ("internlm3_gqa", GATE_AND_UP),
        ("internlm3_gqa", KEYS_AND_VALUES),
        ("baichuan", GATE_AND_UP),
        ("yi_gqa", KEYS_AND_VALUES),
    ],
)
def test_two_tensors_exchanged_are_seen(
    sources: Any, tmp_path: Path, case: str, exchanged: tuple[str, str]
) -> None:
    kind, change = CASES[case]
    source, trained = sources(kind, change)
    mapping = exchanging(tmp_path, kind, *exchanged)
    assert distance(source, trained, tmp_path / "llava-mistral-wrong", mapping=mapping) > DIFFERENT


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        pytest.param(
            "qwen",
            [("w1.weight: mlp.up_proj", "w1.weight: mlp.gate_proj"),
             ("w2.weight: mlp.gate_proj", "w2.weight: mlp.up_proj")],
            id="qwen: silu on w1, as its name suggests",
        ),
        pytest.param(
            "qwen",
            [("[self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]",
              "[self_attn.q_proj.weight, self_attn.v_proj.weight, self_attn.k_proj.weight]")],
            id="qwen: k and v exchanged",
        ),
        pytest.param(
            "qwen",
            [("split: attn.c_attn.bias", "rename: {unused: unused}\n        if: false"),
             ("        into: [self_attn.q_proj.bias, self_attn.k_proj.bias, "
              "self_attn.v_proj.bias]\n        sizes: [hidden, hidden, hidden]\n",
              "".join(f"      - {{fill: self_attn.{part}_proj.bias, shape: [hidden], value: 0}}\n"
                      for part in "qkv")),
             ('  - drop: "**.rotary_emb.inv_freq"',
              '  - {drop: "**.c_attn.bias", because: forgotten}\n  - drop: "**.inv_freq"')],
            id="qwen: bias forgotten",
        ),
        pytest.param(
            "qwen", [("rope_theta: rotary_emb_base * 1.0", "rope_theta: 10000.0")],
            id="qwen: another rotary base",
        ),
        pytest.param(
            "qwen_early", [("config:\n", "config:\n  derive: {rope_theta: 10000.0}\n")],
            id="qwen_early: another rotary base",
        ),
        pytest.param(
            "internlm",
            [("attention_bias: bias  ", "attention_bias: false  "),
             ('  - drop: "**.rotary_emb.inv_freq"',
              '  - {drop: "**.bias", because: forgotten}\n  - drop: "**.inv_freq"')],
            id="internlm: bias forgotten",
        ),
        pytest.param(
            "internlm", [("rope_theta: rotary.base * 1.0", "rope_theta: 10000.0")],
            id="internlm: another rotary base",
        ),
        pytest.param(
            "internlm2_gqa",
            [("feed_forward.w1.weight: mlp.gate_proj", "feed_forward.w1.weight: mlp.up_proj"),
             ("feed_forward.w3.weight: mlp.up_proj", "feed_forward.w3.weight: mlp.gate_proj")],
            id="internlm2: gate and up exchanged",
        ),
        pytest.param(
            "internlm2_gqa",
            [("      - deinterleave:", "      - split:"),
             ("        groups: num_key_value_heads\n", ""),
             ("slots: [queries * head, head, head]",
              "sizes: [hidden_size, num_key_value_heads * head, num_key_value_heads * head]")],
            id="internlm2: q, k, v one after the other",
        ),
        pytest.param(
            "internlm2",
            [("[self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]",
              "[self_attn.q_proj.weight, self_attn.v_proj.weight, self_attn.k_proj.weight]")],
            id="internlm2: k and v exchanged",
        ),
        pytest.param(
            "phi3",
            [("[mlp.gate_proj.weight, mlp.up_proj.weight]",
              "[mlp.up_proj.weight, mlp.gate_proj.weight]")],
            id="phi3: gate and up exchanged",
        ),
        pytest.param(
            "phi3_gqa",
            [("[self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]",
              "[self_attn.q_proj.weight, self_attn.v_proj.weight, self_attn.k_proj.weight]")],
            id="phi3: k and v exchanged",
        ),
        pytest.param(
            "mistral",
            [("config: {keep: all}", "config: {keep: all, set: {sliding_window: null}}")],
            id="mistral: window forgotten",
        ),
        pytest.param(
            "baichuan",
            [("[self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]",
              "[self_attn.q_proj.weight, self_attn.v_proj.weight, self_attn.k_proj.weight]")],
            id="baichuan: k and v exchanged",
        ),
        pytest.param(
            "baichuan2",
            [("{normalize: lm_head.weight, into: lm_head.weight}", "{keep: [lm_head.weight]}")],
            id="baichuan2: head not normalised",
        ),
        pytest.param(
            "yi",
            [("ln1.weight: input_", "ln1.weight: post_attention_"),
             ("ln2.weight: post_attention_", "ln2.weight: input_")],
            id="yi: norms exchanged",
        ),
    ],
)  # fmt: skip
def test_a_wrong_mapping_whose_shapes_fit_is_seen(
    sources: Any, tmp_path: Path, case: str, changes: list[tuple[str, str]]
) -> None:
    kind, change = CASES[case]
    source, trained = sources(kind, change)
    mapping = wrong_mapping(tmp_path, kind, *changes)
    assert distance(source, trained, tmp_path / "llava-mistral-wrong", mapping=mapping) > DIFFERENT


def test_thirds_of_phi_3_do_not_even_fit_with_grouped_queries(sources: Any, tmp_path: Path) -> None:
    _, trained = sources(*CASES["phi3_gqa"])
    thirds = "sizes: [2 * head, 2 * head, 2 * head]"
    mapping = wrong_mapping(tmp_path, "phi3", ("sizes: [queries, keys, keys]", thirds))
    with pytest.raises(PlanError, match=r"q_proj\.weight` .* has shape"):
        convert(trained.checkpoint, tmp_path / "out", mapping=mapping, **trained.bases)


def test_an_attention_window_shorter_than_the_text_is_not_carried_by_llama(
    sources: Any, tmp_path: Path
) -> None:
    source, trained = sources("phi3", {"sliding_window": 8})
    if between(source.model, sources("phi3", {})[0].model) == 0.0:
        pytest.skip("this transformers has a Phi-3 without window unless attention is flash")
    assert distance(source, trained, tmp_path / "llava-phi3") > DIFFERENT
    card = (tmp_path / "llava-phi3/README.md").read_text()
    assert "outputs differ only beyond 8 tokens" in " ".join(card.split())


@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 2}])
def test_experts_stay_in_their_places(
    sources: Any, tmp_path: Path, measured: Measured, change: dict[str, Any]
) -> None:
    source, trained = sources("mixtral", change)
    found = distance_of_llm(source, trained, tmp_path)
    assert found < SAME
    measured.exact(tmp_path / "llava-mixtral", found)
    exchanged = """\
schema: 1
family: wrong
extends: mixtral
tensors:
  - for: {i: num_hidden_layers, e: num_local_experts}
    from: model.layers.{i}.block_sparse_moe.experts.{e}
    to: model.layers.{i}.block_sparse_moe.experts.{e}
    rules: [{rename: {w1.weight: w3.weight, w3.weight: w1.weight}}]
"""
    mapping = tmp_path / "wrong.yaml"
    mapping.write_text(exchanged)
    assert distance_of_llm(source, trained, tmp_path / "wrong", mapping=mapping) > DIFFERENT


def distance_of_llm(source: Source, trained: Trained, folder: Path, **options: Any) -> float:
    """As `distance`, of the LLM alone, loaded with `from_pretrained`.

    transformers 5 has a Mixtral's experts under other names in memory than in files.
    """
    import json

    convert(
        trained.checkpoint, folder / "llava-mixtral", dtype="float32", **trained.bases, **options
    )
    config = json.loads((folder / "llava-mixtral/config.json").read_text())
    assert config["architectures"] == ["LlavaMixtralForCausalLM"]
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    tensors = {
        name: tensor
        for name, tensor in read_tensors(folder / "llava-mixtral").items()
        if not name.startswith(("model.mm_projector.", "model.vision_tower."))
    }
    return between(source.model, load_plain(folder / "plain", config, tensors))


def between(before: Any, after: Any) -> float:
    """The largest difference between the logits of two language models for some embeddings."""
    import torch

    embeddings = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[7, 300, 21, 55, 131, 399, 2]])
    largest = 0.0
    with torch.no_grad():
        for kind in ({"inputs_embeds": embeddings}, {"input_ids": ids}):
            expected = before(**kind, use_cache=False).logits
            assert expected.abs().max() > 0.5
            difference = after(**kind, use_cache=False).logits - expected
            largest = max(largest, difference.abs().max().item())
    return largest
