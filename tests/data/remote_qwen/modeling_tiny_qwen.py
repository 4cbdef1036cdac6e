"""What a Qwen 1 computes up to its trained length, as code beside a model; written for tests.

RMS norm, rotary attention over one fused projection with a bias, and an MLP
`c_proj(w1(x) * silu(w2(x)))`; no cache and no attention mask but the causal one.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny_qwen import TinyQwenConfig


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.heads, self.base = config.num_attention_heads, config.rotary_emb_base
        self.c_attn = nn.Linear(size, 3 * size)
        self.c_proj = nn.Linear(size, size, bias=False)

    def forward(self, x):
        batch, length, size = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(size, dim=2)
        )
        width = size // self.heads
        steps = torch.arange(0, width, 2, dtype=torch.float32)
        angles = torch.outer(torch.arange(length).float(), 1.0 / self.base ** (steps / width))
        angles = torch.cat([angles, angles], dim=-1)

        def turn(t):
            first, second = t.chunk(2, dim=-1)
            return t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

        scores = turn(q) @ turn(k).transpose(2, 3) / width**0.5
        hidden = torch.full((length, length), float("-inf")).triu(1)
        mixed = (scores + hidden).softmax(-1) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, size))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = Norm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = Norm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        return (hidden_states + self.mlp(self.ln_2(hidden_states)),)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.ln_f = Norm(config.hidden_size, config.layer_norm_epsilon)


class TinyQwenLMHeadModel(PreTrainedModel):
    config_class = TinyQwenConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.transformer.h:
            x = layer(x)[0]
        return CausalLMOutput(logits=self.lm_head(self.transformer.ln_f(x)))
