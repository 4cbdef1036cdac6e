"""A starter mapping for an LLM that no family fits: what is recognised, and the rest as comments.

`mappings check` accepts it; a plan may still ask for what nobody could guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.mapping import likely_roles as likely
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.fold import fold
from xtuner2llava.mapping.likely_config import Sizes, config_lines, quoted
from xtuner2llava.mapping.likely_roles import Group, Layout, Shape, likely_layout

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(\{i\})?")
_NO_TEXTS = {"true", "false", "null", "True", "False", "Null", "TRUE", "FALSE", "NULL"}
_MAX_COMMENTS = 60
_OUTSIDE = [f"{place}.weight" for place in (likely.EMBEDDING, likely.FINAL_NORM)]
_ATTENTION = (likely.Q_PROJ, likely.K_PROJ, likely.V_PROJ, likely.O_PROJ)
_MLP = (likely.GATE, likely.UP, likely.DOWN)
_INSIDE = [f"{place}.weight" for place in (*_ATTENTION, *_MLP, *likely.NORMS)]


def draft(config: Mapping[str, object], shapes: Mapping[str, Shape], catalogue: Catalogue) -> str:
    """The YAML of a family for the LLM with this config and these tensors.

    For an LLM that a shipped family fits, it is one that extends that family, and says so.
    """
    refused = ""
    try:
        return _extending(catalogue.detect(config, shapes.keys()).name)
    except UnsupportedError as error:
        refused = error.faults[0].what
    except MappingError:
        pass
    layout = likely_layout(shapes)
    plain = catalogue.classes[_nearest_class(layout)]
    sizes = Sizes.of(config, layout)
    lines = [
        f"# A beginning, made from names and shapes; it becomes a {plain.architecture} if that is",
        "# what the LLM computes. Tensors of one shape, such as gate and up, or k and v, were told",
        "# apart by their names alone: compare with the model's code, and then logits.",
        *([f"# This LLM is known, and refused: {quoted(refused)}"] if refused else []),
        "schema: 1",
        "family: my-llm",
        f"becomes: {plain.name}",
        *_match(config, layout),
        "",
        "dims:",
        *(f"  {name}: {text}" for name, text in sizes.dims.items()),
        "",
        "tensors:",
        *_tensors(layout, sizes),
        "",
        "config:",
        *config_lines(config, layout, plain, sizes),
        "",
        "# Which tokens begin and end a text; XTuner's template, and the words that end a turn.",
        '# generation: {bos: "<s>", eos: ["</s>"]}',
        "# chat: {template: NAME, stop_words: []}",
        "# What differs beyond some length, from which `inspect` makes its verdict.",
        "# caveats: [{when: CONDITION, exact_up_to: LENGTH, say: TEXT}]",
    ]
    return "\n".join(lines) + "\n"


def _extending(name: str) -> str:
    return (
        f"# The shipped family {name} fits this LLM, and no mapping is needed. This one changes\n"
        f"# nothing; what is written below it takes precedence. See `mappings show {name}`.\n"
        f"schema: 1\nfamily: my-{name}\nextends: {name}\n"
    )


def _nearest_class(layout: Layout) -> str:
    found = layout.inside.found
    if f"{likely.Q_NORM}.weight" in found:
        return "qwen3"
    biased = f"{likely.Q_PROJ}.bias" in found or f"{likely.QKV}.bias" in found
    return "qwen2" if biased and f"{likely.O_PROJ}.bias" not in found else "llama"


def _match(config: Mapping[str, object], layout: Layout) -> Iterator[str]:
    entries = []
    found = config.get("architectures")
    architectures = (
        [a for a in found if a and isinstance(a, str)] if isinstance(found, list) else []
    )
    if architectures:
        entries.append(f"  architectures: [{', '.join(map(_scalar, architectures[:4]))}]")
    model_type = config.get("model_type")
    if model_type and isinstance(model_type, str):
        entries.append(f"  model_type: {_scalar(model_type)}")
    names = [*layout.outside.found.values()][:1]
    names += [f"{layout.prefix}.0.{name}" for name in [*layout.inside.found.values()][:1]]
    if names:
        entries.append(f"  tensors: [{', '.join(map(_scalar, names))}]")
    return iter(["match:", *entries] if entries else [])


def _tensors(layout: Layout, sizes: Sizes) -> Iterator[str]:
    outside = layout.outside
    dropped = [n for n in (*outside.unknown, *layout.inside.unknown) if n.endswith("inv_freq")]
    yield from _moved("  ", outside, [*outside.found])
    yield from _comments("  ", outside.unknown, dropped)
    lacking = [place for place in _OUTSIDE if place not in outside.found]
    if lacking:
        yield f"  # Nothing makes: {', '.join(lacking)}"
    if layout.inside.found:
        yield "  - for: {i: layers}"
        yield f"    from: {_scalar(layout.prefix + '.{i}')}"
        yield "    to: model.layers.{i}"
        yield "    rules:"
        yield from _layer(layout, sizes)
        made = {*layout.inside.found}
        fused = [
            (likely.QKV, likely.Q_PROJ, likely.K_PROJ, likely.V_PROJ),
            (likely.GATE_UP, likely.GATE, likely.UP),
        ]
        for both, *parts in fused:
            made |= {f"{part}.weight" for part in parts} if f"{both}.weight" in made else set()
        lacking = [place for place in _INSIDE if place not in made]
        if lacking:
            yield f"      # Nothing makes: {', '.join(lacking)}"
    elif layout.layers:
        yield f"  # - {{for: {{i: layers}}, from: {_scalar(layout.prefix + '.{i}')},"
        yield "  #    to: model.layers.{i}, rules: [...]}"
    yield from _comments("      ", layout.inside.unknown, dropped)
    if dropped:
        yield '  - {drop: "**.inv_freq", because: a buffer that is rebuilt}'
    if not outside.found and not layout.inside.found and not dropped:
        yield "  []"


def _layer(layout: Layout, sizes: Sizes) -> Iterator[str]:
    inside = layout.inside
    fused = {
        likely.QKV: ([likely.Q_PROJ, likely.K_PROJ, likely.V_PROJ], "[queries, keys, keys]"),
        likely.GATE_UP: ([likely.GATE, likely.UP], "[inner, inner]"),
    }
    unfused = [place for place in inside.found if place.rpartition(".")[0] not in fused]
    yield from _moved("      ", inside, unfused)
    for place, name in inside.found.items():
        stem, _, kind = place.rpartition(".")
        if stem not in fused:
            continue
        parts, numbers = fused[stem]
        into = ", ".join(f"{part}.{kind}" for part in parts)
        if stem == likely.QKV and kind == "weight":
            said = sizes.expressions
            groups = said.get("num_key_value_heads", "GROUPS")
            heads = said.get("num_attention_heads", "HEADS")
            of_one = "head" if heads == groups else f"{heads} // {groups} * head"
            yield "      # All of q, then k, then v? If they are grouped by key-value head, it is"
            yield f"      # `deinterleave` with groups: {groups}"
            yield f"      # and slots: [{of_one}, head, head]"
        if stem == likely.QKV and "queries" not in sizes.dims:
            numbers = "[0, 0, 0]    # say the sizes"
        yield f"      - split: {_scalar(name)}    # {list(inside.shapes[name])}"
        yield f"        into: [{into}]"
        yield f"        sizes: {numbers}"


def _moved(indent: str, group: Group, places: Sequence[str]) -> Iterator[str]:
    """`keep` for names that are right already, and `rename` for the others."""
    kept = [place for place in places if group.found[place] == place]
    if kept:
        yield f"{indent}- keep:"
        yield from (f"{indent}    - {name}    # {list(group.shapes[name])}" for name in kept)
    if len(kept) < len(places):
        yield f"{indent}- rename:"
        for place in places:
            name = group.found[place]
            if name != place:
                yield f"{indent}    {_scalar(name)}: {place}    # {list(group.shapes[name])}"


def _comments(indent: str, unknown: Mapping[str, str], dropped: Sequence[str]) -> Iterator[str]:
    """Each kind of tensor that nobody recognised, on a line of its own."""
    left = {name: text for name, text in unknown.items() if name not in dropped}
    if not left:
        return
    yield f"{indent}# Not recognised; `rename` them, or `drop` them with a reason:"
    kinds = fold(left)
    for one in kinds[:_MAX_COMMENTS]:
        what = left.get(one.text, f"{one.count:,} tensors")
        yield f"{indent}# - rename: {{{_scalar(one.text)}: }}    # {what}"
    if len(kinds) > _MAX_COMMENTS:
        yield f"{indent}# and {len(kinds) - _MAX_COMMENTS:,} more kinds"


def _scalar(text: str) -> str:
    """A text as YAML: quoted where it would be something else."""
    return text if _PLAIN.fullmatch(text) and text not in _NO_TEXTS else quoted(text)
