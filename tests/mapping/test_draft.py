"""`mappings draft`: a starter that a person completes, for an LLM of invented names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.families import formulas
from builders.families.checkpoints import Trained, write_trained
from builders.families.models import KINDS, SIZES, Source, random_tensors
from reference.compose import compose
from xtuner2llava import PlanError, convert, plan
from xtuner2llava.cli.commands import main
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.draft import draft
from xtuner2llava.mapping.plain_class import check_against_class
from xtuner2llava.tensors.computed import Fill
from xtuner2llava.tensors.dtype import FLOAT32

CATALOGUE = Catalogue(Path(__file__).parents[2] / "mappings")
SIZES_OF_LAB = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "ffn": 96}
LAB_CONFIG: dict[str, Any] = {
    "architectures": ["LabForCausalLM"],
    "model_type": "lab",
    **SIZES_OF_LAB,
    "vocab_size": 400,
    "max_seq_len": 256,
    "norm_eps": 1e-5,
    "rotary_base": 5000,
    "activation": "swiglu",
    "secret_sauce": True,
    "torch_dtype": "float32",
}
INVENTED = {
    "model.embed_tokens.weight": "table.token_embedding.weight",
    "model.norm.weight": "top_norm.weight",
    "lm_head.weight": "readout.weight",
    "self_attn.q_proj.weight": "mix.to_query.weight",
    "self_attn.k_proj.weight": "mix.to_key.weight",
    "self_attn.v_proj.weight": "mix.to_value.weight",
    "self_attn.o_proj.weight": "mix.merge.weight",
    "mlp.gate_proj.weight": "think.gate.weight",
    "mlp.up_proj.weight": "think.lift.weight",
    "mlp.down_proj.weight": "think.down.weight",
    "input_layernorm.weight": "norm_before_mix.weight",
    "post_attention_layernorm.weight": "norm_before_think.weight",
}


def invented(name: str) -> str:
    if not name.startswith("model.layers."):
        return INVENTED[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blocks.{layer}.{INVENTED[rest]}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> tuple[Source, Trained]:
    """A Llama whose tensors and config keys have names of its own."""
    config = {**SIZES, "num_key_value_heads": 2, "rope_theta": 5000}
    kind = KINDS["internlm3"]
    assert kind.shapes is not None
    tensors = random_tensors(kind.shapes(config))
    model = formulas.Formula(formulas.internlm3, config, tensors, kind.embedding)
    source = Source(LAB_CONFIG, {invented(n): t for n, t in tensors.items()}, model)
    folder = tmp_path_factory.mktemp("lab")
    trained = write_trained(
        folder, replace(source, config={**LAB_CONFIG, "n_embd": 64}), checkpoints
    )
    return source, trained


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_new_family_by_yaml_alone(lab: tuple[Source, Trained], tmp_path: Path) -> None:
    import numpy
    import torch

    source, trained = lab
    with pytest.raises(PlanError, match="no family fits") as caught:
        plan(trained.checkpoint, **trained.bases)
    assert "xtuner2llava mappings draft CHECKPOINT" in str(caught.value)

    text = run("mappings", "draft", trained.checkpoint, "--llm", trained.llm)
    path = tmp_path / "my-llm.yaml"
    path.write_text(text)
    assert run("mappings", "check", path) == f"{path}: no faults\n"
    assert "becomes: llama" in text
    # Two of their shapes leave one name; the others are comments, with the names that fit.
    assert "  top_norm.weight: model.norm.weight    # [64], only one of this shape" in text
    assert "  think.down.weight: mlp.down_proj.weight    # [64, 96], only one of this shape" in text
    assert "# [64, 64]: self_attn.q_proj.weight, self_attn.o_proj.weight" in text
    assert "# Nothing makes: model.embed_tokens.weight, lm_head.weight" in text
    with pytest.raises(PlanError) as caught:
        plan(trained.checkpoint, mapping=path, **trained.bases)
    said = str(caught.value)
    for name in ("mix.merge", "think.gate", "think.lift"):
        assert f"blocks.{{0..1}}.{name}.weight` (2 tensors)" in said
    assert said.count("is in the checkpoint, and no rule takes it") == 1
    for target, name in INVENTED.items():
        text = text.replace(f"# - rename: {{{name}: }}", f"- rename: {{{name}: {target}}}")
    assert "# - rename" not in text
    path.write_text(text)
    named = ("--vision-tower-name", trained.bases["vision_tower_name"], "--mapping", path)
    bases = ("--llm", trained.llm, "--vision", trained.vision)
    assert "LlavaLlamaForCausalLM" in run("plan", trained.checkpoint, *bases, *named)

    out = tmp_path / "llava-lab"
    convert(trained.checkpoint, out, mapping=path, dtype="float32", **trained.bases)
    ids = numpy.array([[7, 300, 21, -200, 55, 131, 399, 2]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(2)).numpy()
    made = compose(out, trained.vision)
    expected = replace(made, language_model=source.model).logits(ids, pixels)
    assert (made.logits(ids, pixels) - expected).abs().max().item() < 1e-5


def drafted(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> str:
    """The draft, which `check` must accept."""
    text = draft(config, shapes, CATALOGUE)
    path = folder / "my-llm.yaml"
    path.write_text(text, encoding="utf-8")
    assert CATALOGUE.check(path) == [], text
    return text


def test_keys_of_the_config_are_found_under_other_names(tmp_path: Path) -> None:
    shapes = {invented(n): s for n, s in _llama_shapes(2).items()}
    lines = drafted(LAB_CONFIG, shapes, tmp_path).splitlines()
    config = lines[lines.index("config:") :]
    assert config[1:13] == [
        "  keep: [vocab_size]",
        "  derive:",
        "    hidden_size: d_model",
        "    intermediate_size: ffn",
        "    num_hidden_layers: n_layers",
        "    num_attention_heads: n_heads",
        "    num_key_value_heads: n_kv_heads",
        "    max_position_embeddings: max_seq_len",
        "    rms_norm_eps: norm_eps",
        "    rope_theta: rotary_base * 1.0",
        "  set:",
        "    hidden_act: silu    # activation is 'swiglu'",
    ]
    assert '  #   "secret_sauce": true' in config
    assert not any("torch_dtype" in line for line in config)


def test_keys_that_only_later_versions_read_are_found_too(tmp_path: Path) -> None:
    plain = CATALOGUE.classes["llama"]
    config = {**SIZES, "num_key_value_heads": 2}
    wide = plain.complete({**config, "head_dim": 32, "mlp_bias": True})[0]
    shapes = {name: one.shape for name, one in plain.tensors(wide).items()}
    said = {"model_type": "mine", "d_head": 32, "mlp_bias": True, "bos_token_id": 1}
    text = drafted(config | said, renamed(shapes, {"self_attn": "mix"}), tmp_path)
    assert "becomes: llama " in text
    assert "   mix.q_proj.weight: self_attn.q_proj.weight    # [128, 64], same" in text
    assert "          - mlp.up_proj.bias    # [96]\n" in text
    assert "    head_dim: d_head\n" in text
    assert "mlp_bias]\n" in text
    assert "bos_token_id" not in text
    family = CATALOGUE.with_family_file(tmp_path / "my-llm.yaml")
    assert family.translate_config(config | said).values == wide | {"rope_theta": 10000.0}


def _llama_shapes(kv_heads: int) -> dict[str, tuple[int, ...]]:
    shapes = KINDS["internlm3"].shapes
    assert shapes is not None
    return shapes({**SIZES, "num_key_value_heads": kv_heads})


def test_a_size_that_no_key_says_is_left_to_people(tmp_path: Path) -> None:
    shapes = {invented(n): s for n, s in _llama_shapes(4).items()}
    text = drafted({"n_heads": 4}, shapes, tmp_path)
    assert "    num_attention_heads: n_heads\n" in text
    assert "    hidden_size: 0    # required, and not in the config: say it" in text
    assert "- for: {i: 2}" in text
    # Without sizes no shape tells anything.
    assert "- rename:    #" not in text


def test_what_a_fused_tensor_may_be_split_into_is_a_comment(tmp_path: Path) -> None:
    shapes = KINDS["internlm2"].shapes
    assert shapes is not None
    config = {**SIZES, "num_key_value_heads": 2, "model_type": "mine"}
    text = drafted(config, shapes(config), tmp_path)
    split = """\
      # - split: attention.wqkv.weight    # [128, 64]
      #   into: [self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]
      #   sizes: [64, 32, 32]    # or `deinterleave` with groups: N, slots: [64 // N, 32 // N, 3"""
    assert split in text
    fused = {
        name.replace("mlp.gate_proj", "mlp.gate_up_proj"): (192, 64)
        if "gate_proj" in name
        else shape
        for name, shape in _llama_shapes(2).items()
        if "up_proj" not in name
    }
    text = drafted(config, fused, tmp_path)
    assert "      #   into: [mlp.gate_proj.weight, mlp.up_proj.weight]\n" in text
    assert "      #   sizes: [96, 96]    # or `deinterleave` with" in text
    assert "# Nothing makes: mlp.gate_proj.weight, mlp.up_proj.weight\n" in text


def test_the_nearest_class_is_the_one_that_shares_most_names(tmp_path: Path) -> None:
    shapes = _llama_shapes(2)
    config = {**SIZES, "num_key_value_heads": 2, "model_type": "mine"}
    biases = {f"model.layers.{i}.self_attn.{p}_proj.bias": (64 if p in "qo" else 32,)
              for i in (0, 1) for p in "qkvo"}  # fmt: skip
    norms = {f"model.layers.{i}.self_attn.{p}_norm.weight": (16,) for i in (0, 1) for p in "qk"}
    assert "becomes: llama    # for --format hf and --format llava\n" in drafted(
        config, shapes, tmp_path
    )
    text = drafted(config | {"attention_bias": True}, shapes | biases, tmp_path)
    assert "becomes: llama " in text
    assert "          - self_attn.o_proj.bias    # [64]\n" in text
    without_o = {n: s for n, s in biases.items() if "o_proj" not in n}
    text = drafted(config, shapes | without_o, tmp_path)
    assert "becomes: qwen2 " in text
    assert "    sliding_window: null    # the class would have one\n" in text
    text = drafted(config, shapes | norms, tmp_path)
    assert "becomes: qwen3    # for --format hf\n" in text
    assert "self_attn.q_norm.weight    # [16]\n" in text


def renamed(shapes: dict[str, tuple[int, ...]], names: dict[str, str]) -> Any:
    """`shapes` with parts of their names replaced."""
    found = {}
    for name, shape in shapes.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = shape
    return found


def test_a_module_called_the_same_is_renamed_where_its_shape_agrees(tmp_path: Path) -> None:
    config = {**SIZES, "num_key_value_heads": 2, "model_type": "mine"}
    biases = {f"model.layers.{i}.self_attn.{p}_proj.bias": (64 if p == "q" else 32,)
              for i in (0, 1) for p in "qkv"}  # fmt: skip
    own = {"self_attn": "mix", "mlp.gate_proj": "ff.left", "mlp.up_proj": "ff.right"}
    text = drafted(config, renamed(_llama_shapes(2) | biases, own), tmp_path)
    # The biases tell a Qwen 2, although all names of attention are others.
    assert "becomes: qwen2 " in text
    for part in "qkvo":
        assert f"   mix.{part}_proj.weight: self_attn.{part}_proj.weight    # [" in text
    assert "   mix.q_proj.bias: self_attn.q_proj.bias    # [64], same module name\n" in text
    assert "# - rename: {ff.left.weight: }    # [96, 64]: mlp.gate_proj.weight, mlp.up_proj" in text
    assert "# Nothing makes: mlp.gate_proj.weight, mlp.up_proj.weight\n" in text
    # Two of one name, and one of another shape, are left to people.
    twice = {f"model.layers.{i}.cross.q_proj.weight": (64, 64) for i in (0, 1)}
    text = drafted(config, renamed(_llama_shapes(2) | twice, {"self_attn": "mix"}), tmp_path)
    assert "# - rename: {cross.q_proj.weight: }    # [64, 64]: self_attn.q_proj.weight\n" in text
    assert "# - rename: {mix.q_proj.weight: }    # [64, 64]: self_attn.q_proj.weight\n" in text
    wide = renamed(_llama_shapes(2), {"self_attn": "mix"})
    wide |= {name: (80, 64) for name in wide if name.endswith("k_proj.weight")}
    text = drafted(config, wide, tmp_path)
    assert "{mix.k_proj.weight: }    # [80, 64]: nothing left there has this shape\n" in text


@pytest.mark.parametrize("of_kind", ["attention_norm", "ffn_norm"])
def test_names_that_are_only_alike_assert_nothing(of_kind: str, tmp_path: Path) -> None:
    # InternLM2's attention_norm is the input_layernorm, not the post_attention_layernorm.
    names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk"}  # fmt: skip
    config = {**SIZES, "num_key_value_heads": 2, "attention_bias": True, "model_type": "mine"}
    biases = {f"model.layers.{i}.self_attn.{p}_proj.bias": (64 if p in "qo" else 32,)
              for i in (0, 1) for p in "qkvo"}  # fmt: skip
    text = drafted(config, renamed(_llama_shapes(2) | biases, names), tmp_path)
    kinds = "input_layernorm.weight, post_attention_layernorm.weight"
    assert f"# - rename: {{{of_kind}.weight: }}    # [64]: {kinds}\n" in text
    # With k_proj called otherwise, v_proj leaves one name for it, as o_proj does for q_proj.
    assert "   attention.wq.weight: self_attn.q_proj.weight    # [64, 64], only one of" in text
    assert "   attention.wk.bias: self_attn.k_proj.bias    # [32], only one of this shape" in text


def test_one_tensor_of_queries_keys_and_values_is_never_sure(tmp_path: Path) -> None:
    # A Phi-3 has one, too, but no shape tells whether its rows are in the same order.
    fused = {name: shape for name, shape in _llama_shapes(2).items() if "proj" not in name}
    for i in (0, 1):
        fused |= {f"model.layers.{i}.attn.Wqkv.weight": (128, 64),
                  f"model.layers.{i}.attn.out.weight": (64, 64),
                  f"model.layers.{i}.ff.both.weight": (192, 64),
                  f"model.layers.{i}.ff.down.weight": (64, 96)}  # fmt: skip
    config = {**SIZES, "num_key_value_heads": 2, "model_type": "mine"}
    text = drafted(config, fused, tmp_path)
    assert "becomes: llama " in text
    assert "# - split: attn.Wqkv.weight    # [128, 64]\n" in text
    assert "# - split: ff.both.weight    # [192, 64]\n" in text
    # Queries, keys and values are in it, so the other of that shape is the output.
    assert "   attn.out.weight: self_attn.o_proj.weight    # [64, 64], only one of this" in text
    for i in (0, 1):
        fused |= {f"model.layers.{i}.attn.Wqkv.bias": (128,)}
    text = drafted(
        config, fused | {f"model.layers.{i}.attn.out.bias": (64,) for i in (0, 1)}, tmp_path
    )
    assert "becomes: qwen2 " in text
    assert "# - rename: {attn.out.bias: }    # [64]: nothing left there has this shape" in text
    fused = {name: shape for name, shape in fused.items() if "bias" not in name}
    named = renamed(fused, {"attn.Wqkv": "self_attn.qkv_proj", "ff.both": "mlp.gate_up_proj"})
    text = drafted(config, named, tmp_path)
    assert "becomes: phi3    # for --format hf\n" in text
    assert "          - self_attn.qkv_proj.weight    # [128, 64]\n" in text


EXPERTS = {"block_sparse_moe.experts": "moe.expert", "block_sparse_moe.gate": "moe.router",
           "w1": "gate", "w2": "down", "w3": "up"}  # fmt: skip


def test_experts_under_names_of_their_own_are_a_loop(tmp_path: Path) -> None:
    plain = CATALOGUE.classes["mixtral"]
    config = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 3}
    values = plain.complete(config)[0]
    shapes = {name: one.shape for name, one in plain.tensors(values).items()}
    named = {**config, "model_type": "mine", "n_experts": 3}
    del named["num_local_experts"]
    own = renamed(shapes, EXPERTS)
    text = drafted(named, own, tmp_path)
    block = """\
      - for: {e: n_experts}
        from: moe.expert.{e}
        to: block_sparse_moe.experts.{e}
        rules:
          - rename:
              down.weight: w2.weight    # [64, 96], only one of this shape
          # Not recognised; `rename` them, or `drop` them with a reason:
          # - rename: {gate.weight: }    # [96, 64]: w1.weight, w3.weight
          # - rename: {up.weight: }    # [96, 64]: w1.weight, w3.weight
"""
    assert block in text
    for name, target in (("gate", "w1"), ("up", "w3")):
        was = f"# - rename: {{{name}.weight: }}"
        text = text.replace(was, f"- rename: {{{name}.weight: {target}.weight}}")
    path = tmp_path / "whole.yaml"
    path.write_text(text)
    family = CATALOGUE.with_family_file(path)
    applied = family.apply(named, {n: Fill(FLOAT32, shape, 0.0) for n, shape in own.items()})
    made = {name: tensor.shape for name, tensor in applied.outputs.items()}
    assert check_against_class(plain, values, made, applied.origins) == []

    # Those that a layer lacks, and another number of them, are left to people.
    lacking = {n: s for n, s in own.items() if n != "model.layers.1.moe.expert.2.down.weight"}
    text = drafted(named, lacking, tmp_path)
    assert "          # - rename: {down.weight: }    # differs between layers\n" in text
    fewer = {name: shape for name, shape in own.items() if "expert.2" not in name}
    text = drafted(named, fewer, tmp_path)
    assert '# - rename: {"moe.expert.{0..1}.down.weight": }    # 2 tensors\n' in text
    # A block without a rule is a comment.
    text = drafted(named, {n: s for n, s in own.items() if "down" not in n}, tmp_path)
    assert "      # - for: {e: n_experts}\n" in text
    as_they_are = drafted(config, shapes | {"extra.weight": (3,)}, tmp_path)
    assert as_they_are.count("          - keep:\n              - w1.weight") == 1


def test_a_draft_for_a_class_that_only_one_format_has_is_checked_in_that_format(
    tmp_path: Path, checkpoints: Path
) -> None:
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
    config = {**sizes, "architectures": ["MineForCausalLM"], "model_type": "mine"}
    plain = CATALOGUE.classes["qwen3"]
    shapes = {name: one.shape for name, one in plain.tensors(plain.complete(sizes)[0]).items()}
    tensors = random_tensors(renamed(shapes, {"self_attn": "mix"}))
    trained = write_trained(tmp_path / "trained", Source(config, tensors, None), checkpoints)
    path = tmp_path / "mine.yaml"
    path.write_text(run("mappings", "draft", trained.checkpoint, "--llm", trained.llm))
    assert "becomes: qwen3 " in path.read_text()
    bases = ("--llm", trained.llm, "--vision", trained.vision)
    assert run("mappings", "check", path, trained.checkpoint, *bases).endswith(
        f"{len(tensors)} tensors of LlavaForConditionalGeneration\n"
    )


def test_what_differs_between_layers_is_left_to_people(tmp_path: Path) -> None:
    shapes = _llama_shapes(2) | {
        "model.layers.1.adapter.weight": (8, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
        "model.rotary.inv_freq": (8,),
        "model.layers.0.mlp.down_proj.weight": (64, 98),
    }
    text = drafted({**SIZES, "model_type": "mine"}, shapes, tmp_path)
    assert "      # - rename: {adapter.weight: }    # differs between layers\n" in text
    assert "{mlp.down_proj.weight: }    # differs between layers\n" in text
    assert "# Nothing makes: mlp.down_proj.weight" in text
    assert '  - {drop: "**.inv_freq", because: a buffer that is rebuilt}\n' in text
    assert "rename: {self_attn.rotary_emb.inv_freq" not in text


def test_a_known_family_needs_no_mapping(tmp_path: Path) -> None:
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    text = drafted(config, _llama_shapes(2), tmp_path)
    assert text.startswith("# The shipped family llama fits this LLM, and no mapping is needed.")
    assert text.endswith("schema: 1\nfamily: my-llama\nextends: llama\n")


def test_a_refused_llm_is_drafted_with_the_reason(tmp_path: Path) -> None:
    config = {**SIZES, "architectures": ["MiniCPMForCausalLM"], "scale_emb": 12}
    text = drafted(config, _llama_shapes(2), tmp_path)
    assert '# This LLM is known, and refused: "MiniCPM multiplies embeddings by scale_emb' in text
    assert "      - keep:\n" in text


def test_unusable_names_stay_in_comments(tmp_path: Path) -> None:
    unusable = {
        "a b.weight": (3,),
        "line\nbreak: [": (3,),
        "{x}.0.weight": (3,),
        "*.weight": (3,),
        "true": (),
        "embed: {tokens}.weight": (400, 64),
        "layers.0.q\u2028.weight": (64, 64),
        "": (1,),
    }
    text = drafted({"key\nfamily: evil": 1, "x": {"a\nb": 2}}, unusable, tmp_path)
    assert "\nfamily: evil" not in text
    named = {"a b.0.input_layernorm.weight": (3,), "{x}.0.mlp.up_proj.weight": (3, 3)}
    assert "- for:" not in drafted({}, named, tmp_path)
    assert "tensors:\n" in text


PARTS = "layers 0 1 q_proj qkv q_norm gate_up w1 attn mlp norm embed weight bias é {i}".split()
NAMES = st.lists(st.sampled_from([*PARTS, "a b", ""]) | st.text(max_size=4), min_size=1, max_size=6)
SHAPES = st.lists(st.sampled_from([0, 1, 4, 8, 12]), max_size=3).map(tuple)
VALUES = st.none() | st.booleans() | st.integers(-2, 20) | st.text(max_size=3) | st.lists(st.text())
KEYS = st.sampled_from("hidden_size n_head num_heads d_ff architectures model_type eps".split())


@settings(max_examples=60, deadline=None)
@given(
    config=st.dictionaries(KEYS | st.text(max_size=5), VALUES, max_size=6),
    shapes=st.dictionaries(NAMES.map(".".join), SHAPES, max_size=20),
)
def test_any_draft_passes_the_check(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], shapes: Any
) -> None:
    drafted(config, shapes, tmp_path_factory.mktemp("draft"))
