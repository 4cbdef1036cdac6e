"""What the tensors of an unknown LLM are likely to be, by the words of their names and by shapes.

Words are what decides between tensors of one shape, such as gate and up, so all of it is a guess
for people to check. Names that cannot stand in a mapping are left to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.mapping.names import parse_name

Shape = tuple[int, ...]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ATTENTION = {"att", "attn", "attention", "sa", "mha", "selfattn"}
_MLP = {"mlp", "ffn", "ff", "feed", "forward", "feedforward", "moe", "expert", "experts"}
_NORM = {"norm", "ln", "layernorm", "rms", "rmsnorm", "layer_norm"}
_QUERY, _KEY, _VALUE = {"q", "wq", "query"}, {"k", "wk", "key"}, {"v", "wv", "value"}
_QKV = {"qkv", "wqkv", "kqv", "pack"}
_OUT = {"o", "wo", "out", "output", "dense", "proj", "c"}
_GATE, _UP, _DOWN = {"gate", "g"}, {"up", "u"}, {"down", "d", "out", "output", "proj"}
_AFTER = {"post", "ffn", "ff", "mlp", "feed", "2"}

# Places of a layer, by their names in Llama; fused ones have names of their own.
QKV, GATE_UP = "qkv", "gate_up"
Q_PROJ, K_PROJ, V_PROJ, O_PROJ = (f"self_attn.{part}_proj" for part in "qkvo")
GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
NORMS = ("input_layernorm", "post_attention_layernorm")
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors below a prefix, those of all layers at once: `found` by place, others as `unknown`.

    A place is followed by `.weight` or `.bias`.
    """

    found: Mapping[str, str]
    shapes: Mapping[str, Shape]
    unknown: Mapping[str, str]

    def shape(self, place: str) -> Shape | None:
        name = self.found.get(place)
        return None if name is None else self.shapes[name]


@dataclass(frozen=True, slots=True)
class Layout:
    """An LLM's tensors: outside of its layers, and in them; both say what nobody recognised."""

    outside: Group
    prefix: str
    layers: int
    inside: Group


def likely_layout(shapes: Mapping[str, Shape]) -> Layout:
    """What the tensors with these shapes are likely to be; in one pass over their names."""
    prefixes: dict[str, dict[int, dict[str, Shape]]] = {}
    outside: dict[str, Shape] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        place = next((n for n, part in enumerate(parts) if _is_number(part)), None)
        if place is None or place == 0 or place + 1 == len(parts):
            outside[name] = shape
            continue
        prefix, rest = ".".join(parts[:place]), ".".join(parts[place + 1 :])
        prefixes.setdefault(prefix, {}).setdefault(int(parts[place]), {})[rest] = shape
    chosen = max(prefixes, key=lambda p: sum(map(len, prefixes[p].values())), default="")
    layers = prefixes.pop(chosen, {})
    for prefix, others in prefixes.items():
        outside |= {
            f"{prefix}.{i}.{rest}": s for i, inner in others.items() for rest, s in inner.items()
        }
    around = _outside(outside)
    embedding = around.shape(f"{EMBEDDING}.weight")
    hidden = embedding[1] if embedding else None
    return Layout(around, chosen, len(layers), _inside(layers, hidden))


def words(name: str) -> set[str]:
    """The words of a name in lower case: `attn.c_attn.W_pack2` has attn, c, w, pack and 2."""
    found = [word.lower() for word in _WORD.findall(name)]
    # `wq` and `w1` are words of their own: a letter and what stands beside it.
    short = {part.lower() for part in re.split(r"[._]", name) if len(part) <= 3}
    return {*found, *short}


def _outside(shapes: Mapping[str, Shape]) -> Group:
    found: dict[str, str] = {}
    embeddings = [n for n, s in shapes.items() if len(s) == 2 and _is_embedding(n)]
    if len(embeddings) == 1 and _usable(embeddings[0]):
        found[f"{EMBEDDING}.weight"] = embeddings[0]
        vocabulary = shapes[embeddings[0]]
        for name, shape in shapes.items():
            if name == embeddings[0] or not _usable(name) or not name.endswith("weight"):
                continue
            if shape == vocabulary:
                found.setdefault(f"{HEAD}.weight", name)
            elif shape == vocabulary[1:] and words(name) & _NORM:
                found.setdefault(f"{FINAL_NORM}.weight", name)
    taken = set(found.values())
    return Group(found, shapes, {n: _text(s) for n, s in shapes.items() if n not in taken})


def _is_embedding(name: str) -> bool:
    found = words(name)
    return any(word.startswith(("emb", "tok", "wte", "vocab")) for word in found) and not (
        found & {"head", "position", "wpe", "pos"}
    )


def _inside(layers: Mapping[int, Mapping[str, Shape]], hidden: int | None) -> Group:
    shapes: dict[str, Shape] = {}
    counts: dict[str, int] = {}
    unknown: dict[str, str] = {}
    for inner in layers.values():
        for name, shape in inner.items():
            counts[name] = counts.get(name, 0) + 1
            if shapes.setdefault(name, shape) != shape:
                unknown[name] = "its shape differs between layers"
    for name, count in counts.items():
        if count != len(layers):
            unknown.setdefault(name, f"{_text(shapes[name])}, in {count} of {len(layers)} layers")
    candidates: dict[str, list[str]] = {}
    for name in shapes:
        place = None if name in unknown or not _usable(name) else _place(name, shapes[name])
        if place is None or not _fits(place, shapes[name], hidden):
            unknown.setdefault(name, _text(shapes[name]))
        else:
            candidates.setdefault(place, []).append(name)
    found: dict[str, str] = {}
    for place, names in candidates.items():
        if len(names) == 1:
            found[place] = names[0]
        elif place == f"{NORMS[0]}.weight" and len(names) == 2:
            # Nothing in their names tells them apart: the one that is defined first comes first.
            found |= {f"{norm}.weight": name for norm, name in zip(NORMS, names, strict=True)}
        else:
            unknown |= {name: f"{_text(shapes[name])}, one of several alike" for name in names}
    # One of these without the others says that the words mean something else here.
    for together in ((Q_PROJ, K_PROJ, V_PROJ), (GATE, UP)):
        if not all(f"{place}.weight" in found for place in together):
            _forget(together, found, unknown, shapes)
    for fused, part in ((QKV, Q_PROJ), (GATE_UP, GATE)):
        if f"{part}.weight" in found:
            _forget((fused,), found, unknown, shapes)
    return Group(found, shapes, unknown)


def _forget(
    places: tuple[str, ...],
    found: dict[str, str],
    unknown: dict[str, str],
    shapes: Mapping[str, Shape],
) -> None:
    """Makes what was found for `places` unknown, weights and biases."""
    for place in [place for place in found if place.rpartition(".")[0] in places]:
        name = found.pop(place)
        unknown[name] = _text(shapes[name])


def _fits(place: str, shape: Shape, hidden: int | None) -> bool:
    """Whether a weight has the hidden size on the side where its place has it."""
    if hidden is None:
        return True
    if len(shape) != 2:
        return shape == (hidden,) or place.rpartition(".")[0] not in NORMS
    side = 0 if place in (f"{O_PROJ}.weight", f"{DOWN}.weight") else 1
    return shape[side] == hidden


def _place(name: str, shape: Shape) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias") or len(shape) != (2 if kind == "weight" else 1):
        norm = _norm(stem, words(stem)) if kind == "weight" and len(shape) == 1 else None
        return norm and f"{norm}.weight"
    place = _linear(stem)
    return place and f"{place}.{kind}"


def _norm(stem: str, found: set[str]) -> str | None:
    if not found & _NORM and not any(word.startswith(("norm", "ln")) for word in found):
        return None
    last = words(stem.rpartition(".")[2])
    if last & _QUERY or last & _KEY:
        return Q_NORM if last & _QUERY else K_NORM
    return NORMS[1] if found & _AFTER else NORMS[0]


def _linear(stem: str) -> str | None:
    found, last = words(stem), words(stem.rpartition(".")[2])
    in_mlp = bool(found & _MLP) or bool(last & {"w1", "w2", "w3", *_GATE, *_UP, "down"})
    every = bool(last & _QUERY) and bool(last & _KEY) and bool(last & _VALUE)
    if last & _QKV or every or (last & _ATTENTION and found & _ATTENTION and not in_mlp):
        return QKV
    if not in_mlp:
        for place, wanted in ((Q_PROJ, _QUERY), (K_PROJ, _KEY), (V_PROJ, _VALUE), (O_PROJ, _OUT)):
            if last & wanted:
                return place
        return None
    if (last & _GATE and last & _UP) or last & {"gateup", "wi"}:
        return GATE_UP
    for place, wanted in ((GATE, _GATE | {"w1"}), (UP, _UP | {"w3"}), (DOWN, _DOWN | {"w2"})):
        if last & wanted:
            return place
    return None


def _usable(name: str) -> bool:
    try:
        return not parse_name(name).variables
    except ValueError:
        return False


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= 6


def _text(shape: Shape) -> str:
    return str(list(shape))
