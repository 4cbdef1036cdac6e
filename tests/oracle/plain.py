"""The plain Llama, Qwen2, Mistral or Phi-3 that a family's language model is, tensor by tensor.

Written down from each family's modelling code, as the comments of `mappings/families` are, and not
taken from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from oracle.reading import Tensors

_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")
_OUTSIDE = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
}
_INTERNLM2 = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_QWEN = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
_YI = {"ln1.weight": "input_layernorm.weight", "ln2.weight": "post_attention_layernorm.weight"}


def plain_llm(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """The language model `tensors`, of the `architectures` of `config`, in plain names."""
    architecture = config["architectures"][0]
    change = _FAMILIES.get(architecture, _same)
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if name.endswith("inv_freq"):
            continue
        if match is None:
            found[_OUTSIDE.get(name, name)] = tensor
            continue
        for inner, part in change(match[2], tensor, config).items():
            found[f"model.layers.{match[1]}.{inner}"] = part
    if architecture == "BaichuanForCausalLM":
        # Baichuan2 divides each row of its head by its length (NormHead); Baichuan is BaiChuan….
        head = found["lm_head.weight"].double()
        found["lm_head.weight"] = head / head.norm(dim=1, keepdim=True)
    return found


_Change = Callable[[str, torch.Tensor, Mapping[str, Any]], Tensors]


def _same(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Tensors:
    return {name: tensor}


def _renamed(names: Mapping[str, str]) -> _Change:
    return lambda name, tensor, config: {names.get(name, name): tensor}


def _phi3(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Tensors:
    if config.get("rope_scaling"):
        return {name: tensor}  # It stays a Phi3ForCausalLM.
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    if name == "self_attn.qkv_proj.weight":
        head = config["hidden_size"] // heads
        q, k, v = tensor.split([heads * head, keys * head, keys * head])
        return _qkv(q, k, v)
    if name == "mlp.gate_up_proj.weight":
        gate, up = tensor.chunk(2)
        return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    return {name: tensor}


def _internlm2(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Tensors:
    """Row by row: of each key-value head its queries, then its key, then its value."""
    if name != "attention.wqkv.weight":
        return {_INTERNLM2[name]: tensor}
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    head = config["hidden_size"] // heads
    blocks = list(tensor.split(head))
    group = heads // keys + 2
    q = [block for n, block in enumerate(blocks) if n % group < group - 2]
    k, v = (blocks[group - 2 :: group], blocks[group - 1 :: group])
    return _qkv(torch.cat(q), torch.cat(k), torch.cat(v))


def _qwen(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Tensors:
    if name.startswith("attn.c_attn."):
        return _qkv(*tensor.chunk(3), kind=name.rpartition(".")[2])
    return {_QWEN[name]: tensor}


def _baichuan(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> Tensors:
    return _qkv(*tensor.chunk(3)) if name == "self_attn.W_pack.weight" else {name: tensor}


def _qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str = "weight") -> Tensors:
    return {f"self_attn.{n}_proj.{kind}": t for n, t in (("q", q), ("k", k), ("v", v))}


_FAMILIES: Mapping[str, _Change] = {
    "Phi3ForCausalLM": _phi3,
    "InternLM2ForCausalLM": _internlm2,
    "QWenLMHeadModel": _qwen,
    "YiForCausalLM": _renamed(_YI),
    "BaiChuanForCausalLM": _baichuan,
    "BaichuanForCausalLM": _baichuan,
}
