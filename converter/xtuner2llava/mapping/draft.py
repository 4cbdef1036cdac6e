"""A starter mapping for an LLM that no family fits: what names and shapes tell; the rest, comments.

A tensor is kept under a name of the class. It is renamed if one name of the class is left for it:
of its shape and with the same module, such as `q_proj`, or the only one of its shape. Where there
are several, such as gate and up, a comment lists them. `mappings check` accepts the draft.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.detect import texts
from xtuner2llava.mapping.expressions import Environment, show
from xtuner2llava.mapping.family import HOUSEKEEPING
from xtuner2llava.mapping.names import fold, parse_name
from xtuner2llava.mapping.plain_class import PlainClass
from xtuner2llava.mapping.similar import SILU, spelling_of

Shape: TypeAlias = tuple[int, ...]
_Shapes: TypeAlias = Mapping[str, Shape]
_Parts: TypeAlias = tuple[_Shapes, _Shapes]
_Targets: TypeAlias = dict[str, tuple[str, str]]

_MAX_COMMENTS = 60
_PLAIN = re.compile(r"(?!(?i:true|false|null)$)[A-Za-z_][A-Za-z0-9_./-]*(\{[ie]\})?")
_IN_LAYER = re.compile(r"(.+?)\.([0-9]+)\.(.+)", re.DOTALL)
# What one tensor may hold in place of several, and what a class that has it so calls it.
_FUSED = {
    f"self_attn.qkv_proj.{end}": [f"self_attn.{part}_proj.{end}" for part in "qkv"]
    for end in ("weight", "bias")
} | {"mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Shapes by name: outside of the layers, and by what follows `prefix.{i}.` in them.

    `uneven` are names that not all layers have, or not in one shape.
    """

    parts: _Parts
    prefix: str
    layers: int
    uneven: Collection[str]


def draft(config: Environment, shapes: _Shapes, catalogue: Catalogue) -> str:
    """The YAML of a family for the LLM with this config and these tensors.

    For an LLM that a shipped family fits, it is one that extends that family, and says so.
    """
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
        refused = []
    layout = _layout(shapes)
    plain, expected = _nearest_class(config, layout, catalogue)
    formats = [name for name, one in catalogue.formats.items() if plain.name in one.classes]
    lines = [
        f"# A beginning, made from names and shapes; it becomes a {plain.architecture} if that is",
        "# what the LLM computes. Compare it with the model's code, and then logits.",
        *refused,
        "schema: 1",
        "family: my-llm",
        f"becomes: {plain.name}    # for --format {' and --format '.join(formats)}",
        *_match(config, layout),
        "",
        "tensors:",
        *_tensors(config, layout, expected),
        "",
        "config:",
        *_config(config, plain),
        "",
        "# Which tokens begin and end a text; XTuner's template, and the words that end a turn.",
        '# generation: {bos: "<s>", eos: ["</s>"]}',
        "# chat: {template: NAME, stop_words: []}",
        "# What differs beyond some length, from which `inspect` makes its verdict.",
        "# caveats: [{when: CONDITION, exact_up_to: LENGTH, say: TEXT}]",
    ]
    return "\n".join(lines) + "\n"


def _layout(shapes: _Shapes) -> _Layout:
    """The layers are those of the prefix that the most names continue with a number."""
    found = {name: match.groups() for name in shapes if (match := _IN_LAYER.fullmatch(name))}
    prefixes = Counter(prefix for prefix, *_ in found.values() if _usable(prefix))
    prefix = max(prefixes, key=prefixes.__getitem__, default="")
    within = {name: (number, rest) for name, (p, number, rest) in found.items() if p == prefix}
    outside = {name: shape for name, shape in shapes.items() if name not in within}
    inside: dict[str, list[Shape]] = {}
    for name, (_, rest) in within.items():
        inside.setdefault(rest, []).append(shapes[name])
    layers = len({number for number, _ in within.values()})
    uneven = {n for n, there in inside.items() if len(there) < layers or len({*there}) > 1}
    return _Layout((outside, {n: there[0] for n, there in inside.items()}), prefix, layers, uneven)


def _nearest_class(
    config: Environment, layout: _Layout, catalogue: Catalogue
) -> tuple[PlainClass, _Parts]:
    """The class with a place for the most tensors, or the most names; what it has for `config`."""

    def likeness(found: tuple[PlainClass, _Parts]) -> tuple[int, int]:
        places = named = 0
        for own, theirs in zip(layout.parts, found[1], strict=True):
            named += len(own.keys() & theirs)
            ours = Counter((own[name], _kind(name)) for name in own.keys() - theirs)
            others = Counter((theirs[name], _kind(name)) for name in theirs.keys() - own)
            fused = (count for (shape, _), count in ours.items() if _fused(shape, theirs))
            places += (ours & others).total() + sum(fused)
        return places + named, named

    names = dict.fromkeys(name for one in catalogue.formats.values() for name in one.classes)
    classes = [catalogue.classes[name] for name in names]
    return max(((plain, _expected(plain, config)) for plain in classes), key=likeness)


def _expected(plain: PlainClass, config: Environment) -> _Parts:
    """The tensors of a class with one layer; a size that the config does not have is 1."""
    values: dict[str, object] = dict.fromkeys(plain.config.required, 1)
    values |= {key: config[name] for key, name in _spellings(plain, config).items() if name}
    try:
        tensors = plain.tensors(plain.complete(values | {"num_hidden_layers": 1})[0])
    except MappingError:
        tensors = {}
    return _layout({name: tensor.shape for name, tensor in tensors.items()}).parts


def _sure(shapes: _Shapes, uneven: Collection[str], expected: _Shapes) -> _Targets:
    """The name in the class of each tensor for which one is left, and why it is that one."""
    found = {name: (name, "") for name in shapes if name in expected and name not in uneven}
    for mark, why in ((_module, "same module name"), (_kind, "only one of this shape")):
        left = _without(found, shapes)
        missing = _without({target for target, _ in found.values()}, expected)
        if mark is _kind:
            missing = _without(_in_fused(left, missing), missing)
        alone: list[dict[tuple[Shape, str], str]] = []
        for names in (left, missing):
            keys = {name: (shape, mark(name)) for name, shape in names.items()}
            count = Counter(keys.values())
            alone.append({key: name for name, key in keys.items() if count[key] == 1})
        for key, name in alone[0].items():
            if key in alone[1] and name not in uneven and _usable(name):
                found[name] = alone[1][key], why
    return found


def _without(names: Collection[str], shapes: _Shapes) -> _Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


def _in_fused(shapes: _Shapes, missing: _Shapes) -> set[str]:
    """Those of `missing` that one of `shapes` may hold together."""
    return {part for shape in shapes.values() for part in _fused(shape, missing)}


def _module(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _kind(name: str) -> str:
    """A weight or a bias; no shape tells the order of the rows in a fused tensor."""
    return name if name in _FUSED else "bias" if name.endswith("bias") else "weight"


def _fused(shape: Shape, missing: _Shapes) -> list[str]:
    """The names of the class that a tensor of this shape may be split into."""
    for parts in _FUSED.values():
        found = [missing[part] for part in parts if part in missing]
        if len(found) == len(parts) and shape == (sum(s[0] for s in found), *found[0][1:]):
            return parts
    return []


def _match(config: Environment, layout: _Layout) -> list[str]:
    given = {key: texts(config.get(key))[:4] for key in ("architectures", "model_type")}
    outside, inside = ([name for name in part if _usable(name)][:1] for part in layout.parts)
    given["tensors"] = (*outside, *(f"{layout.prefix}.0.{name}" for name in inside))
    lines = [f"  {key}: [{', '.join(map(_scalar, some))}]" for key, some in given.items() if some]
    return ["match:", *lines] if lines else []


def _tensors(config: Environment, layout: _Layout, expected: _Parts) -> Iterator[str]:
    """The rules outside of the layers, and a block for these; comments where there are none."""
    yield from (f"  {line}" for line in _rules(layout.parts[0], (), expected[0]))
    times = spelling_of("num_hidden_layers", config) or layout.layers
    if layout.layers and (rules := [*_rules_of_a_layer(config, layout, expected[1])]):
        block = _block("i", times, layout.prefix, "model.layers", rules)
        yield from (f"  {line}" for line in block)
    yield '  - {drop: "**.inv_freq", because: a buffer that is rebuilt}'


def _rules_of_a_layer(config: Environment, layout: _Layout, expected: _Shapes) -> Iterator[str]:
    """Its rules, and a block for its experts where the class has as many."""
    inside, uneven = layout.parts[1], layout.uneven
    ours, theirs = _layout(inside), _layout(expected)
    if not ours.layers or ours.layers != theirs.layers:
        yield from _rules(inside, uneven, expected)
        return
    yield from _rules(ours.parts[0], uneven, theirs.parts[0])
    numbered = (_IN_LAYER.fullmatch(name) for name in uneven if name not in ours.parts[0])
    of_experts = {*ours.uneven, *(found[3] for found in numbered if found)}
    times = spelling_of("num_local_experts", config) or ours.layers
    rules = [*_rules(ours.parts[1], of_experts, theirs.parts[1])]
    yield from _block("e", times, ours.prefix, theirs.prefix, rules)


def _block(
    variable: str, times: str | int, source: str, target: str, rules: list[str]
) -> Iterator[str]:
    """A block that repeats `rules`; a comment where all of them are."""
    begin = "# " if all(line.lstrip().startswith("#") for line in rules) else ""
    yield f"{begin}- for: {{{variable}: {times}}}"
    yield f"{begin}  from: {_scalar(f'{source}.{{{variable}}}')}"
    yield f"{begin}  to: {target}.{{{variable}}}"
    yield f"{begin}  rules:"
    yield from (f"    {line}" for line in rules)


def _rules(shapes: _Shapes, uneven: Collection[str], expected: _Shapes) -> Iterator[str]:
    """`keep` and `rename` for what is sure, and comments for other names and for missing ones."""
    sure = _sure(shapes, uneven, expected)
    kept = [f"    - {n}    # {[*shapes[n]]}" for n, (_, why) in sure.items() if not why]
    yield from ["- keep:", *kept] if kept else []
    renamed = [
        f"    {_scalar(name)}: {target}    # {[*shapes[name]]}, {why}"
        for name, (target, why) in sure.items()
        if why
    ]
    yield from ["- rename:", *renamed] if renamed else []
    missing = _without({target for target, _ in sure.values()}, expected)
    left = {n: s for n, s in _without(sure, shapes).items() if not n.endswith("inv_freq")}
    if unknown := fold(left):
        yield "# Not recognised; `rename` them, or `drop` them with a reason:"
    for one in unknown[:_MAX_COMMENTS]:
        if one.text in left and one.text not in uneven:
            yield from _choices(one.text, left, missing)
        else:
            what = "differs between layers" if one.text in left else f"{one.count:,} tensors"
            yield f"# - rename: {{{_scalar(one.text)}: }}    # {what}"
    if len(unknown) > _MAX_COMMENTS:
        yield f"# and {len(unknown) - _MAX_COMMENTS:,} more kinds"
    if missing:
        yield f"# Nothing makes: {', '.join(one.text for one in fold(missing))}"


def _choices(name: str, shapes: _Shapes, missing: _Shapes) -> Iterator[str]:
    """What one of `shapes` may become, as a comment."""
    shape = shapes[name]
    if parts := _fused(shape, missing):
        sizes = [missing[part][0] for part in parts]
        slots = ", ".join(f"{size} // N" for size in sizes)
        yield f"# - split: {_scalar(name)}    # {[*shape]}"
        yield f"#   into: [{', '.join(parts)}]"
        yield f"#   sizes: {sizes}    # or `deinterleave` with groups: N, slots: [{slots}]"
        return
    free = _without(_in_fused(shapes, missing), missing)
    fitting = [other for other, its in free.items() if its == shape]
    fitting = [other for other in fitting if _kind(other) == _kind(name)] or fitting
    names = ", ".join(one.text for one in fold(fitting)) or "nothing left there has this shape"
    yield f"# - rename: {{{_scalar(name)}: }}    # {[*shape]}: {names}"


def _spellings(plain: PlainClass, config: Environment) -> dict[str, str]:
    """The name in `config` of each key of a class; empty if it has none, or left out if it may."""
    found = {key: spelling_of(key, config) for key in (*plain.keys, *plain.config.optional)}
    return {key: name for key, name in found.items() if name or key not in plain.config.optional}


def _config(config: Environment, plain: PlainClass) -> Iterator[str]:
    """The lines of a `config` table for the class `plain`, and comments on all other keys."""
    spellings = _spellings(plain, config)
    derive, constant, missing = [], [], []
    for key, spelling in ((key, found) for key, found in spellings.items() if found != key):
        if key == "hidden_act" and config.get(spelling) in SILU:
            constant.append(f"{key}: silu    # {spelling} is {show(config[spelling])}")
        elif spelling:
            # Other versions of transformers want a float.
            derive.append(f"{key}: {spelling}{' * 1.0' if key == 'rope_theta' else ''}")
        elif key in plain.config.required:
            constant.append(f"{key}: 0    # required, and not in the config: say it")
        elif key == "sliding_window":
            constant.append(f"{key}: null    # the class would have one")
        elif key != "rope_scaling":
            missing.append(f"{key} {show(plain.config.default[key])}")
    if keep := [key for key, spelling in spellings.items() if spelling == key]:
        yield f"  keep: [{', '.join(keep)}]"
    for title, entries in (("derive", derive), ("set", constant)):
        yield from [f"  {title}:", *(f"    {entry}" for entry in entries)] if entries else []
    if missing:
        yield f"  # Not in the config, so as {plain.architecture} has it: {', '.join(missing)}."
    used = {*HOUSEKEEPING, *spellings.values()}
    others = {key: value for key, value in config.items() if key not in used and value is not None}
    if others:
        yield "  # No rule reads these; `require` what must have one value:"
    for key, value in [*others.items()][:_MAX_COMMENTS]:
        text = f"{_quoted(key)}: {show(value)}"
        yield f"  #   {text if text.isprintable() else _quoted(text)}"


def _usable(name: str) -> bool:
    try:
        return not parse_name(name).variables and name != ""
    except ValueError:
        return False


def _quoted(text: str) -> str:
    """A text on one line between quotes; what cannot be printed becomes a question mark."""
    printable = (letter if letter.isprintable() else "?" for letter in text[:300])
    return json.dumps("".join(printable), ensure_ascii=False)


def _scalar(text: str) -> str:
    """A text as YAML: quoted where it would be something else."""
    return text if _PLAIN.fullmatch(text) else _quoted(text)
