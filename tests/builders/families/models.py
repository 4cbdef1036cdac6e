"""Tiny random models of every family's own architecture, with their own names and config keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.families import formulas

if TYPE_CHECKING:
    import torch

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """A model as its authors leave it: `config.json`, tensors, and something that computes it."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    model: Any


@dataclass(frozen=True, slots=True)
class Kind:
    """How to make a `Source`: by a transformers class, or by a formula with given shapes."""

    architecture: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    shapes: Callable[[Mapping[str, Any]], Shapes] | None = None
    forward: formulas.Forward | None = None
    embedding: str = "model.embed_tokens.weight"

    def make(self, folder: Path, **change: Any) -> Source:
        """The model with random weights; `folder` is where transformers loads it from."""
        config = {**SIZES, **self.config, **change}
        config = {key: value for key, value in config.items() if key not in self.without}
        config |= {"architectures": [self.architecture], "model_type": self.model_type}
        shapes = self.shapes(config) if self.shapes else shapes_of_class(config)
        tensors = random_tensors(shapes)
        if self.forward is not None:
            model = formulas.Formula(self.forward, config, tensors, self.embedding)
            return Source(config, tensors, model)
        return Source(config, tensors, load_plain(folder, config, tensors))


def random_tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Weights that keep activations near 1, so that no tensor is without influence on logits."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = noise / shape[-1] ** 0.5
        else:
            tensors[name] = noise / 4 + (0.0 if name.endswith("bias") else 1.0)
    return tensors


def load_plain(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The transformers model with these tensors, all of them and no others, in float32."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder,
        torch_dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def shapes_of_class(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a transformers class under the names that its checkpoints have.

    transformers 5 fuses experts in memory; a tied head is left out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # A copy: transformers 5 writes into the tables that it is given.
    given = {key: deepcopy(value) for key, value in config.items() if key != "architectures"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(given.pop("model_type"), **given)
        )
    shapes: Shapes = {}
    for name, tensor in model.state_dict().items():
        for one, shape in experts_apart(name, tuple(tensor.shape), config["model_type"]):
            shapes[one] = shape
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def experts_apart(
    name: str, shape: tuple[int, ...], model_type: str
) -> list[tuple[str, tuple[int, ...]]]:
    mixtral = model_type == "mixtral"
    match = re.fullmatch(r"(.+\.)mlp\.(gate\.weight|experts\.(gate_up|down)_proj)", name)
    if match is None or (match[3] is None and not mixtral):
        return [(name, shape)]
    block = match[1] + ("block_sparse_moe." if mixtral else "mlp.")
    if match[3] is None:
        return [(f"{block}gate.weight", shape)]
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    experts, rows, columns = shape
    parts = [down] if match[3] == "down" else [gate, up]
    return [
        (f"{block}experts.{expert}.{part}.weight", (rows // len(parts), columns))
        for expert in range(experts)
        for part in parts
    ]


def _like_llama(
    attention: Callable[[int, int], Shapes],
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
) -> Callable[[Mapping[str, Any]], Shapes]:
    def shapes(c: Mapping[str, Any]) -> Shapes:
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        keys = (
            hidden
            // c["num_attention_heads"]
            * c.get("num_key_value_heads", c["num_attention_heads"])
        )
        found: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            inside: Shapes = {
                **{f"self_attn.{name}": s for name, s in attention(hidden, keys).items()},
                "self_attn.o_proj.weight": (hidden, hidden),
                "mlp.gate_proj.weight": (inner, hidden),
                "mlp.up_proj.weight": (inner, hidden),
                "mlp.down_proj.weight": (hidden, inner),
                f"{norms[0]}.weight": (hidden,),
                f"{norms[1]}.weight": (hidden,),
            }
            if c.get("bias"):
                inside |= {f"self_attn.{p}_proj.bias": (hidden,) for p in "qkvo"}
            found |= {f"{at}.{name}": shape for name, shape in inside.items()}
        return found | {
            "model.norm.weight": (hidden,),
            "lm_head.weight": (c["vocab_size"], hidden),
        }

    return shapes


def _apart(hidden: int, keys: int) -> Shapes:
    return {
        "q_proj.weight": (hidden, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
    }


def _packed(hidden: int, keys: int) -> Shapes:
    return {"W_pack.weight": (3 * hidden, hidden)}


def _qwen(c: Mapping[str, Any]) -> Shapes:
    hidden = c.get("hidden_size") or c["n_embd"]
    inner = (c.get("intermediate_size") or c["ffn_hidden_size"]) // 2
    inside: Shapes = {
        "ln_1.weight": (hidden,),
        "ln_2.weight": (hidden,),
        "attn.c_attn.weight": (3 * hidden, hidden),
        "attn.c_attn.bias": (3 * hidden,),
        "attn.c_proj.weight": (hidden, hidden),
        "mlp.w1.weight": (inner, hidden),
        "mlp.w2.weight": (inner, hidden),
        "mlp.c_proj.weight": (hidden, inner),
    }
    layers = range(c.get("num_hidden_layers") or c["n_layer"])
    vocabulary = (max(c["vocab_size"], c.get("padded_vocab_size", 0)), hidden)
    return {
        "transformer.wte.weight": vocabulary,
        **{f"transformer.h.{i}.{name}": shape for i in layers for name, shape in inside.items()},
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": vocabulary,
    }


def _internlm2(c: Mapping[str, Any]) -> Shapes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    rows = (
        hidden
        // c["num_attention_heads"]
        * (c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    )
    inside: Shapes = {
        "attention.wqkv.weight": (rows, hidden),
        "attention.wo.weight": (hidden, hidden),
        "feed_forward.w1.weight": (inner, hidden),
        "feed_forward.w3.weight": (inner, hidden),
        "feed_forward.w2.weight": (hidden, inner),
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }
    layers = range(c["num_hidden_layers"])
    return {
        "model.tok_embeddings.weight": (c["vocab_size"], hidden),
        **{f"model.layers.{i}.{name}": shape for i in layers for name, shape in inside.items()},
        "model.norm.weight": (hidden,),
        "output.weight": (c["vocab_size"], hidden),
    }


_QWEN = {
    "intermediate_size": 192,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-5,
    "no_bias": True,
    "rotary_emb_base": 5000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 256,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
_QWEN_EARLY = {
    **_QWEN,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "ffn_hidden_size": 192,
    "vocab_size": 390,
    "padded_vocab_size": 400,
    "apply_residual_connection_post_layernorm": False,
}
_SPELLED_OTHERWISE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_LLAMA_3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

KINDS: Mapping[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", "llama", {"rope_theta": 5000.0, "num_key_value_heads": 4}),
    "llama_3_1": Kind(
        "LlamaForCausalLM", "llama", {"rope_theta": 5000.0, "rope_scaling": _LLAMA_3}
    ),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2", {"rope_theta": 5000.0, "num_key_value_heads": 4}),
    "mistral": Kind(
        "MistralForCausalLM", "mistral", {"num_key_value_heads": 4, "sliding_window": 8}
    ),
    "mixtral": Kind(
        "MixtralForCausalLM", "mixtral", {"num_key_value_heads": 4, "num_local_experts": 3}
    ),
    "phi3": Kind(
        "Phi3ForCausalLM",
        "phi3",
        {"num_key_value_heads": 4, "sliding_window": 100, "pad_token_id": 0},
    ),
    "phi3_long": Kind(
        "Phi3ForCausalLM",
        "phi3",
        {
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "original_max_position_embeddings": 32,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + place / 8 for place in range(8)],
                "long_factor": [2.0 + place for place in range(8)],
            },
        },
    ),
    "qwen3": Kind("Qwen3ForCausalLM", "qwen3", {"num_key_value_heads": 4, "head_dim": 24}),
    "gemma": Kind(
        "GemmaForCausalLM",
        "gemma",
        {"num_key_value_heads": 1, "head_dim": 24, "hidden_act": "gelu", "pad_token_id": 0},
    ),
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {
            "num_key_value_heads": 4,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
    ),
    "qwen": Kind(
        "QWenLMHeadModel",
        "qwen",
        _QWEN,
        shapes=_qwen,
        forward=formulas.qwen,
        embedding="transformer.wte.weight",
    ),
    "qwen_early": Kind(
        "QWenLMHeadModel",
        "qwen",
        _QWEN_EARLY,
        _SPELLED_OTHERWISE,
        shapes=_qwen,
        forward=formulas.qwen,
        embedding="transformer.wte.weight",
    ),
    "internlm": Kind(
        "InternLMForCausalLM",
        "internlm",
        {"bias": True, "rotary": {"base": 5000, "type": "dynamic"}},
        shapes=_like_llama(_apart),
        forward=formulas.internlm,
    ),
    "internlm2": Kind(
        "InternLM2ForCausalLM",
        "internlm2",
        {"bias": False, "rope_theta": 5000, "num_key_value_heads": 4},
        shapes=_internlm2,
        forward=formulas.internlm2,
        embedding="model.tok_embeddings.weight",
    ),
    "internlm2_early": Kind(
        "InternLM2ForCausalLM",
        "internlm",
        {
            "bias": False,
            "rope_theta": 5000,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "dynamic", "factor": 1.0},
        },
        shapes=_internlm2,
        forward=formulas.internlm2,
        embedding="model.tok_embeddings.weight",
    ),
    "internlm3": Kind(
        "InternLM3ForCausalLM",
        "internlm3",
        {
            "bias": False,
            "qkv_bias": False,
            "head_dim": 16,
            "rope_theta": 5000,
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        },
        shapes=_like_llama(_apart),
        forward=formulas.internlm3,
    ),
    "yi": Kind(
        "YiForCausalLM",
        "Yi",
        {"rope_theta": 5000.0, "num_key_value_heads": 2},
        shapes=_like_llama(_apart, ("ln1", "ln2")),
        forward=formulas.yi,
    ),
    "baichuan": Kind(
        "BaiChuanForCausalLM",
        "baichuan",
        shapes=_like_llama(_packed),
        forward=formulas.baichuan,
    ),
    "baichuan2": Kind(
        "BaichuanForCausalLM",
        "baichuan",
        {"model_max_length": 256, "z_loss_weight": 0},
        shapes=_like_llama(_packed),
        forward=formulas.baichuan2,
    ),
}
