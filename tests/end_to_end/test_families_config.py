"""What families say of configs like those that are published: detection, translation, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builders.families.models import KINDS, SIZES
from reference.measured import Measured
from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.mapping.catalogue import Catalogue

FOLDER = Path(__file__).parents[2] / "mappings"
CATALOGUE = Catalogue(FOLDER)
LLAVA = CATALOGUE.formats["llava"]


def config_of(kind: str, **change: Any) -> dict[str, Any]:
    """The config of a tiny model of this kind."""
    found = KINDS[kind]
    config = {**SIZES, **found.config, **change}
    config |= {"architectures": [found.architecture], "model_type": found.model_type} | {
        key: change[key] for key in ("architectures", "model_type") if key in change
    }
    return {key: value for key, value in config.items() if key not in found.without}


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_alone_tells_the_family(kind: str) -> None:
    expected = "llama" if kind == "llama_3_1" else kind
    assert CATALOGUE.detect(config_of(kind), None).name == expected


@pytest.mark.parametrize("kind", [kind for kind, made in KINDS.items() if made.shapes])
def test_names_alone_tell_a_family_whose_names_are_its_own(kind: str) -> None:
    shapes = KINDS[kind].shapes
    assert shapes is not None
    names = shapes(config_of(kind))
    only = {key: value for key, value in config_of(kind).items() if key in ("n_embd", "vocab_size")}
    if kind in ("internlm", "internlm3", "yi"):  # names of a plain Llama, or nearly
        with pytest.raises(MappingError, match="both fit"):
            CATALOGUE.detect(only, names)
        return
    expected = {"internlm2_early": "internlm2"}.get(kind)  # the rope tells, and is not given
    if kind.startswith("baichuan"):
        only["vocab_size"] = {"baichuan": 64000, "baichuan2": 125696}[kind]
    assert CATALOGUE.detect(only, names).name == (expected or kind)


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"model_type": "internlm"}, "internlm2"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "internlm2"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, "internlm2_early"),
        (
            {"model_type": "internlm", "rope_scaling": {"type": "dynamic", "factor": 1}},
            "internlm2_early",
        ),
        ({"rope_scaling": None}, "internlm2"),
    ],
)
def test_which_internlm_2(change: dict[str, Any], family: str) -> None:
    assert CATALOGUE.detect(config_of("internlm2", **change), None).name == family


def test_which_baichuan() -> None:
    # The architectures of the two differ in one letter; sizes are those of the published models.
    first = {"architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan"}
    second = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
    assert CATALOGUE.detect({**first, "vocab_size": 64000, "max_position_embeddings": 4096}, None)
    for vocabulary in (125696, 125700):
        config = {**second, "vocab_size": vocabulary, "max_position_embeddings": 4096}
        assert CATALOGUE.detect(config, None).name == "baichuan2"
    for doubtful in (
        {**first, "vocab_size": 125696},
        {**first, "vocab_size": 64000, "z_loss_weight": 0},
        {**second, "vocab_size": 64000, "max_position_embeddings": 4096},
    ):
        with pytest.raises(MappingError, match="its config says"):
            CATALOGUE.detect(doubtful, None)


def translated(kind: str, **change: Any) -> dict[str, object]:
    config = config_of(kind, **change)
    return CATALOGUE.detect(config, None).translate_config(config, LLAVA).values


def test_config_keys_are_translated() -> None:
    phi3 = translated("phi3", rope_theta=250000.0, num_key_value_heads=2)
    expected = {"num_key_value_heads": 2, "rope_theta": 250000.0, "attention_bias": False}
    assert {key: phi3[key] for key in expected} == expected
    assert "sliding_window" not in phi3
    internlm = translated("internlm")
    expected = {"num_key_value_heads": 4, "attention_bias": True, "rope_theta": 5000.0}
    assert {key: internlm[key] for key in expected} == expected
    internlm2 = translated("internlm2", rope_theta=1000000)
    assert isinstance(internlm2["rope_theta"], float)
    assert internlm2["rope_scaling"] is None
    assert translated("internlm2_early")["rope_scaling"] is None
    dynamic = {"type": "dynamic", "factor": 2.0}
    assert translated("internlm2", rope_scaling=dynamic)["rope_scaling"] == dynamic
    baichuan2 = translated("baichuan2", vocab_size=125696)
    expected = {"num_key_value_heads": 4, "rope_theta": 10000.0, "rope_scaling": None}
    assert {key: baichuan2[key] for key in expected} == expected
    early = translated("qwen_early")
    expected = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "rope_theta": 5000.0,
    }
    assert {key: early[key] for key in expected} == expected


def test_keys_left_out_mean_what_they_mean_there() -> None:
    def without(kind: str, *keys: str) -> dict[str, object]:
        config = {key: value for key, value in config_of(kind).items() if key not in keys}
        return CATALOGUE.detect(config, None).translate_config(config).values

    yi = without("yi", "num_key_value_heads", "rope_theta", "rms_norm_eps")
    assert (yi["num_key_value_heads"], yi["rope_theta"], yi["rms_norm_eps"]) == (4, 5e6, 1e-5)
    assert without("internlm", "bias", "rotary")["attention_bias"] is True
    assert without("internlm", "rotary")["rope_theta"] == 10000.0
    assert without("phi3", "rms_norm_eps")["rms_norm_eps"] == 1e-5
    with pytest.raises(MappingError, match="this InternLM2 has biases"):
        without("internlm2", "bias")


@pytest.mark.parametrize(
    ("kind", "change", "because"),
    [
        ("internlm", {"rotary": {"base": 1, "type": "yarn"}}, "not yarn"),
        ("internlm", {"rotary": {"base": 1, "type": "dynamic", "scaling_factor": 2.0}}, "by 2.0"),
        ("internlm", {"rope_theta": 1000000.0}, "two rotary bases, rope_theta 1000000.0 and"),
        ("internlm2", {"bias": True}, "has biases"),
        ("internlm3", {"bias": True}, "has biases"),
        ("internlm3", {"qkv_bias": True}, "has biases"),
        ("phi3", {"partial_rotary_factor": 0.75}, r"a part \(0.75\) of each head"),
        ("phi3", {"head_dim": 32}, "not of 32"),
        ("phi3_long", {"head_dim": 32}, "not of 32"),
        ("phi3_long", {"attention_bias": True}, "biases in its attention"),
        ("qwen_early", {"apply_residual_connection_post_layernorm": True}, "after the norm"),
        ("qwen_early", {"no_bias": False}, "biases on its projections"),
        ("gemma", {"hidden_act": "relu"}, "relu"),
        ("gemma", {"use_bidirectional_attention": True}, "later tokens"),
        ("qwen2_moe", {"qkv_bias": False}, "has none"),
        ("qwen3", {"layer_types": ["sliding_attention"]}, "sliding window"),
    ],
)
def test_values_that_a_target_cannot_express(
    kind: str, change: dict[str, Any], because: str
) -> None:
    config = config_of(kind)
    CATALOGUE.families[kind].translate_config(config)
    with pytest.raises(MappingError, match=because):
        CATALOGUE.families[kind].translate_config({**config, **change})


def test_heads_of_another_size_are_for_hf() -> None:
    config = config_of("internlm3", head_dim=32, rope_scaling=None)
    family, formats = CATALOGUE.families["internlm3"], CATALOGUE.formats
    assert family.translate_config(config, formats["hf"]).values["head_dim"] == 32
    with pytest.raises(MappingError, match=r"transformers 4\.37\.2 has heads of .*, not of 32"):
        family.translate_config(config, formats["llava"])


@pytest.mark.parametrize(
    ("kind", "change", "limit"),
    [
        ("phi3", {}, (100, "differ only beyond 100 tokens")),
        ("phi3", {"sliding_window": None}, None),
        ("phi3", {"sliding_window": 256}, None),
        ("phi3_long", {}, (32, "more than 32 tokens")),
        ("phi3_long", {"original_max_position_embeddings": 256}, None),
        ("internlm", {}, (256, "past 256 tokens")),
        ("internlm", {"rotary": {"base": 5000, "type": "origin"}}, None),
        ("internlm2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, None),
        ("internlm2_early", {}, (256, "past 256 tokens")),
        ("internlm3", {}, None),
        ("qwen", {}, (256, "past 256 tokens")),
        ("qwen_early", {}, (256, "past 256 tokens")),
        ("qwen_early", {"use_dynamic_ntk": False, "use_logn_attn": False}, None),
        ("mistral", {}, (8, "attends to the last 8 tokens")),
        ("mistral", {"sliding_window": None}, None),
        ("mixtral", {}, None),
        ("mixtral", {"sliding_window": 8}, (8, "attends to the last 8 tokens")),
        ("qwen2", {}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 99}, (99, "the last 99 tokens")),
        ("baichuan2", {}, None),
        ("gemma", {}, (None, "from 5.4 on it does not")),
    ],
)
def test_caveats_say_from_which_length_on(
    kind: str, change: dict[str, Any], limit: tuple[int | None, str] | None
) -> None:
    limits = CATALOGUE.families[kind].limits(config_of(kind, **change))
    assert [found.tokens for found in limits] == ([] if limit is None else [limit[0]])
    assert limit is None or limit[1] in limits[0].text


# By text, since ids are the tokenizer's: InternLM/xtuner xtuner/utils/templates.py for the words.
@pytest.mark.parametrize(
    ("family", "bos", "eos", "template"),
    [
        ("internlm", "<s>", ("<eoa>", "</s>"), "internlm_chat"),
        ("internlm2", "<s>", ("<|im_end|>", "</s>"), "internlm2_chat"),
        ("internlm2_early", "<s>", ("<|im_end|>", "</s>"), "internlm2_chat"),
        ("internlm3", "<s>", ("<|im_end|>", "</s>"), "internlm2_chat"),
        ("baichuan", "<s>", ("</s>",), "baichuan_chat"),
        ("baichuan2", "<s>", ("</s>",), "baichuan2_chat"),
        ("qwen_early", "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), "qwen_chat"),
        ("qwen3", "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), "qwen_chat"),
        ("gemma", "<bos>", ("<end_of_turn>", "<eos>"), "gemma"),
        ("mistral", None, (), "mistral"),
    ],
)
def test_tokens_and_templates(
    family: str, bos: str | None, eos: tuple[str, ...], template: str
) -> None:
    found = CATALOGUE.families[family]
    assert (found.generation.bos, found.generation.eos) == (bos, eos)
    assert found.chat.template == template
    assert found.chat.stop_words == CATALOGUE.stop_words.get(template, ())
    assert set(found.chat.stop_words) <= {*eos}


def test_phi_3_and_phi_4_both_end_their_turns() -> None:
    generation = CATALOGUE.families["phi3"].generation
    assert {"<|end|>", "<|im_end|>", "<|endoftext|>"} <= {*generation.eos}
    assert CATALOGUE.families["phi3"].chat.stop_words == ("<|end|>",)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, "rotate half of each head"),
    ({"architectures": ["ChatGLMForConditionalGeneration"]}, "rotate half of each head"),
    ({"architectures": ["GlmForCausalLM"], "model_type": "glm"}, "rotate half of each head"),
    ({"architectures": ["MiniCPMForCausalLM"], "scale_emb": 12}, r"scale_emb \(12\)"),
    ({"architectures": ["MiniCPM3ForCausalLM"]}, "latent attention"),
    (
        {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "vocab_size": 125696,
         "hidden_size": 5120, "num_attention_heads": 40, "model_max_length": 4096},
        "has ALiBi",
    ),
    (
        {"architectures": ["BaichuanForCausalLM"], "vocab_size": 64000, "num_attention_heads": 8,
         "model_max_length": 4096},
        "has ALiBi",
    ),
    (
        {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
         "rope_scaling": {"type": "linear", "factor": 2.0}},
        "longrope only, not as linear",
    ),
    ({"architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small"}, "block-sparse"),
    ({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}, "DeepSeek-V2"),
    ({"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"}, "DeepSeek-MoE"),
    ({"architectures": ["CohereForCausalLM"], "model_type": "cohere"}, "side by side"),
    ({"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2"}, "without gate"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "because"), REFUSED)
@pytest.mark.parametrize("names", [None, ["transformer.embedding.weight"]])
def test_an_llm_without_an_exact_target_is_told_why(
    config: dict[str, Any], because: str, names: list[str] | None, measured: Measured
) -> None:
    with pytest.raises(UnsupportedError, match=because) as caught:
        CATALOGUE.detect(config, names)
    (fault,) = caught.value.faults
    assert fault.where.startswith("refusals.yaml:")
    assert fault.advice.startswith("Train again on ")
    measured.refused(fault.where)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama_3_1", "rope_scaling", KINDS["llama_3_1"].config["rope_scaling"]),
        ("qwen2", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("mistral", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("mixtral", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("llama", "mlp_bias", True),
        *((kind, "head_dim", 24) for kind in ("llama", "qwen2", "mistral", "mixtral")),
    ],
)
def test_what_llava_would_lose_is_refused_there(
    kind: str, key: str, value: object, measured: Measured
) -> None:
    config = config_of(kind, **{key: value})
    family = CATALOGUE.detect(config, None)
    family.translate_config(config_of(kind, rope_scaling=None), LLAVA)
    with pytest.raises(MappingError, match="the format hf") as caught:
        family.translate_config(config, LLAVA)
    (fault,) = caught.value.faults
    assert fault.where.startswith("formats/llava.yaml:")
    family.translate_config(config, CATALOGUE.formats["hf"])
    measured.refused(fault.where)


def test_what_can_be_converted_is_not_refused() -> None:
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}
    for config, family in (
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": None}, "phi3"),
        *(
            ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": kind}}, "phi3_long")
            for kind in ("longrope", "su")
        ),
        (
            {
                "architectures": ["BaichuanForCausalLM"],
                "vocab_size": 125696,
                "model_max_length": 4096,
            },
            "baichuan2",
        ),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "llama"),
        ({"architectures": [7], "model_type": {"chatglm": 1}, "rope_scaling": "x"}, None),
    ):
        if family is None:
            with pytest.raises(MappingError, match="no family fits"):
                CATALOGUE.detect({**sizes, **config}, None)
        else:
            assert CATALOGUE.detect({**sizes, **config}, None).name == family


def test_a_mapping_of_ones_own_is_tried_though_the_llm_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("schema: 1\nfamily: my\nextends: llama\n")
    config = {**SIZES, "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"}
    assert CATALOGUE.with_family_file(path).translate_config(config).values["hidden_size"] == 64


def test_faults_of_the_refusals_have_their_lines(tmp_path: Path) -> None:
    (tmp_path / "refusals.yaml").write_text(
        """schema: 1
llms:
  - match: {architectures: [A], colour: red}
    because: text
formats:
  llava:
    falcon: {because: text, instead: other, more: 1}
"""
    )
    with pytest.raises(MappingError) as caught:
        Catalogue(tmp_path).detect({}, None)
    assert sorted(f"{fault.where}: {fault.what}" for fault in caught.value.faults) == [
        "refusals.yaml:3: `match` has no key `colour`",
        "refusals.yaml:3: a refusal needs `instead`",
        "refusals.yaml:7: a refusal has no key `more`",
    ]


def test_match_takes_a_condition_on_the_config(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    head = "schema: 1\nfamily: my\nextends: llama\nmatch: "
    path.write_text(head + "{model_type: my, when: 'a_key > 3'}\n")
    assert Catalogue.shipped().check(path) == []
    match = CATALOGUE.with_family_file(path).match
    assert match.fits({"model_type": "my", "a_key": 4}, None)
    assert not match.fits({"model_type": "my", "a_key": 3}, None)
    assert not match.fits({"model_type": "my", "a_key": "many"}, None)
    assert not match.fits({"a_key": 4}, None)  # nothing speaks for it
    path.write_text(head + "{model_type: my, when: 'open(1)'}\n")
    assert [fault.where for fault in Catalogue.shipped().check(path)] == ["my.yaml:4"]
