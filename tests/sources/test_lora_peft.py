"""Merges beside those of PEFT itself: the same weights, and never further from float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from storing import stored
from xtuner2llava.errors import UnsupportedError
from xtuner2llava.sources.adapter import merge, read_adapter, untied
from xtuner2llava.sources.lora_settings import LoraSettings
from xtuner2llava.sources.model_config import ModelConfig
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import BY_NAME
from xtuner2llava.tensors.lazy import LazyTensor

pytestmark = pytest.mark.filterwarnings("ignore")


def import_peft() -> Any:
    """PEFT. It takes seconds to import, and every worker collects this module."""
    return pytest.importorskip("peft", reason="PEFT is not installed", exc_type=ImportError)


class Net(torch.nn.Module):
    """One layer of each kind that LoRA knows, under names that contain each other."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = torch.nn.Embedding(11, 6)
        self.q = torch.nn.Linear(6, 8)
        self.up_q = torch.nn.Linear(6, 8, bias=False)
        self.square = torch.nn.Linear(6, 6)
        self.fused = torch.nn.Linear(6, 24)
        self.turned = Conv1D(5, 6)
        self.patch = torch.nn.Conv2d(3, 4, (2, 3), bias=False)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11)


def trained(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A PEFT model of `Net` whose every trainable number is random."""
    torch.manual_seed(0)
    net, peft = Net().to(dtype), import_peft()
    model = peft.get_peft_model(net, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.abs_()
    return model


def as_xtuner_saves(model: Any) -> dict[str, torch.Tensor]:
    """What of the state dict lies in a .pth, see `get_peft_model_state_dict` of XTuner.

    With bias="lora_only" it finds no bias, as an adapted layer has it under `base_layer`.
    """
    config = model.peft_config["default"]
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "lora_" in name
        or ".modules_to_save.default." in name
        or (config.bias == "all" and "bias" in name and "original_module" not in name)
    }


def as_peft_saves(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def lazily(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    folder.mkdir(exist_ok=True)
    return {name: stored(folder, name, tensor.detach()) for name, tensor in tensors.items()}


LINEAR = ["q", "up_q", "square", "fused"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR, "r": 4, "lora_alpha": 7},
    "rslora": {"target_modules": LINEAR, "r": 3, "lora_alpha": 7, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "r": 4, "lora_alpha": 7, "use_dora": True},
    "patterns": {
        "target_modules": LINEAR,
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"q": 2, "up_q": 5},
        "alpha_pattern": {"q": 3, "square": 11},
    },
    "rslora with patterns": {
        "target_modules": LINEAR,
        "r": 4,
        "lora_alpha": 7,
        "use_rslora": True,
        "rank_pattern": {"fused": 6},
        "alpha_pattern": {"up_q": 2},
    },
    "every bias": {"target_modules": ["q", "square"], "lora_alpha": 7, "bias": "all"},
    "some biases": {"target_modules": ["q", "square"], "lora_alpha": 7, "bias": "lora_only"},
    "saved modules": {
        "target_modules": ["q"],
        "lora_alpha": 7,
        "modules_to_save": ["head", "norm"],
    },
    "embedding": {"target_modules": ["embed", "q"], "r": 4, "lora_alpha": 7},
    "convolution": {"target_modules": ["patch", "q"], "r": 4, "lora_alpha": 7},
    "transposed": {"target_modules": ["turned"], "lora_alpha": 7, "fan_in_fan_out": True},
    "transposed, found so": {"target_modules": ["turned", "q"], "lora_alpha": 7},
    "not transposed": {"target_modules": ["q", "fused"], "lora_alpha": 7, "fan_in_fan_out": True},
}


@pytest.mark.parametrize("layout", ["pth", "folder"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_as_peft(case: str, layout: str, tmp_path: Path) -> None:
    model = trained(**CASES[case])
    torch.manual_seed(0)
    base = lazily(tmp_path / "base", dict(Net().state_dict()))
    if layout == "pth":
        # Before PEFT corrects it, as an XTuner config says it.
        settings = LoraSettings.from_mapping({"r": 8, **CASES[case]}, "config.py")
        saved = as_xtuner_saves(model)
    else:
        saved = as_peft_saves(model, tmp_path / "saved")
        text = (tmp_path / "saved" / "adapter_config.json").read_text()
        settings = LoraSettings.from_mapping(json.loads(text), "adapter_config.json")
    adapter = read_adapter(lazily(tmp_path / "adapter", saved), settings, "")
    if settings.bias == "lora_only" and not any(name.endswith(".bias") for name in saved):
        # XTuner and PEFT 0.17 save none.
        with pytest.raises(UnsupportedError, match="on q and 1 more: bias='lora_only' says that"):
            merge(base, adapter, "")
        return
    merged = merge(base, adapter, "")
    expected = model.merge_and_unload().state_dict()
    assert list(merged) == list(expected)
    changed = 0
    for name, tensor in expected.items():
        got = merged[name].read(0, merged[name].rows)
        assert torch.allclose(got.double(), tensor.double(), rtol=1e-5, atol=1e-6), name
        changed += int(not torch.equal(base[name].read(0, base[name].rows), tensor))
    assert changed >= len(CASES[case]["target_modules"])


@pytest.mark.parametrize("case", ["every bias", "some biases"])
def test_trained_biases_that_were_not_saved_are_refused(case: str, tmp_path: Path) -> None:
    # As DeepSpeed has it.
    model = trained(**CASES[case])
    saved = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    settings = LoraSettings.from_mapping({"r": 8, **CASES[case]}, "config.py")
    base = lazily(tmp_path / "base", dict(Net().state_dict()))
    tensors = lazily(tmp_path / "adapter", saved)
    merged = merge(base, read_adapter(tensors, settings, ""), "")
    assert torch.equal(
        merged["square.bias"].read(0, 6), model.merge_and_unload().state_dict()["square.bias"]
    )
    (lost,) = (name for name in tensors if name.endswith("square.base_layer.bias"))
    del tensors[lost]
    with pytest.raises(UnsupportedError, match=r"on square: bias='.+' says that its bias was"):
        merge(base, read_adapter(tensors, settings, ""), "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rank", [8, 64])
def test_never_further_from_float64_than_peft(rank: int, dtype: str, tmp_path: Path) -> None:
    target = getattr(torch, dtype)
    torch.manual_seed(rank)
    net = torch.nn.Sequential(torch.nn.Linear(700, 300, bias=False)).to(target)
    weight = net[0].weight.detach().clone()
    peft = import_peft()
    config = peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=16)
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    saved = {n: t.detach().clone() for n, t in model.state_dict().items() if "lora_" in n}
    down, up = (next(t for n, t in saved.items() if kind in n) for kind in ("lora_A", "lora_B"))
    assert down.dtype == torch.float32
    exact = weight.double() + 16 / rank * (up.double() @ down.double())

    settings = LoraSettings.from_mapping({"lora_alpha": 16}, "")
    adapter = read_adapter(lazily(tmp_path / "adapter", saved), settings, "")
    merged = merge(lazily(tmp_path / "base", {"0.weight": weight}), adapter, "")["0.weight"]
    ours = cast(merged, BY_NAME[dtype]).read(0, 300)
    theirs = model.merge_and_unload()[0].weight.detach()
    assert theirs.dtype == ours.dtype == target
    our_error, their_error = ((w.double() - exact).abs() for w in (ours, theirs))
    assert bool((our_error <= their_error + 1e-15).all())
    assert int((our_error < their_error).sum()) > 0


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("layout", ["pth", "folder"])
@pytest.mark.parametrize(
    ("target", "saved_modules"),
    [
        (["q_proj"], ["embed_tokens"]),
        (["q_proj"], ["lm_head"]),
        (["q_proj"], ["embed_tokens", "lm_head"]),
        (["q_proj", "embed_tokens"], None),
        (["q_proj", "lm_head"], None),
    ],
)
def test_a_tied_llm_answers_as_it_was_trained(
    target: list[str], saved_modules: list[str] | None, layout: str, tmp_path: Path
) -> None:
    """PEFT changes one of two tied modules: what is written holds both, and answers the same."""
    peft, transformers = import_peft(), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    llm = transformers.Qwen2ForCausalLM(config).eval()
    tensors = {name: t.clone() for name, t in llm.state_dict().items() if name != HEAD}
    lora = peft.LoraConfig(target_modules=target, modules_to_save=saved_modules, r=2, lora_alpha=3)
    model = peft.get_peft_model(llm, lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.5 if "lora" in name else 0.2))
    ids = torch.arange(17)[None]
    expected = model(input_ids=ids).logits
    saved = as_xtuner_saves(model) if layout == "pth" else as_peft_saves(model, tmp_path / "saved")

    settings = LoraSettings.from_mapping({"r": 2, "lora_alpha": 3}, "")
    adapter = read_adapter(lazily(tmp_path / "adapter", saved), settings, "")
    assert adapter.own_base("") is None
    values: dict[str, Any] = {"tie_word_embeddings": True}
    base = untied(lazily(tmp_path / "base", tensors), adapter, ModelConfig(tmp_path, values))
    merged = merge(base, adapter, "")
    config.tie_word_embeddings = False
    plain = transformers.Qwen2ForCausalLM(config).eval()
    plain.load_state_dict({name: t.read(0, t.rows).float() for name, t in merged.items()})
    assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-5)
    # The wrong answer: both stay one tensor.
    changed = EMBED if torch.equal(plain.lm_head.weight, tensors[EMBED]) else HEAD
    with torch.no_grad():
        both = plain.state_dict()[changed]
        plain.lm_head.weight.copy_(both)
        plain.model.embed_tokens.weight.copy_(both)
    assert not torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-3)


def test_what_is_not_tied_or_not_changed_gets_no_second_tensor(tmp_path: Path) -> None:
    base = lazily(tmp_path / "base", {EMBED: torch.ones(3, 2), "q.weight": torch.ones(2, 2)})
    of_q, of_embedding = (
        read_adapter(
            lazily(tmp_path / str(i), {f"{name}.lora_A.weight": torch.ones(1, 2)}), None, ""
        )
        for i, name in enumerate(("q", "model.embed_tokens"))
    )
    for adapter, config in ((of_q, {}), (of_embedding, {"tie_word_embeddings": False})):
        assert untied(base, adapter, ModelConfig(tmp_path, dict(config))) is base
    assert untied(base, of_embedding, ModelConfig(tmp_path, {})).keys() == {*base, HEAD}
