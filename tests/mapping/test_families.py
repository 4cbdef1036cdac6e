"""The shipped families and formats: which LLM is whose, what becomes of its config and tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.apply import Applied
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.family import ChatDefaults, Family, Generation
from xtuner2llava.mapping.plain_class import check_against_class
from xtuner2llava.tensors.computed import Fill
from xtuner2llava.tensors.dtype import FLOAT32
from xtuner2llava.tensors.lazy import LazyTensor

FOLDER = Path(__file__).parents[2] / "mappings"
CATALOGUE = Catalogue(FOLDER)
SIZES: dict[str, object] = {
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QWEN: dict[str, object] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    **SIZES,
    "intermediate_size": 24,
    "kv_channels": 4,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "initializer_range": 0.02,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "softmax_in_fp32": False,
    "onnx_safe": None,
    "tie_word_embeddings": False,
}


def class_names(family: str, config: Mapping[str, object]) -> list[str]:
    plain = CATALOGUE.families[family].target_class
    return [*plain.tensors(plain.complete(config)[0])]


def qwen_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of Qwen 1, as Qwen/Qwen-7B `modeling_qwen.py` makes them; the MLP is 24 // 2."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (40, 8),
        "transformer.ln_f.weight": (8,),
        "lm_head.weight": (40, 8),
    }
    for layer in ("transformer.h.0", "transformer.h.1"):
        shapes |= {
            f"{layer}.ln_1.weight": (8,),
            f"{layer}.ln_2.weight": (8,),
            f"{layer}.attn.c_attn.weight": (24, 8),
            f"{layer}.attn.c_attn.bias": (24,),
            f"{layer}.attn.c_proj.weight": (8, 8),
            f"{layer}.mlp.w1.weight": (12, 8),
            f"{layer}.mlp.w2.weight": (12, 8),
            f"{layer}.mlp.c_proj.weight": (8, 12),
        }
    return shapes


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    return {name: Fill(FLOAT32, shape, 0.0) for name, shape in shapes.items()}


def convert(
    family: Family, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> Applied:
    return family.apply(config, tensors(shapes))


@pytest.mark.parametrize("folder", ["families", "formats", "classes"])
def test_shipped_files_are_right_and_named_after_what_they_are(folder: str) -> None:
    shelf: Mapping[str, Family] = getattr(CATALOGUE, folder)
    assert len(shelf) == len([*(FOLDER / folder).glob("*.yaml")]) > 0
    for name in shelf:
        assert Catalogue.shipped().check(FOLDER / folder / f"{name}.yaml") == []
        assert shelf[name].name == name
        assert CATALOGUE.text_of(name)


def test_the_catalogue_finds_what_is_shipped() -> None:
    assert [*Catalogue.shipped().families] == [*CATALOGUE.families]
    assert {"llama", "qwen2", "mistral", "mixtral", "qwen"} <= {*CATALOGUE.families}
    with pytest.raises(MappingError, match="there is no family `qwen9`") as caught:
        CATALOGUE.families["qwen9"]
    assert caught.value.faults[0].advice.startswith("Did you mean `qwen")
    assert CATALOGUE.text_of("qwen").startswith("# Qwen 1 is Qwen 2 with other names")
    assert "\nfamily: llama\n" in CATALOGUE.text_of("llama")
    for name in ("classes/llama", "classes/llama.yaml"):
        assert "\nclass: llama\n" in CATALOGUE.text_of(name)
    assert "\nclass: clip_vision_model\n" in CATALOGUE.text_of("clip_vision_model")
    with pytest.raises(MappingError, match=r"Known: baichuan, .*, llava, clip_.*, classes/gemma, "):
        CATALOGUE.text_of("zzz")
    with pytest.raises(MappingError, match=r"there is no mapping `\.\./README`"):
        CATALOGUE.text_of("../README")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
    ],
)
def test_identity_families(name: str, architecture: str) -> None:
    config = {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2}
    names = class_names(name, config)
    source = {**config, "architectures": [architecture], "model_type": name}
    family = CATALOGUE.detect(source, names)
    assert family.name == family.target_class.name == name

    plain = family.target_class
    shapes = {n: e.shape for n, e in plain.tensors(plain.complete(config)[0]).items()}
    shapes["model.layers.1.self_attn.rotary_emb.inv_freq"] = (2,)
    applied = convert(family, source, shapes)
    assert {*applied.outputs} == {*names}
    assert [gone.name for gone in applied.dropped] == [
        "model.layers.1.self_attn.rotary_emb.inv_freq"
    ]
    translated = family.translate_config(source, CATALOGUE.formats["llava"])
    made = {name: tensor.shape for name, tensor in applied.outputs.items()}
    assert check_against_class(plain, translated.values, made, applied.origins) == []


def test_qwen_1_becomes_qwen_2() -> None:
    shapes = qwen_shapes() | {"transformer.rotary_emb.inv_freq": (2,)}
    family = CATALOGUE.detect(QWEN, shapes)
    assert family.name == "qwen"
    translated = family.translate_config(QWEN, CATALOGUE.formats["llava"])
    assert translated.values == {
        "vocab_size": 40,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
        "attention_dropout": 0.0,
    }
    assert isinstance(translated.values["rope_theta"], float)
    assert translated.not_carried == ("softmax_in_fp32",)

    applied = convert(family, QWEN, shapes)
    made = {name: tensor.shape for name, tensor in applied.outputs.items()}
    assert check_against_class(family.target_class, translated.values, made, applied.origins) == []
    sources = {name: origin.sources for name, origin in applied.origins.items()}
    # c_proj(w1(x) * silu(w2(x))): the gate is w2.
    assert sources["model.layers.1.mlp.gate_proj.weight"] == ("transformer.h.1.mlp.w2.weight",)
    assert sources["model.layers.1.mlp.up_proj.weight"] == ("transformer.h.1.mlp.w1.weight",)
    assert sources["model.layers.0.self_attn.v_proj.bias"] == ("transformer.h.0.attn.c_attn.bias",)


def test_qwen_1_values_that_qwen_2_cannot_express_are_all_refused() -> None:
    family = CATALOGUE.families["qwen"]
    wrong = {
        **QWEN,
        "no_bias": False,
        "rotary_pct": 0.5,
        "kv_channels": 8,
        "scale_attn_weights": False,
        "tie_word_embeddings": True,
    }
    with pytest.raises(MappingError) as caught:
        family.translate_config(wrong)
    assert [fault.what for fault in caught.value.faults] == [
        "this Qwen has biases on its projections, and Qwen2 has them on q, k and v only",
        "this Qwen rotates a part (0.5) of each head, and Qwen2 rotates all of it",
        "the heads of this Qwen (8 wide) do not make up its hidden size",
        "this Qwen does not scale its attention scores, and Qwen2 always does",
        "no Qwen 1 ties its head, so this config is of something else",
    ]
    lines = (FOLDER / "families" / "qwen.yaml").read_text().splitlines()
    for fault in caught.value.faults:
        name, _, line = fault.where.rpartition(":")
        assert name == "families/qwen.yaml"
        assert lines[int(line) - 1].strip().startswith("- that:")
    assert caught.value.faults[1].advice == "Expected `rotary_pct == 1`; here rotary_pct is 0.5."


def test_caveats_are_said_when_they_apply() -> None:
    family = CATALOGUE.families["qwen"]
    (limit,) = family.limits(QWEN)
    assert limit.text == (
        "Qwen 1 rescales attention past 8192 tokens and Qwen 2 does not; "
        "outputs differ only beyond that length."
    )
    assert (limit.tokens, limit.transformers) == (8192, None)
    assert family.limits({**QWEN, "use_dynamic_ntk": False, "use_logn_attn": False}) == []


def test_missing_and_impossible_sizes_are_named() -> None:
    llama = CATALOGUE.families["llama"]
    config = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    with pytest.raises(MappingError, match="`vocab_size` is missing, and LlamaForCausalLM needs"):
        llama.translate_config(config)
    for size in (0, -8, 8.5, True, "8"):
        with pytest.raises(MappingError, match=r"^classes/llama.yaml: `num_attention_heads` is .*"):
            llama.translate_config({**SIZES, "num_attention_heads": size})
    whole = llama.translate_config({**SIZES, "vocab_size": 4.0}).values["vocab_size"]
    assert repr(whole) == "4"


@pytest.mark.parametrize(
    ("name", "change", "because"),
    [
        ("llama", {"head_dim": 16}, "heads of hidden_size / num_attention_heads, not of 16"),
        ("llama", {"mlp_bias": True}, "has no biases"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "gives some layers a sliding window"),
        ("mistral", {"head_dim": 16}, "not of 16"),
        ("mixtral", {"head_dim": 16}, "not of 16"),
    ],
)
def test_what_a_class_cannot_be_in_4_37(name: str, change: dict[str, object], because: str) -> None:
    family, llava = CATALOGUE.families[name], CATALOGUE.formats["llava"]
    fits = {**SIZES, "head_dim": 4, "mlp_bias": False, "layer_types": ["full"]}
    made = family.translate_config(fits, llava).values
    assert not {"head_dim", "mlp_bias"} & {*made}
    with pytest.raises(MappingError, match=because):
        family.translate_config({**SIZES, **change}, llava)
    if "layer_types" not in change:
        hf = CATALOGUE.formats["hf"]
        values = family.translate_config({**SIZES, **change}, hf).values
        assert change.items() <= values.items()
        assert [limit.is_bounded for limit in hf.class_limits(name, values)] == [True]


@pytest.mark.parametrize(
    ("scaling", "fits"),
    [
        (None, True),
        ({"type": "linear", "factor": 2.0}, True),
        ({"type": "dynamic", "factor": 1.5}, True),
        ({"type": "linear", "factor": 1.0}, False),
        ({"type": "linear", "factor": 2}, False),
        ({"type": "yarn", "factor": 2.0}, False),
        ({"type": "linear", "factor": 2.0, "extra": 1}, False),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, False),
        ({"factor": 2.0}, False),
        ({}, False),
        ("linear", False),
        ([], False),
    ],
)
def test_rope_scaling_that_official_llava_can_say(scaling: object, fits: bool) -> None:
    llava = CATALOGUE.formats["llava"]
    values = {**SIZES, "rope_scaling": scaling}
    assert (llava.class_faults("llama", values) == []) is fits
    for name in ("qwen2", "mistral", "mixtral"):
        assert (llava.class_faults(name, values) == []) is (scaling is None)


def test_llama_3_1_is_refused_by_the_format_and_not_by_the_class() -> None:
    family = CATALOGUE.families["llama"]
    config = {**SIZES, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    assert family.translate_config(config).values["rope_scaling"] == config["rope_scaling"]
    with pytest.raises(
        MappingError, match=r"rope_scaling \{type: 'llama3', factor: 8.0\}"
    ) as caught:
        family.translate_config(config, CATALOGUE.formats["llava"])
    assert caught.value.faults[0].where.startswith("formats/llava.yaml:")


def test_a_format_without_the_class_says_so(tmp_path: Path) -> None:
    assert [fault.what for fault in CATALOGUE.formats["llava"].class_faults("falcon", {})] == [
        "the format llava has no class for falcon; it has llama, qwen2, mistral, mixtral"
    ]


def test_official_llava_puts_parts_in_their_places() -> None:
    llava = CATALOGUE.formats["llava"]
    assert llava.classes["qwen2"].architecture == "LlavaQwenForCausalLM"
    assert llava.classes["qwen2"].model_type == "llava_qwen"
    environment = {
        **SIZES,
        "vision": {"hidden_size": 1024, "name": "openai/clip-vit-large-patch14-336"},
        "xtuner": {"visual_select_layer": -2, "image_aspect_ratio": "pad"},
        "projector_type": "mlp2x_gelu",
        "writes": {"visual_encoder": True},
    }
    places = {
        component: {
            **{origin.sources[0]: name for name, origin in applied.origins.items()},
            **{dropped.name: None for dropped in applied.dropped},
        }
        for component, names in {
            "llm": ["lm_head.weight"],
            "projector": ["model.0.weight", "model.2.bias"],
            "visual_encoder": ["vision_model.pre_layrnorm.bias", POSITION_IDS],
        }.items()
        for applied in [llava.apply(component, environment, tensors(dict.fromkeys(names, (1,))))]
    }
    assert places == {
        "llm": {"lm_head.weight": "lm_head.weight"},
        "projector": {
            "model.0.weight": "model.mm_projector.0.weight",
            "model.2.bias": "model.mm_projector.2.bias",
        },
        "visual_encoder": {
            "vision_model.pre_layrnorm.bias": (
                "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
            ),
            POSITION_IDS: None,
        },
    }
    # The keys of XTuner's own published llava-llama-3-8b-v1_1 in LLaVA format.
    assert llava.config(environment) == {
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
    }
    with pytest.raises(MappingError) as caught:
        llava.config({})
    assert len(caught.value.faults) == 6


POSITION_IDS = "vision_model.embeddings.position_ids"


def test_tokens_and_templates() -> None:
    qwen = Generation("<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), "<|endoftext|>")
    for name in ("qwen", "qwen2"):
        assert CATALOGUE.families[name].generation == qwen
        assert CATALOGUE.families[name].chat == ChatDefaults(
            "qwen_chat", ("<|im_end|>", "<|endoftext|>")
        )
    assert CATALOGUE.families["llama"].generation == Generation(None, (), None)
    assert CATALOGUE.families["llama"].chat == ChatDefaults(None, ())
    assert CATALOGUE.families["qwen"].tokenizer.class_name == "Qwen2Tokenizer"


def test_a_conversion_is_put_down_to_all_its_files() -> None:
    assert [file.name for file in CATALOGUE.families["qwen"].files] == [
        "families/qwen.yaml",
        "classes/qwen2.yaml",
    ]


@pytest.mark.parametrize(
    ("config", "names", "parts"),
    [
        (
            {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
            [
                "model.layers.0.self_attn.qkv_proj.weight",
                "model.layers.1.self_attn.qkv_proj.weight",
            ],
            ["'Phi3ForCausalLM'", "'phi3'", "`model.layers.{0..1}.self_attn.qkv_proj.weight`"],
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            ["model.embed_tokens.weight", "model.layers.0.ln1.weight"],
            [
                "llama has the same architecture and model_type, but it has a tensor "
                "`model.layers.0.self_attn.q_proj.weight`"
            ],
        ),
        (
            {"architectures": ["YiForCausalLM"], "model_type": "Yi"},
            ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
            ["llama has the same tensor names, but its architecture is LlamaForCausalLM or "],
        ),
        ({"architectures": 7, "model_type": ["x"]}, [], ["tensors are none"]),
        ({}, [], ["Known families: baichuan, "]),
    ],
)
def test_the_error_for_an_unknown_llm_says_what_was_seen(
    config: dict[str, object], names: list[str], parts: list[str]
) -> None:
    with pytest.raises(MappingError) as caught:
        CATALOGUE.detect(config, names)
    for part in parts:
        assert part in str(caught.value)
    assert "--mapping" in caught.value.faults[0].advice
    assert "mappings draft" in caught.value.faults[0].advice


def test_names_decide_where_the_config_says_nothing() -> None:
    assert CATALOGUE.detect({}, qwen_shapes()).name == "qwen"


def test_two_families_that_fit_are_none(tmp_path: Path) -> None:
    for folder in ("families", "classes"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        (tmp_path / "families" / f"{name}.yaml").write_text(
            f"schema: 1\nfamily: {name}\nbecomes: x\nmatch: {{model_type: x}}\n"
        )
    with pytest.raises(MappingError, match="families a and b both fit this LLM"):
        Catalogue(tmp_path).detect({"model_type": "x"}, [])


def test_a_file_of_the_users_own_extends_a_shipped_family(tmp_path: Path) -> None:
    path = tmp_path / "my-qwen.yaml"
    path.write_text(
        """schema: 1
family: my-qwen
extends: qwen
dims: {layers: n_layer}
tensors:
  - {rename: {transformer.norm.weight: model.norm.weight}}
config:
  derive: {num_hidden_layers: n_layer}
generation: {pad: "<|extra_0|>"}
"""
    )
    family = CATALOGUE.with_family_file(path)
    shapes = qwen_shapes()
    shapes["transformer.norm.weight"] = shapes.pop("transformer.ln_f.weight")
    config = {key: value for key, value in QWEN.items() if key != "num_hidden_layers"}
    config["n_layer"] = 2
    applied = convert(family, config, shapes)
    made = {name: tensor.shape for name, tensor in applied.outputs.items()}
    translated = family.translate_config(config)
    assert check_against_class(family.target_class, translated.values, made, applied.origins) == []
    assert applied.origins["model.norm.weight"].where == "my-qwen.yaml:6"
    assert applied.origins["lm_head.weight"].where.startswith("families/qwen.yaml:")
    assert family.generation == Generation(
        "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), "<|extra_0|>"
    )
    assert not family.match
    assert [file.name for file in family.files] == [
        "my-qwen.yaml",
        "families/qwen.yaml",
        "classes/qwen2.yaml",
    ]


def test_threads_that_read_a_family_at_once_get_the_same_one() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(3):
            catalogue = Catalogue(FOLDER)
            with ThreadPoolExecutor(4) as threads:
                found = threads.map(catalogue.families.__getitem__, ["qwen_early"] * 4)
                assert len({id(family) for family in found}) == 1
    finally:
        sys.setswitchinterval(interval)


def test_every_shipped_family_names_its_llms() -> None:
    named = [family.llms for family in CATALOGUE.families.values()]
    assert all(named)
    assert len(set(named)) == len(named)


def test_the_example_of_the_page_works(tmp_path: Path) -> None:
    text = (FOLDER.parent / "docs/mappings.md").read_text()
    path = tmp_path / "lab.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert Catalogue.shipped().check(path) == []
    family = CATALOGUE.with_family_file(path)
    config = {
        "vocab_size": 40,
        "hidden_size": 8,
        "ffn": 12,
        "eps": 1e-5,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "activation": "silu",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "tok.weight": (40, 8),
        "norm.weight": (8,),
        "out.weight": (40, 8),
        "blocks.0.qkv.weight": (16, 8),
        "blocks.0.wo.weight": (8, 8),
        "blocks.0.gate_up.weight": (24, 8),
        "blocks.0.down.weight": (8, 12),
        "blocks.0.norm1.weight": (8,),
        "blocks.0.norm2.weight": (8,),
        "blocks.0.rope_cache": (4,),
    }
    applied = convert(family, config, shapes)
    made = {name: tensor.shape for name, tensor in applied.outputs.items()}
    translated = family.translate_config(config)
    assert check_against_class(family.target_class, translated.values, made, applied.origins) == []
    assert translated.values["rms_norm_eps"] == 1e-5
    with pytest.raises(MappingError, match="and gelu is another"):
        family.translate_config({**config, "activation": "gelu"})
