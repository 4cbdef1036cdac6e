"""Config keys that say the same under other names, so that no default stands in place of a value.

A class has a default for most of its keys. Where nothing makes such a key and the source has one
like it that nothing reads, such as `rotary_base: 1000000` beside `rope_theta`, the default is
likely to be wrong, and no shape shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.caveats import Limit
from xtuner2llava.mapping.expressions import parse_expression, show, visible

# Other names that configs have for keys of transformers' classes.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("padded_vocab_size", "n_vocab", "vocabulary_size"),
    "hidden_size": ("n_embd", "d_model", "dim", "hidden_dim", "embed_dim", "model_dim", "width"),
    "intermediate_size": ("ffn_hidden_size", "ffn_dim", "d_ff", "n_inner", "inner_size", "ffn",
                          "hidden_dim", "ff_dim", "mlp_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "layers", "depth"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv", "num_query_groups",
                            "multi_query_group_num", "kv_heads"),
    "head_dim": ("kv_channels", "d_head", "head_size"),
    "max_position_embeddings": ("n_positions", "seq_length", "max_seq_len", "max_sequence_length",
                                "n_ctx", "context_length", "max_length", "model_max_length"),
    "rms_norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon", "norm_eps",
                     "norm_epsilon", "rms_eps", "eps"),
    "rope_theta": ("rotary_emb_base", "rotary_base", "rope_base", "theta"),
    "hidden_act": ("activation", "activation_function", "hidden_activation", "act_fn"),
    "tie_word_embeddings": ("tie_embeddings", "share_embeddings", "tied"),
    "sliding_window": ("window_size", "attention_window", "attn_window_size", "local_window"),
    "attention_bias": ("qkv_bias", "use_bias", "add_bias_linear", "bias"),
    "num_local_experts": ("num_experts", "n_experts", "moe_num_experts", "n_routed_experts"),
    "num_experts": ("num_local_experts", "n_experts", "moe_num_experts", "n_routed_experts"),
    "num_experts_per_tok": ("top_k", "moe_top_k", "num_selected_experts", "n_experts_per_token"),
}  # fmt: skip
# What has no part in what a trained model computes.
_OF_TRAINING = {"attention_dropout", "initializer_range", "output_router_logits", "pretraining_tp",
                "router_aux_loss_coef"}  # fmt: skip
_SAME_WORD = {
    "act": "activation", "attn": "attention", "base": "theta", "emb": "embedding", "eps": "epsilon",
    "kv": "key value", "layernorm": "layer norm", "len": "length", "ln": "layer norm",
    "rmsnorm": "rms norm", "rotary": "rope", "seq": "sequence", "tok": "token",
}  # fmt: skip
_IDLE = frozenset({"n", "num", "number", "use"})
# What some configs call the activation of a gated MLP.
SILU = ("silu", "swish", "swiglu")
# A config has some hundred keys; comparing more would take minutes.
_MAX_OTHERS = 5_000
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def spelling_of(key: str, config: Mapping[str, object]) -> str:
    """The name that `config` has for a key of a class; empty if there is none."""
    return next((name for name in (key, *SPELLINGS.get(key, ())) if name in config), "")


def doubtful_defaults(
    architecture: str,
    defaults: Mapping[str, object],
    config: Mapping[str, object],
    unread: tuple[str, ...],
) -> tuple[Limit, ...]:
    """What to tell of each key whose default stands beside another key like it.

    Of several others it is the one most like the key. `unread` are the keys of the source's
    `config` that nothing reads; a key in a table of it is one too, as in `rotary.base`.
    """
    found = []
    others = dict(islice(_parts(config, unread), _MAX_OTHERS))
    for key, default in defaults.items():
        if key in _OF_TRAINING:
            continue
        alike = [
            (_likeness(key, other), other)
            for other, value in others.items()
            if _same_kind(default, value) and not _equal(default, value)
        ]
        likeness, other = max(alike, key=lambda pair: pair[0], default=(0.0, ""))
        if likeness >= 0.5:
            text = (
                f"{key} is {show(default)}, the default of {architecture}, and nothing reads"
                f" {visible(other)}, which the LLM's config says is {show(others[other])}: in a"
                f" mapping, {_remedy(key, other, others[other], config)},"
                f" `set: {{{key}: {show(default)}}}` says that the default is right."
            )
            found.append(Limit(text))
    return tuple(found)


def _remedy(key: str, other: str, value: object, config: Mapping[str, object]) -> str:
    """What makes `key` right where `other`, of this value, may be the same under another name."""
    if other == key:
        return f"`keep: [{key}]` keeps it"
    if key == "rope_scaling" and not (
        isinstance(value, Mapping) and {"type", "factor"} <= {*value}
    ):
        return f"`set: {{{key}: {{type: TYPE, factor: NUMBER}}}}` says what that is in this class"
    try:
        readable = parse_expression(other, "").value(config) is value
    except MappingError:
        readable = False
    if readable:
        return f"`derive: {{{key}: {other}}}` reads it"
    return f"`set: {{{key}: {show(value)}}}` says the same"


def _parts(config: Mapping[str, object], keys: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    for key in keys:
        value = config[key]
        yield key, value
        if isinstance(value, Mapping):
            yield from ((f"{key}.{part}", inner) for part, inner in value.items())


def _likeness(key: str, other: str) -> float:
    """The share of words that two keys have in common, 2 for the same key, 1 for a known name."""
    name = other.replace(".", "_").lower()
    if name == key:
        return 2
    if name in SPELLINGS.get(key, ()):
        return 1
    ours, theirs = _words(key), _words(other)
    return len(ours & theirs) / len(ours | theirs)


def _words(name: str) -> set[str]:
    found: set[str] = set()
    for word in (match.lower() for match in _WORD.findall(name[:200])):
        word = word[:-1] if len(word) > 4 and word.endswith("s") else word
        found.update(_SAME_WORD.get(word, word).split())
    return (found - _IDLE) or found


def _same_kind(default: object, value: object) -> bool:
    """Whether both are numbers, texts, and so on; null may become anything but true or false."""
    kinds = (bool, (int, float), str, Mapping, (list, tuple))
    ours, theirs = (next((k for k in kinds if isinstance(v, k)), None) for v in (default, value))
    return ours is theirs if default is not None else bool(value) and theirs is not bool


def _equal(default: object, value: object) -> bool:
    if isinstance(default, str) and isinstance(value, str):
        return default.lower() == value.lower() or {default.lower(), value.lower()} <= {*SILU}
    return default == value
