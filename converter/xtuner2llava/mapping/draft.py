"""A starter mapping for an LLM that no family fits: what is recognised, and the rest as comments.

It goes by names, config keys and shapes. Names alone tell tensors of one shape apart, such as gate
and up, so all of it is for people to check, and names that cannot stand in a mapping are left to
them. `mappings check` accepts it; a plan may still ask for what is left.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.expressions import show
from xtuner2llava.mapping.names import fold, parse_name
from xtuner2llava.mapping.plain_class import PlainClass
from xtuner2llava.mapping.similar import SPELLINGS

Shape = tuple[int, ...]

_MAX_COMMENTS = 60
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(\{i\})?")
_NO_TEXTS = {"true", "false", "null", "True", "False", "Null", "TRUE", "FALSE", "NULL"}
_ABOUT_FILES = ("architectures", "auto_map", "model_type", "torch_dtype", "transformers_version")

# Places by their names in Llama; fused ones have names of their own.
_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"
_QUERIES, _GATES = "qkv", "gate_up"
_Q, _K, _V, _O = (f"self_attn.{part}_proj" for part in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_Q_NORM, _K_NORM = "self_attn.q_norm", "self_attn.k_norm"
_PARTS = {_QUERIES: (_Q, _K, _V), _GATES: (_GATE, _UP)}

# The first pattern that a name fits says its place; the name is that in a layer, in lower case,
# with dots and underscores as spaces, and without `weight`.
_MATRICES = {
    _QUERIES: r"qkv|kqv|w?pack|query key value|(?<!mlp )\b(c )?att(n|ention)$",
    _GATES: r"gate up|up gate|gateup|\bwi$",
    _GATE: r"(gate|\bg|w1)( proj)?$",
    _UP: r"(up|\bu|w3)( proj)?$",
    _DOWN: r"(down|w2)( proj)?$|(mlp|ffn?|feed ?forward)\b.*\b(c|out|output|d|proj)( proj)?$",
    _Q: r"\bw?q(uery)?( proj)?$",
    _K: r"\bw?k(ey)?( proj)?$",
    _V: r"\bw?v(alue)?( proj)?$",
    _O: r"\b(wo|o|out|output|dense|c)( proj)?$|^(?!.*(mlp|ffn|feed)).*\bproj$",
}
_VECTORS = {
    _Q_NORM: r"\bq(uery)? ?(layer)?(norm|ln)$",
    _K_NORM: r"\bk(ey)? ?(layer)?(norm|ln)$",
    _NORMS[1]: r"(post|ffn?|mlp|feed)\b.*(norm|ln|rms)|(norm|ln) ?2$",
    _NORMS[0]: r"norm|\bln|\brms",
}


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Names by their place, such as `lm_head.weight`, and `unknown` ones with a remark."""

    shapes: Mapping[str, Shape]
    found: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def shape(self, place: str) -> Shape | None:
        """The shape of the weight of a place."""
        name = self.found.get(f"{place}.weight")
        return None if name is None else self.shapes[name]

    def forget(self, places: Sequence[str]) -> None:
        """Makes what was found for `places` unknown, weights and biases."""
        for place in [place for place in self.found if place.rpartition(".")[0] in places]:
            name = self.found.pop(place)
            self.unknown[name] = str(list(self.shapes[name]))


@dataclass(frozen=True, slots=True)
class _Layout:
    """An LLM's tensors: outside of its layers, and in them."""

    outside: _Tensors
    prefix: str
    layers: int
    inside: _Tensors


def draft(config: Mapping[str, object], shapes: Mapping[str, Shape], catalogue: Catalogue) -> str:
    """The YAML of a family for the LLM with this config and these tensors.

    For an LLM that a shipped family fits, it is one that extends that family, and says so.
    """
    refused = []
    try:
        name = catalogue.detect(config, shapes.keys()).name
        return (
            f"# The shipped family {name} fits this LLM, and no mapping is needed. This one changes"
            "\n# nothing; what is written below it takes precedence. See "
            f"`mappings show {name}`.\nschema: 1\nfamily: my-{name}\nextends: {name}\n"
        )
    except UnsupportedError as error:
        refused = [f"# This LLM is known, and refused: {_quoted(error.faults[0].what)}"]
    except MappingError:
        pass
    layout = _layout(shapes)
    plain = catalogue.classes[_nearest_class(layout.inside)]
    said, dims = _sizes(config, layout)
    lines = [
        f"# A beginning, made from names and shapes; it becomes a {plain.architecture} if that is",
        "# what the LLM computes. Tensors of one shape, such as gate and up, or k and v, were told",
        "# apart by their names alone: compare with the model's code, and then logits.",
        *refused,
        "schema: 1",
        "family: my-llm",
        f"becomes: {plain.name}",
        *_match(config, layout),
        "",
        "dims:",
        *(f"  {name}: {text}" for name, text in dims.items()),
        "",
        "tensors:",
        *_rules(layout, said, dims),
        "",
        "config:",
        *_config(config, layout, plain, said),
        "",
        "# Which tokens begin and end a text; XTuner's template, and the words that end a turn.",
        '# generation: {bos: "<s>", eos: ["</s>"]}',
        "# chat: {template: NAME, stop_words: []}",
        "# What differs beyond some length, from which `inspect` makes its verdict.",
        "# caveats: [{when: CONDITION, exact_up_to: LENGTH, say: TEXT}]",
    ]
    return "\n".join(lines) + "\n"


def _layout(shapes: Mapping[str, Shape]) -> _Layout:
    """What the tensors with these shapes are likely to be; in one pass over their names."""
    prefixes: dict[str, dict[str, dict[str, Shape]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        at = next((n for n, part in enumerate(parts) if part.isdecimal() and part.isascii()), 0)
        if 0 < at < len(parts) - 1:
            prefix, rest = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            prefixes.setdefault(prefix, {}).setdefault(parts[at], {})[rest] = shape
    prefix = max(prefixes, key=lambda p: sum(map(len, prefixes[p].values())), default="")
    layers = prefixes.get(prefix, {})
    inner = {f"{prefix}.{i}.{rest}" for i, names in layers.items() for rest in names}
    outside = _outside({name: shape for name, shape in shapes.items() if name not in inner})
    embedding = outside.shape(_EMBEDDING)
    hidden = embedding[1] if embedding else None
    return _Layout(outside, prefix, len(layers), _inside([*layers.values()], hidden))


def _outside(shapes: Mapping[str, Shape]) -> _Tensors:
    tensors = _Tensors(shapes)
    embeddings = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and re.search(r"emb|tok|wte|vocab", name.lower())
        and not re.search(r"head|pos|wpe", name.lower())
    ]  # fmt: skip
    if len(embeddings) == 1 and _usable(embeddings[0]):
        tensors.found[f"{_EMBEDDING}.weight"] = embeddings[0]
        vocabulary = shapes[embeddings[0]]
        for name, shape in shapes.items():
            if name == embeddings[0] or not _usable(name) or not name.endswith("weight"):
                continue
            if shape == vocabulary:
                tensors.found.setdefault(f"{_HEAD}.weight", name)
            elif shape == vocabulary[1:] and re.search(r"norm|ln|rms", name.lower()):
                tensors.found.setdefault(f"{_FINAL_NORM}.weight", name)
    taken = set(tensors.found.values())
    tensors.unknown.update({n: str(list(s)) for n, s in shapes.items() if n not in taken})
    return tensors


def _inside(layers: Sequence[Mapping[str, Shape]], hidden: int | None) -> _Tensors:
    tensors = _Tensors({name: shape for layer in layers for name, shape in layer.items()})
    candidates: dict[str, list[str]] = {}
    for name, shape in tensors.shapes.items():
        there = [layer[name] for layer in layers if name in layer]
        text = str(list(there[0]))
        if any(shape != there[0] for shape in there):
            tensors.unknown[name] = "its shape differs between layers"
        elif len(there) != len(layers):
            tensors.unknown[name] = f"{text}, in {len(there)} of {len(layers)} layers"
        elif (place := _place(name, shape, hidden)) is None:
            tensors.unknown[name] = text
        else:
            candidates.setdefault(place, []).append(name)
    for place, names in candidates.items():
        if len(names) == 1:
            tensors.found[place] = names[0]
        elif place == f"{_NORMS[0]}.weight" and len(names) == 2:
            # Nothing in their names tells them apart: the one that is defined first comes first.
            tensors.found.update(zip((f"{norm}.weight" for norm in _NORMS), names, strict=True))
        else:
            for name in names:
                tensors.unknown[name] = f"{list(tensors.shapes[name])}, one of several alike"
    # One of these without the others says that the words mean something else here.
    for fused, parts in _PARTS.items():
        if not all(f"{part}.weight" in tensors.found for part in parts):
            tensors.forget(parts)
        else:
            tensors.forget((fused,))
    return tensors


def _place(name: str, shape: Shape, hidden: int | None) -> str | None:
    """Where a tensor of a layer belongs, if it has the hidden size on the side that is there."""
    stem, _, kind = name.rpartition(".")
    if not _usable(name) or kind not in ("weight", "bias") or len(shape) not in (1, 2):
        return None
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    words = re.sub(r"[._]+", " ", apart).lower()
    patterns = _VECTORS if (kind, len(shape)) == ("weight", 1) else _MATRICES
    place = next((place for place, pattern in patterns.items() if re.search(pattern, words)), None)
    if place is None or (kind == "bias" and len(shape) != 1):
        return None
    if hidden is not None and len(shape) == 2:
        fits = shape[0 if place in (_O, _DOWN) else 1] == hidden
    else:
        fits = hidden is None or place not in _NORMS or shape == (hidden,)
    return f"{place}.{kind}" if fits else None


def _nearest_class(inside: _Tensors) -> str:
    if f"{_Q_NORM}.weight" in inside.found:
        return "qwen3"
    biased = f"{_Q}.bias" in inside.found or f"{_QUERIES}.bias" in inside.found
    return "qwen2" if biased and f"{_O}.bias" not in inside.found else "llama"


def _sizes(config: Mapping[str, object], layout: _Layout) -> tuple[dict[str, str], dict[str, str]]:
    """The class's sizes as expressions over the config, or numbers from shapes; and `dims`."""
    said: dict[str, str] = {}

    def say(key: str, value: int | None) -> None:
        """The key, another spelling, half of one, or `value` itself, as shapes have it."""
        spellings = [n for n in (key, *SPELLINGS.get(key, ())) if _size(config, n) is not None]
        for name in spellings:
            if value is None or config[name] == value:
                said.setdefault(key, name)
        for name in spellings:
            if value and config[name] == 2 * value:
                said.setdefault(key, f"{name} // 2")
        if value is not None:
            said.setdefault(key, str(value))

    inside = layout.inside
    rows, hidden = layout.outside.shape(_EMBEDDING) or (None, None)
    say("vocab_size", rows)
    say("hidden_size", hidden)
    say("num_hidden_layers", layout.layers)
    say("num_attention_heads", None)
    both, down = inside.shape(_GATES), inside.shape(_DOWN)
    say("intermediate_size", down[1] if down else both[0] // 2 if both else None)
    heads = _size(config, said.get("num_attention_heads", ""))
    head = hidden // heads if heads and hidden else None
    if (q_norm := inside.shape(_Q_NORM)) is not None:
        head = q_norm[0]
        say("head_dim", head)
    k, qkv = inside.shape(_K), inside.shape(_QUERIES)
    width = k[0] if k else (qkv[0] - (heads or 0) * (head or 0)) // 2 if qkv else None
    say("num_key_value_heads", width // head if width and head else None)
    if said.get("num_key_value_heads") == str(heads):
        said["num_key_value_heads"] = said["num_attention_heads"]
    dims = {"layers": said.get("num_hidden_layers", "0")}
    if qkv and heads and head:
        of_heads = said["num_attention_heads"]
        dims["head"] = said.get("head_dim", f"{said.get('hidden_size')} // {of_heads}")
        dims["queries"] = f"{of_heads} * head"
        dims["keys"] = f"{said.get('num_key_value_heads', heads)} * head"
    if both:
        dims["inner"] = said["intermediate_size"]
    return said, dims


def _size(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and value is not True and value > 0 else None


def _match(config: Mapping[str, object], layout: _Layout) -> Iterator[str]:
    found, model_type = config.get("architectures"), config.get("model_type")
    names = [*layout.outside.found.values()][:1]
    names += [f"{layout.prefix}.0.{name}" for name in [*layout.inside.found.values()][:1]]
    texts = [a for a in found if a and isinstance(a, str)] if isinstance(found, list) else []
    entries = []
    if texts:
        entries.append(f"  architectures: [{', '.join(map(_scalar, texts[:4]))}]")
    if model_type and isinstance(model_type, str):
        entries.append(f"  model_type: {_scalar(model_type)}")
    if names:
        entries.append(f"  tensors: [{', '.join(map(_scalar, names))}]")
    yield from ["match:", *entries] if entries else []


def _rules(layout: _Layout, said: Mapping[str, str], dims: Mapping[str, str]) -> Iterator[str]:
    outside, inside = layout.outside, layout.inside
    dropped = [n for n in (*outside.unknown, *inside.unknown) if n.endswith("inv_freq")]
    yield from _moved("  ", outside, [*outside.found])
    yield from _left("  ", outside.unknown, dropped)
    yield from _lacking("  ", outside, (_EMBEDDING, _FINAL_NORM))
    loop = ("for: {i: layers}", f"from: {_scalar(layout.prefix + '.{i}')}", "to: model.layers.{i}")
    if inside.found:
        yield from (f"  - {loop[0]}", *(f"    {line}" for line in loop[1:]), "    rules:")
        fused = [place for place in inside.found if place.rpartition(".")[0] in _PARTS]
        yield from _moved("      ", inside, [p for p in inside.found if p not in fused])
        for place in fused:
            yield from _split(place, inside, said, dims)
        yield from _lacking("      ", inside, (_Q, _K, _V, _O, _GATE, _UP, _DOWN, *_NORMS))
    elif layout.layers:
        yield f"  # - {{{loop[0]}, {loop[1]},"
        yield f"  #    {loop[2]}, rules: [...]}}"
    yield from _left("      ", inside.unknown, dropped)
    if dropped:
        yield '  - {drop: "**.inv_freq", because: a buffer that is rebuilt}'
    if not outside.found and not inside.found and not dropped:
        yield "  []"


def _split(
    place: str, inside: _Tensors, said: Mapping[str, str], dims: Mapping[str, str]
) -> Iterator[str]:
    name = inside.found[place]
    stem, _, kind = place.rpartition(".")
    sizes = "[inner, inner]"
    if stem == _QUERIES:
        sizes = "[queries, keys, keys]" if "queries" in dims else "[0, 0, 0]    # say the sizes"
        if kind == "weight":
            groups = said.get("num_key_value_heads", "GROUPS")
            heads = said.get("num_attention_heads", "HEADS")
            of_one = "head" if heads == groups else f"{heads} // {groups} * head"
            yield "      # All of q, then k, then v? If they are grouped by key-value head, it is"
            yield f"      # `deinterleave` with groups: {groups}"
            yield f"      # and slots: [{of_one}, head, head]"
    yield f"      - split: {_scalar(name)}    # {list(inside.shapes[name])}"
    yield f"        into: [{', '.join(f'{part}.{kind}' for part in _PARTS[stem])}]"
    yield f"        sizes: {sizes}"


def _moved(indent: str, tensors: _Tensors, places: Sequence[str]) -> Iterator[str]:
    """`keep` for names that are right already, and `rename` for the others."""
    named = [(place, tensors.found[place]) for place in places]
    kept = [name for place, name in named if name == place]
    if kept:
        yield f"{indent}- keep:"
        yield from (f"{indent}    - {name}    # {list(tensors.shapes[name])}" for name in kept)
    if len(kept) < len(places):
        yield f"{indent}- rename:"
        for place, name in named:
            if name != place:
                yield f"{indent}    {_scalar(name)}: {place}    # {list(tensors.shapes[name])}"


def _lacking(indent: str, tensors: _Tensors, places: Sequence[str]) -> Iterator[str]:
    made = {place.rpartition(".")[0] for place in tensors.found if place.endswith(".weight")}
    for fused, parts in _PARTS.items():
        made |= {*parts} if fused in made else set()
    lacking = [f"{place}.weight" for place in places if place not in made]
    if lacking:
        yield f"{indent}# Nothing makes: {', '.join(lacking)}"


def _left(indent: str, unknown: Mapping[str, str], dropped: Sequence[str]) -> Iterator[str]:
    """Each kind of tensor that was not recognised, on a line of its own."""
    left = {name: text for name, text in unknown.items() if name not in dropped}
    kinds = fold(left)
    if kinds:
        yield f"{indent}# Not recognised; `rename` them, or `drop` them with a reason:"
    for one in kinds[:_MAX_COMMENTS]:
        what = left.get(one.text, f"{one.count:,} tensors")
        yield f"{indent}# - rename: {{{_scalar(one.text)}: }}    # {what}"
    if len(kinds) > _MAX_COMMENTS:
        yield f"{indent}# and {len(kinds) - _MAX_COMMENTS:,} more kinds"


def _config(
    config: Mapping[str, object], layout: _Layout, plain: PlainClass, said: Mapping[str, str]
) -> Iterator[str]:
    """The lines of a `config` table for the class `plain`, and comments on all other keys."""
    keep: list[str] = []
    derive: dict[str, str] = {}
    constant: dict[str, str] = {}
    missing: dict[str, str] = {}
    used: set[str] = set()
    for key in plain.keys:
        names = (key, *SPELLINGS.get(key, ()))
        spelling = said.get(key) or next((name for name in names if name in config), "")
        used |= set(re.findall(r"\w+", spelling))
        first = spelling.partition(" ")[0]
        if spelling == key:
            keep.append(key)
        elif key == "hidden_act" and config.get(spelling) in ("swiglu", "swish", "silu"):
            constant[key] = f"silu    # {spelling} is {show(config[spelling])}"
        elif spelling.isdecimal():
            constant[key] = f"{spelling}    # from the tensors' shapes"
        elif first.isidentifier() and not keyword.iskeyword(first):
            # Other versions of transformers want a float.
            derive[key] = f"{spelling} * 1.0" if key == "rope_theta" else spelling
        elif key in plain.config.required:
            constant[key] = "0    # required, and not in the config: say it"
        elif key == "sliding_window":
            constant[key] = "null    # the class would have one"
        elif key != "rope_scaling":
            missing[key] = show(plain.config.default[key])
    biased = plain.name == "llama" and f"{_O}.bias" in layout.inside.found
    if biased and "attention_bias" not in keep:
        constant["attention_bias"] = "true    # of q, k, v and o"
    has_head = f"{_HEAD}.weight" in layout.outside.found
    if not has_head and "tie_word_embeddings" not in (*keep, *derive):
        constant["tie_word_embeddings"] = "true    # there is no head"
    if keep:
        yield f"  keep: [{', '.join(keep)}]"
    for title, entries in (("derive", derive), ("set", constant)):
        if entries:
            yield f"  {title}:"
            yield from (f"    {key}: {text}" for key, text in entries.items())
    stand = [f"{key} {text}" for key, text in missing.items() if key not in constant]
    if stand:
        yield f"  # Not in the config, so as {plain.architecture} has it: {', '.join(stand)}."
    others = [
        f"{_quoted(key)}: {show(value)}"
        for key, value in config.items()
        if key not in (*used, *keep, *_ABOUT_FILES) and value is not None
    ]
    if others:
        yield "  # Nothing looks at these; `require` what must have one value:"
        for text in others[:_MAX_COMMENTS]:
            yield f"  #   {text if text.isprintable() else _quoted(text)}"


def _usable(name: str) -> bool:
    try:
        return not parse_name(name).variables
    except ValueError:
        return False


def _quoted(text: str) -> str:
    """A text on one line between quotes; what cannot be printed becomes a question mark."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:300])
    return json.dumps(printable, ensure_ascii=False)


def _scalar(text: str) -> str:
    """A text as YAML: quoted where it would be something else."""
    return text if _PLAIN.fullmatch(text) and text not in _NO_TEXTS else _quoted(text)
