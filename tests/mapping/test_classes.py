"""The class files against the real transformers classes, and what they catch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtuner2llava.errors import Fault, listed
from xtuner2llava.mapping.apply import Origin
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.plain_class import check_against_class

FOLDER = Path(__file__).parents[2] / "mappings"
CATALOGUE = Catalogue(FOLDER)
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def real_shapes(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the real class, built without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return apart(shapes) if name == "mixtral" else shapes


def apart(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Mixtral's experts under the names that its checkpoints have: transformers 5 fuses them."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        layer, _, rest = key.partition(".mlp.")
        if rest == "gate.weight":
            found[f"{layer}.block_sparse_moe.gate.weight"] = shape
        elif rest in ("experts.gate_up_proj", "experts.down_proj"):
            experts, rows, columns = shape
            for expert in range(experts):
                one = f"{layer}.block_sparse_moe.experts.{expert}"
                if rest.endswith("down_proj"):
                    found[f"{one}.w2.weight"] = (rows, columns)
                else:
                    found[f"{one}.w1.weight"] = found[f"{one}.w3.weight"] = (rows // 2, columns)
        else:
            found[key] = shape
    return found


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 2, "attention_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("llama", {"head_dim": 6, "num_key_value_heads": 2, "attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 2, "head_dim": 6}),
        ("mistral", {"num_key_value_heads": 2}),
        ("mistral", {"num_key_value_heads": 2, "head_dim": 6}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 3}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 6}),
    ],
)
def test_names_and_shapes_are_those_of_transformers(name: str, change: dict[str, Any]) -> None:
    plain = CATALOGUE.classes[name]
    config, faults = plain.complete({**SIZES, **change})
    assert faults == []
    real = real_shapes(name, {**SIZES, **change})
    assert {key: expected.shape for key, expected in plain.tensors(config).items()} == real
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert plain.tied_names(config) == (tied if config["tie_word_embeddings"] else {})


def test_the_vision_tower_is_that_of_transformers() -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {**SIZES, "image_size": 28, "patch_size": 7}
    plain = CATALOGUE.classes["clip_vision_model"]
    config, faults = plain.complete(sizes)
    assert faults == []
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**sizes))
    real = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    # transformers 5 leaves out the prefix in memory, and still writes it.
    real = {f"vision_model.{key.removeprefix('vision_model.')}": real[key] for key in real}
    assert {key: expected.shape for key, expected in plain.tensors(config).items()} == real


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # transformers 4.37.2, models/*/configuration_*.py
        ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "pretraining_tp": 1}),
        ("qwen2", {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}),
        ("mistral", {"num_key_value_heads": 8, "sliding_window": 4096}),
        ("mixtral", {"num_key_value_heads": 8, "sliding_window": None, "rope_theta": 1e6}),
    ],
)
def test_keys_left_out_take_the_values_of_4_37(name: str, expected: dict[str, Any]) -> None:
    plain = CATALOGUE.classes[name]
    config, _ = plain.complete(SIZES)
    assert {key: config[key] for key in expected} == expected
    assert {*config} == {*plain.keys}
    assert plain.complete({**SIZES, "num_key_value_heads": None})[0]["num_key_value_heads"] == 4
    assert not {"mlp_bias", "head_dim"} & {*plain.complete({**SIZES, "head_dim": 4})[0]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": "4"}, "`num_key_value_heads` is '4', expected a whole number"),
        ({"num_key_value_heads": 2.5}, "`num_key_value_heads` is 2.5, expected a whole number"),
        ({"hidden_act": 5}, "`hidden_act` is 5, expected a text"),
        ({"rms_norm_eps": "1e-5"}, "`rms_norm_eps` is '1e-5', expected a number"),
        ({"rope_theta": True}, "`rope_theta` is true, expected a number"),
        ({"rope_theta": {"a": 1}}, "`rope_theta` is {a: 1}, expected a number"),
        # transformers would tie the head: a text is true in Python.
        ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` is 'false', expected true or"),
        ({"attention_bias": 1}, "`attention_bias` is 1, expected true or false"),
        ({"mlp_bias": "no"}, "`mlp_bias` is 'no', expected true or false"),
        ({"head_dim": [16]}, "`head_dim` is [16], expected a whole number"),
        ({"max_position_embeddings": []}, "`max_position_embeddings` is [], expected a whole nu"),
    ],
)
def test_a_value_of_another_kind_is_refused(change: dict[str, Any], said: str) -> None:
    _, faults = CATALOGUE.classes["llama"].complete({**SIZES, **change})
    assert len(faults) == 1
    assert said in str(faults[0])


def test_a_whole_float_is_written_as_an_integer() -> None:
    floats = {"num_key_value_heads": 2.0, "head_dim": 32.0, "max_position_embeddings": 64.0}
    config, faults = CATALOGUE.classes["llama"].complete({**SIZES, **floats, "rope_theta": 5})
    assert faults == []
    assert {key: config[key] for key in floats} == floats
    assert {type(config[key]) for key in floats} == {int}
    # Both of these are right where a float is usual, and null where the class may have none.
    assert config["rope_theta"] == 5
    window = CATALOGUE.classes["mistral"].complete({**SIZES, "sliding_window": None})
    assert window[0]["sliding_window"] is None and window[1] == []


def checked(
    change: dict[str, Any], shapes: dict[str, tuple[int, ...]], **origins: str
) -> list[tuple[str, str, str]]:
    plain = CATALOGUE.classes["llama"]
    config, _ = plain.complete({**SIZES, **change})
    made_by = {name: Origin("keep", (name,), origins.get("where", "my.yaml:3")) for name in shapes}
    faults = check_against_class(plain, config, shapes, made_by)
    return [(fault.where, fault.what, fault.advice) for fault in faults]


def llama() -> dict[str, tuple[int, ...]]:
    plain = CATALOGUE.classes["llama"]
    config, _ = plain.complete(SIZES)
    return {name: expected.shape for name, expected in plain.tensors(config).items()}


def line_of(text: str) -> str:
    lines = (FOLDER / "classes" / "llama.yaml").read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if f"{text}: [" in line]
    assert len(found) == 1
    return f"classes/llama.yaml:{found[0]}"


def test_what_agrees_has_no_faults() -> None:
    assert checked({}, llama()) == []


def test_missing_tensors_are_named_with_one_that_is_like_them() -> None:
    shapes = llama()
    for layer in (0, 1):
        shapes[f"model.layers.{layer}.mlp.up_prok.weight"] = shapes.pop(
            f"model.layers.{layer}.mlp.up_proj.weight"
        )
    del shapes["model.norm.weight"]
    assert checked({}, shapes) == [
        (
            f"{line_of('mlp.up_proj.weight')}, `model.layers.{{0..1}}.mlp.up_proj.weight` "
            "(2 tensors)",
            "is missing: LlamaForCausalLM has it and no rule makes it",
            "`model.layers.{0..1}.mlp.up_prok.weight` (2 tensors) is like it, and not expected.",
        ),
        (
            f"{line_of('model.norm.weight')}, `model.norm.weight`",
            "is missing: LlamaForCausalLM has it and no rule makes it",
            "",
        ),
        (
            "my.yaml:3, `model.layers.{0..1}.mlp.up_prok.weight` (2 tensors)",
            "is not a tensor of LlamaForCausalLM with this config",
            "Drop it with a reason, or give it the name that it has there.",
        ),
    ]


def test_a_bias_that_the_config_does_not_have_is_one_too_many() -> None:
    shapes = llama() | {"model.layers.0.self_attn.q_proj.bias": (16,)}
    (fault,) = checked({}, shapes)
    assert fault[0] == "my.yaml:3, `model.layers.0.self_attn.q_proj.bias`"
    assert fault[1].startswith("is not a tensor of")
    missing = checked({"attention_bias": True}, shapes)
    assert len(missing) == 4
    assert "`model.layers.1.self_attn.q_proj.bias`: is missing" in " ".join(
        f"{where}: {what}" for where, what, _ in missing
    )


def test_a_wrong_size_in_the_config_is_named() -> None:
    advice = "`{}` must be that of the model that was trained, in its config or mapping."
    assert checked({"vocab_size": 48}, llama()) == [
        (
            f"my.yaml:3, `{name}`",
            "has 40 where the config has `vocab_size: 48`",
            advice.format("vocab_size"),
        )
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    ]
    # Every tensor has a side of hidden_size; 2 layers fold to one each, and all say the same.
    faults = checked({"hidden_size": 32}, llama())
    assert len(faults) == 3 + 9
    assert {fault[1:] for fault in faults} == {
        ("has 16 where the config has `hidden_size: 32`", advice.format("hidden_size"))
    }
    (said,) = listed(Fault(*fault) for fault in faults)
    assert "The same at 11 more places: " in said
    # Where no key of the config explains it, the shape is shown.
    (fault,) = checked({}, llama() | {"model.norm.weight": (16, 1)})
    assert fault[1].startswith("has shape [16, 1], LlamaForCausalLM expects [hidden_size] = [16]")
    assert fault[2] == f"The shape stands in {line_of('model.norm.weight')}."


def test_a_tied_head_may_be_there_or_not_but_not_of_another_shape() -> None:
    shapes = llama()
    assert checked({"tie_word_embeddings": True}, shapes) == []
    shapes["lm_head.weight"] = (39, 16)
    assert len(checked({"tie_word_embeddings": True}, shapes)) == 1
    del shapes["lm_head.weight"]
    assert checked({"tie_word_embeddings": True}, shapes) == []
    assert len(checked({"tie_word_embeddings": False}, shapes)) == 1


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"num_hidden_layers": -1}, {"vocab_size": "many"}],
)
def test_hostile_sizes_end_in_a_fault(change: dict[str, Any]) -> None:
    from xtuner2llava.errors import MappingError

    plain = CATALOGUE.classes["llama"]
    config, _ = plain.complete({**SIZES, **change})
    with pytest.raises(MappingError):
        plain.tensors(config)
