"""LoRA adapters: names of all kinds, settings that are understood or refused, and merges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from storing import stored
from xtuner2llava.errors import CheckpointError, UnsupportedError
from xtuner2llava.sources.adapter import is_adapted, merge, read_adapter
from xtuner2llava.sources.lora_settings import LoraSettings
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT16
from xtuner2llava.tensors.rows import split
from xtuner2llava.training_config.config import TrainingConfig

Tensors = Mapping[str, torch.Tensor]


def settings(**values: Any) -> LoraSettings:
    return LoraSettings.from_mapping({"lora_alpha": 2, **values}, "adapter_config.json")


def merged(
    folder: Path, base: Tensors, adapter: Tensors, chosen: LoraSettings | None = None
) -> dict[str, Any]:
    """What a base and an adapter make, as lists."""
    lazy_base, lazy_adapter = (
        {name: stored(folder, name, tensor) for name, tensor in tensors.items()}
        for tensors in (base, adapter)
    )
    opened = read_adapter(lazy_adapter, chosen or settings(), "iter_2.pth, LLM")
    result = merge(lazy_base, opened, "iter_2.pth, LLM")
    assert list(result) == list(base)
    return {name: tensor.read(0, tensor.rows).tolist() for name, tensor in result.items()}


# Two outputs, three inputs, rank 1: B @ A is [[1, 2, 3], [10, 20, 30]].
WEIGHT = torch.zeros(2, 3)
A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0]])
TWICE = [[2.0, 4.0, 6.0], [20.0, 40.0, 60.0]]


@pytest.mark.parametrize(
    "names",
    [
        # In a .pth, in a folder, and as older and newer PEFT may say it.
        "base_model.model.q.lora_A.default.weight base_model.model.q.lora_B.default.weight",
        "base_model.model.q.lora_A.weight base_model.model.q.lora_B.weight",
        "q.lora_A.default.weight q.lora_B.default.weight",
        "q.lora_A.weight q.lora_B.weight",
        "base_model.model.q.lora_A base_model.model.q.lora_B",
    ],
)
def test_names_of_factors(names: str, tmp_path: Path) -> None:
    down, up = names.split()
    assert is_adapted({down: 0})
    assert merged(tmp_path, {"q.weight": WEIGHT}, {up: B, down: A}) == {"q.weight": TWICE}


def test_modules_that_only_look_alike_are_told_apart(tmp_path: Path) -> None:
    base = {"a.q.weight": WEIGHT, "b.q.weight": WEIGHT, "q.weight": WEIGHT, "q.bias": B[:, 0]}
    adapter = {"b.q.lora_A.weight": A, "b.q.lora_B.weight": B}
    found = merged(tmp_path, base, adapter)
    assert found["b.q.weight"] == TWICE
    assert found["a.q.weight"] == found["q.weight"] == WEIGHT.tolist()
    assert found["q.bias"] == [1.0, 10.0]


@pytest.mark.parametrize(
    ("values", "rank", "scale"),
    [
        ({"lora_alpha": 16}, 64, 0.25),
        ({"lora_alpha": 16, "use_rslora": True}, 64, 2.0),
        ({"lora_alpha": 16, "rank_pattern": {"q": 64}}, 64, 0.25),
        ({"lora_alpha": 16, "alpha_pattern": {"q": 128}}, 64, 2.0),
        ({"lora_alpha": 16, "alpha_pattern": {"self_attn.q": 128}}, 64, 2.0),
        ({"lora_alpha": 16, "alpha_pattern": {"model.layers.0.self_attn.q": 128}}, 64, 2.0),
        ({"lora_alpha": 16, "alpha_pattern": {"attn.q": 128, "k": 1}}, 64, 0.25),
        ({"lora_alpha": 16, "alpha_pattern": {"q": 128}, "use_rslora": True}, 64, 16.0),
        ({"lora_alpha": None, "alpha_pattern": {"q": 128}}, 64, 2.0),
        ({"lora_alpha": None, "alpha_pattern": {"k": 128}}, 64, None),
        ({"lora_alpha": 0}, 64, 0.0),
        ({"lora_alpha": 0.5}, 1, 0.5),
    ],
)
def test_the_scale(values: dict[str, Any], rank: int, scale: float | None) -> None:
    assert settings(**values).scale("model.layers.0.self_attn.q", rank) == scale


@pytest.mark.parametrize(
    ("alphas", "ranks", "scale"),
    [
        ({"q": 4, "self_attn.q": 8}, {}, None),
        ({"q": 8, "self_attn.q": 8}, {}, 4.0),
        ({"q": 8}, {"q": 2}, 4.0),
        ({"q": 8}, {"k": 2}, 4.0),
        ({"self_attn.q": 8}, {"q": 2}, None),
        ({"self_attn.q": 8}, {"(q|k)": 2}, None),
        ({"self_attn.q": 2}, {"q": 2}, 1.0),
    ],
)
def test_patterns_whose_order_decides_are_refused(
    alphas: dict[str, int], ranks: dict[str, int], scale: float | None
) -> None:
    """Neither XTuner's config nor adapter_config.json keeps it, and PEFT 0.13 and 0.14 differ."""
    chosen = settings(alpha_pattern=alphas, rank_pattern=ranks)
    if scale is None:
        with pytest.raises(ValueError, match=r"its alpha is . or . by alpha_pattern and rank"):
            chosen.scale("model.layers.0.self_attn.q", 2)
    else:
        assert chosen.scale("model.layers.0.self_attn.q", 2) == scale


def test_rslora_of_a_rank_that_is_not_a_square() -> None:
    assert settings(use_rslora=True).scale("q", 3) == 2 / math.sqrt(3)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights too"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changes"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "LoRA setting layer_replication="),
        ({"lora_bias": True}, "LoRA setting lora_bias=True"),
        ({"use_qalora": True}, "LoRA setting use_qalora=True"),
        ({"target_parameters": ["experts.gate"]}, "LoRA setting target_parameters="),
        ({"trainable_token_indices": [5]}, "LoRA setting trainable_token_indices="),
        ({"loftq_config": {"bits": 4}}, "LoRA setting loftq_config="),
        ({"megatron_config": {"x": 1}}, "LoRA setting megatron_config="),
        ({"a_setting_of_tomorrow": 1}, "LoRA setting a_setting_of_tomorrow=1"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA"),
        ({"peft_type": "PeftType.ADALORA"}, "peft_type is 'ADALORA', expected LORA"),
        ({"bias": "some"}, "bias='some', expected none, all or lora_only"),
        ({"alpha_pattern": {"q|k": 8}}, "alpha_pattern 'q|k': 8 is not a plain name"),
        ({"alpha_pattern": {"(a+)+$": 8}}, "is not a plain name"),
        ({"alpha_pattern": {"q": "8"}}, "alpha_pattern 'q': '8' is not a plain name"),
        ({"lora_alpha": "16"}, "lora_alpha='16', expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan, expected a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf, expected a number"),
        ({"lora_alpha": 10**400}, "expected a number"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused_by_name(
    values: dict[str, Any], text: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        settings(**values)
    (fault,) = caught.value.faults
    assert text in fault.what
    assert fault.where == "adapter_config.json"


def test_all_settings_that_are_refused_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        settings(lora_bias=True, use_qalora=True, init_lora_weights="pissa")
    assert len(caught.value.faults) == 3


def test_settings_without_effect_on_the_weights_are_fine() -> None:
    chosen = settings(
        peft_type="LORA", task_type="CAUSAL_LM", r=8, lora_dropout=0.1, target_modules=["q"],
        init_lora_weights="gaussian", inference_mode=True, modules_to_save=["lm_head"],
        layers_to_transform=[1], layers_pattern="h", base_model_name_or_path="x", revision="main",
        rank_pattern={"q": 4}, loftq_config={}, layer_replication=None, lora_bias=False,
        use_qalora=False, qalora_group_size=16, target_parameters=None, megatron_core="m",
        megatron_config=None, trainable_token_indices=None, eva_config=None, corda_config=None,
    )  # fmt: skip
    # To compare with, not to merge by.
    read = {"rank_pattern": frozenset("q"), "ranks": frozenset({4, 8}), "base": "x"}
    assert chosen == LoraSettings("adapter_config.json", 2.0, **read)  # type: ignore[arg-type]


def lora(arguments: str) -> LoraSettings:
    """The settings of the LoRA that an XTuner config gives its LLM."""
    section = TrainingConfig.from_text(
        f"model = dict(type='LLaVAModel', llm_lora=dict({arguments}))", "config.py"
    ).lora("llm")
    assert section is not None
    return LoraSettings.from_config(section, None)


def test_the_settings_of_an_xtuner_config() -> None:
    # The defaults are PEFT's.
    assert lora("") == LoraSettings("config.py", 8.0, ranks=frozenset({8}), targets=())
    assert lora(
        "type='peft.LoraConfig', r=4, lora_alpha=2.5, use_rslora=True, use_dora=True,"
        " fan_in_fan_out=True, bias='all', target_modules=build(), modules_to_save=['a'],"
        " rank_pattern={'q': 2}, alpha_pattern=dict(q=1), layers_to_transform=[1]"
    ) == LoraSettings(
        "config.py", 2.5, use_rslora=True, use_dora=True, fan_in_fan_out=True, bias="all",
        alpha_pattern={"q": 1.0}, rank_pattern=frozenset("q"), ranks=frozenset({4, 2}),
    )  # fmt: skip


LAYERS = {f"layers.{n}.{name}.weight": WEIGHT for n in (0, 1) for name in ("q", "up")}


@pytest.mark.parametrize(
    ("record", "modules", "lacking"),
    [
        ({}, ["layers.0.q"], "layers.1.q"),
        ({"target_modules": "all-linear"}, ["layers.1.q", "layers.1.up"], "layers.0.q and 1 more"),
        (
            {"target_modules": ["q", "up"]},
            ["layers.0.q", "layers.1.q", "layers.1.up"],
            "layers.0.up",
        ),
        ({"target_modules": ["q"]}, ["layers.0.q", "layers.1.q"], None),
        ({"target_modules": ["layers.0.q"]}, ["layers.0.q"], None),
        ({"target_modules": r".*0\.q"}, ["layers.0.q"], None),
        ({"layers_to_transform": [0]}, ["layers.0.q"], None),
        ({"exclude_modules": ["layers.1.q"]}, ["layers.0.q"], None),
    ],
)
def test_an_adapter_that_lacks_a_layer(
    record: dict[str, Any], modules: list[str], lacking: str | None, tmp_path: Path
) -> None:
    factors = {f"{m}.lora_{k}.weight": t for m in modules for k, t in (("A", A), ("B", B))}
    if lacking is None:
        found = merged(tmp_path, LAYERS, factors, settings(**record))
        assert [n for n, value in found.items() if value == TWICE] == [
            f"{m}.weight" for m in modules
        ]
        return
    with pytest.raises(UnsupportedError, match="no factors, while other layers have") as caught:
        merged(tmp_path, LAYERS, factors, settings(**record))
    (fault,) = caught.value.faults
    assert fault.where.endswith(f"LoRA on {lacking}")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("r=0", r"config.py:1: model\.llm_lora\.r is 0, a positive integer"),
        ("lora_alpha='8'", r"config.py:1: model\.llm_lora\.lora_alpha is '8', a finite number"),
        ("lora_alpha=float('nan')", "with --lora-alpha"),
        ("lora_alpha=2 * build()", "with --lora-alpha"),
        ("alpha_pattern={'q': 'x'}", "alpha_pattern 'q': 'x' is not a plain name"),
        ("unheard_of=build()", r"model\.llm_lora\.unheard_of is not known without running code"),
        ("bias=build()", r"model\.llm_lora\.bias is not known"),
        ("init_lora_weights='pissa'", "init_lora_weights='pissa' changes the base weights too"),
    ],
)
def test_settings_of_a_config_that_cannot_be_merged(arguments: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        lora(arguments)


def test_saved_modules_replace_those_of_the_base(tmp_path: Path) -> None:
    base = {"lm_head.weight": WEIGHT, "mlp.gate.weight": WEIGHT, "q.weight": WEIGHT}
    adapter = {
        "base_model.model.lm_head.modules_to_save.default.weight": WEIGHT + 1,
        "base_model.model.mlp.modules_to_save.default.gate.weight": WEIGHT + 2,
        # As in a folder.
        "base_model.model.q.weight": WEIGHT + 3,
    }
    found = merged(tmp_path, base, adapter)
    assert [found[name][0][0] for name in base] == [1.0, 2.0, 3.0]


def test_an_adapter_goes_on_top_of_a_saved_module(tmp_path: Path) -> None:
    adapter = {"q.base_layer.weight": WEIGHT + 1, "q.lora_A.weight": A, "q.lora_B.weight": B}
    found = merged(tmp_path, {"q.weight": WEIGHT}, adapter)
    assert found["q.weight"] == [[3.0, 5.0, 7.0], [21.0, 41.0, 61.0]]


def test_biases_that_were_trained(tmp_path: Path) -> None:
    base = {"q.weight": WEIGHT, "q.bias": torch.zeros(2), "norm.bias": torch.zeros(1)}
    adapter = {
        "base_model.model.q.lora_A.default.weight": A,
        "base_model.model.q.lora_B.default.weight": B,
        "base_model.model.q.base_layer.bias": torch.tensor([5.0, 6.0]),
        "base_model.model.norm.bias": torch.tensor([7.0]),
    }
    found = merged(tmp_path, base, adapter, settings(bias="all"))
    assert found == {"q.weight": TWICE, "q.bias": [5.0, 6.0], "norm.bias": [7.0]}


def test_an_embedding(tmp_path: Path) -> None:
    # lora_embedding_A is (rank, tokens), lora_embedding_B (hidden, rank): both are transposed.
    base = {"embed.weight": torch.zeros(3, 2)}
    for suffix in ("", ".default"):
        adapter = {f"embed.lora_embedding_A{suffix}": A, f"embed.lora_embedding_B{suffix}": B}
        found = merged(tmp_path, base, adapter)
        assert found["embed.weight"] == [[2.0, 20.0], [4.0, 40.0], [6.0, 60.0]]


def test_a_convolution(tmp_path: Path) -> None:
    base = {"patch.weight": torch.zeros(2, 3, 1, 1)}
    adapter = {
        "patch.lora_A.weight": A.view(1, 3, 1, 1),
        "patch.lora_B.weight": B.view(2, 1, 1, 1),
    }
    found = torch.tensor(merged(tmp_path, base, adapter)["patch.weight"])
    assert found.view(2, 3).tolist() == TWICE


def test_a_transposed_layer_is_known_by_its_shape(tmp_path: Path) -> None:
    # PEFT sets fan_in_fan_out by the layer and not by the config.
    adapter = {"c.lora_A.weight": A, "c.lora_B.weight": B}
    for flag in (False, True):
        found = merged(tmp_path, {"c.weight": WEIGHT.T}, adapter, settings(fan_in_fan_out=flag))
        assert found["c.weight"] == torch.tensor(TWICE).T.tolist()
        found = merged(tmp_path, {"c.weight": WEIGHT}, adapter, settings(fan_in_fan_out=flag))
        assert found["c.weight"] == TWICE
    square = {"c.lora_A.weight": A[:, :2], "c.lora_B.weight": B}
    found = merged(tmp_path, {"c.weight": torch.zeros(2, 2)}, square)
    assert found["c.weight"] == [[2.0, 4.0], [20.0, 40.0]]
    with pytest.raises(
        UnsupportedError, match="a square weight does not show whether PEFT applied"
    ):
        merged(tmp_path, {"c.weight": torch.zeros(2, 2)}, square, settings(fan_in_fan_out=True))


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.default",
                                  "lora_magnitude_vector.weight",
                                  "lora_magnitude_vector.default.weight"])  # fmt: skip
def test_dora(name: str, tmp_path: Path) -> None:
    # With the factors, the rows are [3, 4] and [0, 2].
    base = {"q.weight": torch.tensor([[1.0, 4.0], [0.0, 2.0]])}
    adapter = {
        "q.lora_A.weight": torch.tensor([[1.0, 0.0]]),
        "q.lora_B.weight": torch.tensor([[1.0], [0.0]]),
        f"q.{name}": torch.tensor([10.0, 1.0]),
    }
    found = merged(tmp_path, base, adapter, settings(use_dora=True))
    assert found["q.weight"] == [[6.0, 8.0], [0.0, 1.0]]


FACTORS = {"q.lora_A.weight": A, "q.lora_B.weight": B}
MAGNITUDE = torch.ones(2)


@pytest.mark.parametrize(
    ("base", "adapter", "values", "text"),
    [
        ({"k.weight": WEIGHT}, FACTORS, {}, "the base model has no such module"),
        ({"q.weight": WEIGHT[:, :2]}, FACTORS, {}, "do not fit a weight of shape"),
        ({"q.weight": WEIGHT}, {"q.lora_A.weight": A}, {}, "lora_B is missing"),
        ({"q.weight": WEIGHT}, {"q.lora_B.weight": B}, {}, "lora_A is missing"),
        ({"q.weight": WEIGHT}, {"q.lora_embedding_A": A}, {}, "lora_embedding_B is missing"),
        (
            {"q.weight": WEIGHT},
            {"q.lora_A.weight": A[:0], "q.lora_B.weight": B[:, :0]},
            {},
            "its rank is 0",
        ),
        (
            {"q.weight": WEIGHT},
            {"q.lora_A.weight": A, "q.lora_B.weight": torch.ones(2, 2)},
            {},
            "do not fit",
        ),
        (
            {"q.weight": WEIGHT},
            {"q.lora_A.weight": torch.tensor(1.0), "q.lora_B.weight": torch.tensor(1.0)},
            {},
            "do not fit",
        ),
        ({"q.weight": WEIGHT}, FACTORS, {"lora_alpha": None}, "but alpha is recorded nowhere"),
        ({"q.weight": WEIGHT}, FACTORS, {"use_dora": True}, "its magnitude vector is missing"),
        (
            {"q.weight": WEIGHT},
            {**FACTORS, "q.lora_magnitude_vector": torch.ones(3)},
            {"use_dora": True},
            r"a magnitude of shape \[3\] for 2 rows",
        ),
        (
            {"q.weight": WEIGHT.T},
            {**FACTORS, "q.lora_magnitude_vector": MAGNITUDE},
            {"use_dora": True},
            "DoRA on an embedding or a transposed layer cannot be merged",
        ),
        (
            {"q.weight": WEIGHT.view(2, 3, 1)},
            {**FACTORS, "q.lora_magnitude_vector": MAGNITUDE},
            {"use_dora": True},
            "DoRA on a convolution cannot be merged",
        ),
        ({"q.weight": WEIGHT}, {"k.bias": MAGNITUDE}, {}, "k.bias: is saved beside the adapter"),
        ({"q.weight": WEIGHT}, {"q.weight": WEIGHT[:, :1]}, {}, r"has shape \[2, 1\], the base's"),
        ({"q.weight": WEIGHT}, {"q.lora_A.other.weight": A}, {}, "of a kind XTuner never makes"),
        ({"q.weight": WEIGHT}, {"q.lora_B.bias": MAGNITUDE}, {}, "of a kind XTuner never makes"),
        ({"q.weight": WEIGHT}, {"q.lora_B.default.bias": MAGNITUDE}, {}, "XTuner never makes"),
        ({"q.weight": WEIGHT}, {"q.lora_E.default": A}, {}, "is saved beside the adapter"),
    ],
)
def test_what_does_not_fit_is_refused(
    base: Tensors, adapter: Tensors, values: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=text) as caught:
        merged(tmp_path, base, adapter, settings(**values))
    assert caught.value.faults[0].where.startswith("iter_2.pth, LLM, ")


def test_one_fault_for_what_is_wrong_with_many_modules(tmp_path: Path) -> None:
    base = {f"layers.{i}.q.weight": WEIGHT for i in range(4)}
    adapter = {f"layers.{i}.{name}": t for i in range(5) for name, t in FACTORS.items()}
    with pytest.raises(UnsupportedError) as caught:
        merged(tmp_path, base, adapter, settings(lora_alpha=None))
    assert [(f.where, f.what[:20]) for f in caught.value.faults] == [
        ("iter_2.pth, LLM, LoRA on layers.0.q and 3 more", "rank 1 is in the sha"),
        ("iter_2.pth, LLM, LoRA on layers.4.q", "the base model has n"),
    ]


def test_ranks_are_counted(tmp_path: Path) -> None:
    adapter = {
        f"{name}.lora_A.weight": stored(tmp_path, name, torch.ones(rank, 3))
        for name, rank in (("a", 8), ("b", 4), ("c", 8))
    }
    assert read_adapter(adapter, None, "here").ranks == (4, 8)


def test_a_fused_weight_is_merged_before_it_is_split(tmp_path: Path) -> None:
    # As Phi-3's qkv_proj: one adapter on all three.
    torch.manual_seed(0)
    weight, down, up = torch.randn(12, 5).half(), torch.randn(2, 5), torch.randn(12, 2)
    base = {"qkv.weight": stored(tmp_path, "qkv", weight)}
    factors = {
        "qkv.lora_A.weight": stored(tmp_path, "A", down),
        "qkv.lora_B.weight": stored(tmp_path, "B", up),
    }
    whole = merge(base, read_adapter(factors, settings(), ""), "")["qkv.weight"]
    exact = (weight.double() + up.double() @ down.double()).numpy().astype("float16")
    parts = [cast(part, FLOAT16).read(0, 4).numpy() for part in split(whole, [4, 4, 4])]
    for i, part in enumerate(parts):
        assert (part == exact[4 * i : 4 * i + 4]).all()
