"""Language models whose code is in no transformers release, written down from their formulas.

Each takes tensors under the names of its own checkpoints. They share arithmetic, and nothing with
the converter; where each comes from is said at each. Batches of one sequence, float32, no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

    Tensors: TypeAlias = Mapping[str, torch.Tensor]
    Forward: TypeAlias = Callable[[Tensors, Mapping[str, Any], torch.Tensor], torch.Tensor]


class Formula:
    """A model for `reference.compose.Llava`: embeddings in, logits out."""

    def __init__(
        self, forward: Forward, config: Mapping[str, Any], tensors: Tensors, embedding: str
    ) -> None:
        self._forward, self._config, self._tensors = forward, config, tensors
        self._embedding = tensors[embedding]

    def get_input_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: self._embedding[ids]

    def __call__(self, inputs_embeds: torch.Tensor, use_cache: bool = False) -> Any:
        logits = self._forward(self._tensors, self._config, inputs_embeds[0])
        return SimpleNamespace(logits=logits[None])


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    import torch

    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: int, theta: float
) -> torch.Tensor:
    """Causal attention of (tokens, heads * head) each; several query heads may share a key head.

    Rotary embedding: dimension j and j + head / 2 are turned by position / theta^(2j / head).
    """
    import torch

    tokens = q.shape[0]
    q, k, v = (part.view(tokens, -1, head).transpose(0, 1) for part in (q, k, v))
    angles = torch.outer(
        torch.arange(tokens).float(), theta ** -(torch.arange(0, head, 2).float() / head)
    )
    cos, sin = angles.cos(), angles.sin()

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., : head // 2], x[..., head // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    shared = q.shape[0] // k.shape[0]
    k, v = (part.repeat_interleave(shared, dim=0) for part in (turned(k), v))
    scores = turned(q) @ k.transpose(1, 2) / head**0.5
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1)


def qwen(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """Qwen/Qwen-7B `modeling_qwen.py`: QWenAttention, QWenMLP, `a1 * F.silu(a2)`."""
    from torch.nn.functional import linear, silu

    hidden = c.get("hidden_size") or c["n_embd"]
    heads = c.get("num_attention_heads") or c["n_head"]
    eps = c["layer_norm_epsilon"]
    for layer in range(c.get("num_hidden_layers") or c["n_layer"]):
        at = f"transformer.h.{layer}"
        n = norm(x, t[f"{at}.ln_1.weight"], eps)
        mixed = linear(n, t[f"{at}.attn.c_attn.weight"], t[f"{at}.attn.c_attn.bias"])
        q, k, v = mixed.split(hidden, dim=-1)
        attended = attention(q, k, v, hidden // heads, c["rotary_emb_base"])
        x = x + linear(attended, t[f"{at}.attn.c_proj.weight"])
        n = norm(x, t[f"{at}.ln_2.weight"], eps)
        a1, a2 = (linear(n, t[f"{at}.mlp.{w}.weight"]) for w in ("w1", "w2"))
        x = x + linear(a1 * silu(a2), t[f"{at}.mlp.c_proj.weight"])
    return linear(norm(x, t["transformer.ln_f.weight"], eps), t["lm_head.weight"])


def internlm2(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """internlm/internlm2-chat-7b `modeling_internlm2.py`: `b q (h gs d) -> b q h gs d`."""
    from torch.nn.functional import linear, silu

    head = c["hidden_size"] // c["num_attention_heads"]
    shared = c["num_attention_heads"] // c["num_key_value_heads"]
    eps = c["rms_norm_eps"]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        n = norm(x, t[f"{at}.attention_norm.weight"], eps)
        mixed = linear(n, t[f"{at}.attention.wqkv.weight"])
        mixed = mixed.view(len(x), c["num_key_value_heads"], shared + 2, head)
        q = mixed[:, :, :shared].reshape(len(x), -1)
        k, v = (mixed[:, :, place].reshape(len(x), -1) for place in (-2, -1))
        attended = attention(q, k, v, head, c["rope_theta"])
        x = x + linear(attended, t[f"{at}.attention.wo.weight"])
        n = norm(x, t[f"{at}.ffn_norm.weight"], eps)
        w1, w2, w3 = (t[f"{at}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
        x = x + linear(silu(linear(n, w1)) * linear(n, w3), w2)
    return linear(norm(x, t["model.norm.weight"], eps), t["output.weight"])


def like_llama(
    t: Tensors,
    c: Mapping[str, Any],
    x: torch.Tensor,
    project: Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    theta: float,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
) -> torch.Tensor:
    """What InternLM 1 and 3, Yi and Baichuan share; `project` gives q, k, v of a layer."""
    from torch.nn.functional import linear, silu

    head = c["hidden_size"] // c["num_attention_heads"]
    eps = c["rms_norm_eps"]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        q, k, v = project(f"{at}.self_attn", norm(x, t[f"{at}.{norms[0]}.weight"], eps))
        attended = attention(q, k, v, head, theta)
        bias = t.get(f"{at}.self_attn.o_proj.bias")
        x = x + linear(attended, t[f"{at}.self_attn.o_proj.weight"], bias)
        n = norm(x, t[f"{at}.{norms[1]}.weight"], eps)
        gate, up, down = (t[f"{at}.mlp.{w}_proj.weight"] for w in ("gate", "up", "down"))
        x = x + linear(silu(linear(n, gate)) * linear(n, up), down)
    return norm(x, t["model.norm.weight"], eps)


def internlm(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """internlm/internlm-chat-7b `modeling_internlm.py`: `bias=config.bias` on all four."""
    x = like_llama(t, c, x, lambda at, n: _apart(t, at, n), theta=c["rotary"]["base"])
    return x @ t["lm_head.weight"].T


def internlm3(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """internlm/internlm3-8b-instruct `modeling_internlm3.py`, without biases."""
    x = like_llama(t, c, x, lambda at, n: _apart(t, at, n), theta=c["rope_theta"])
    return x @ t["lm_head.weight"].T


def yi(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """01-ai/Yi-6B `modeling_yi.py` of November 2023: YiDecoderLayer with `ln1` and `ln2`."""
    project = lambda at, n: _apart(t, at, n)  # noqa: E731
    x = like_llama(t, c, x, project, theta=c["rope_theta"], norms=("ln1", "ln2"))
    return x @ t["lm_head.weight"].T


def baichuan(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """baichuan-inc/Baichuan-7B `modeling_baichuan.py`: `proj.unflatten(-1, (3, hidden_size))`."""
    return _packed(t, c, x) @ t["lm_head.weight"].T


def baichuan2(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """baichuan-inc/Baichuan2-7B-Chat `modeling_baichuan.py`: NormHead."""
    head = t["lm_head.weight"]
    return _packed(t, c, x) @ (head / head.norm(dim=1, keepdim=True)).T


def _packed(t: Tensors, c: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    def project(at: str, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mixed = (n @ t[f"{at}.W_pack.weight"].T).unflatten(-1, (3, c["hidden_size"]))
        return mixed[:, 0], mixed[:, 1], mixed[:, 2]

    return like_llama(t, c, x, project, theta=10000.0)


def _apart(t: Tensors, at: str, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from torch.nn.functional import linear

    q, k, v = (
        linear(n, t[f"{at}.{part}_proj.weight"], t.get(f"{at}.{part}_proj.bias"))
        for part in ("q", "k", "v")
    )
    return q, k, v
