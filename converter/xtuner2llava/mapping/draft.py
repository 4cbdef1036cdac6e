"""A starter mapping for an LLM that no family fits: what names and shapes tell; the rest, comments.

A tensor is kept under a name of the class, and renamed where its shape leaves one name. Where there
are several, such as gate and up, a comment lists them. `mappings check` accepts the draft; a plan
asks for what is left.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.expressions import show
from xtuner2llava.mapping.names import fold, parse_name
from xtuner2llava.mapping.plain_class import PlainClass
from xtuner2llava.mapping.similar import SILU, SPELLINGS

Shape = tuple[int, ...]

_MAX_COMMENTS = 60
_MAX_NAMES = 8
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(\{i\})?")
_NO_TEXTS = {"true", "false", "null", "True", "False", "Null", "TRUE", "FALSE", "NULL"}
_ABOUT_FILES = ("architectures", "auto_map", "model_type", "torch_dtype", "transformers_version")
_FUSED = (
    tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Shapes by name outside of the layers, and by what follows `prefix.{i}.` in them.

    `uneven` are names that not all layers have, or not in one shape.
    """

    outside: Mapping[str, Shape]
    prefix: str
    layers: int
    inside: Mapping[str, Shape]
    uneven: Collection[str] = ()


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
    plain, expected = _nearest_class(config, layout, catalogue)
    lines = [
        f"# A beginning, made from names and shapes; it becomes a {plain.architecture} if that is",
        "# what the LLM computes. Compare it with the model's code, and then logits.",
        *refused,
        "schema: 1",
        "family: my-llm",
        f"becomes: {plain.name}",
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


def _layout(shapes: Mapping[str, Shape]) -> _Layout:
    """The layers are those of the prefix that the most names continue with a number."""
    prefixes: dict[str, dict[str, dict[str, Shape]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        at = next((n for n, part in enumerate(parts) if part.isdecimal() and part.isascii()), 0)
        prefix, rest = ".".join(parts[:at]), ".".join(parts[at + 1 :])
        if rest and _usable(prefix):
            prefixes.setdefault(prefix, {}).setdefault(parts[at], {})[rest] = shape
    prefix = max(prefixes, key=lambda p: sum(map(len, prefixes[p].values())), default="")
    layers = prefixes.get(prefix, {})
    found: dict[str, list[Shape]] = {}
    for layer in layers.values():
        for rest, shape in layer.items():
            found.setdefault(rest, []).append(shape)
    uneven = [n for n, there in found.items() if len(there) < len(layers) or len({*there}) > 1]
    inner = {f"{prefix}.{i}.{rest}" for i, layer in layers.items() for rest in layer}
    outside = {name: shape for name, shape in shapes.items() if name not in inner}
    inside = {rest: there[0] for rest, there in found.items()}
    return _Layout(outside, prefix, len(layers), inside, uneven)


def _nearest_class(
    config: Mapping[str, object], layout: _Layout, catalogue: Catalogue
) -> tuple[PlainClass, _Layout]:
    """The class that has the most of the LLM's names, and its tensors with this config."""

    def shared(found: tuple[PlainClass, _Layout]) -> int:
        _, its = found
        return len(layout.outside.keys() & its.outside) + len(layout.inside.keys() & its.inside)

    names = dict.fromkeys(name for one in catalogue.formats.values() for name in one.classes)
    plain = [catalogue.classes[name] for name in names]
    return max(((one, _expected(one, config)) for one in plain), key=shared)


def _expected(plain: PlainClass, config: Mapping[str, object]) -> _Layout:
    """The tensors of a class with one layer; a size that the config does not have is 1."""
    values: dict[str, object] = dict.fromkeys(plain.config.required, 1)
    values |= {key: config[name] for key in plain.keys if (name := _spelling(key, config))}
    values["num_hidden_layers"] = 1
    try:
        complete, faults = plain.complete(values)
        tensors = {} if faults else plain.tensors(complete)
    except MappingError:
        tensors = {}
    return _layout({name: tensor.shape for name, tensor in tensors.items()})


def _spelling(key: str, config: Mapping[str, object]) -> str:
    """The name that `config` has for a key of a class; empty if there is none."""
    return next((name for name in (key, *SPELLINGS.get(key, ())) if name in config), "")


def _match(config: Mapping[str, object], layout: _Layout) -> Iterator[str]:
    found, model_type = config.get("architectures"), config.get("model_type")
    texts = [a for a in found if a and isinstance(a, str)] if isinstance(found, list) else []
    names = [name for name in layout.outside if _usable(name)][:1]
    names += [f"{layout.prefix}.0.{rest}" for rest in layout.inside if _usable(rest)][:1]
    entries = {
        "architectures": f"[{', '.join(map(_scalar, texts[:4]))}]" if texts else "",
        "model_type": _scalar(model_type) if isinstance(model_type, str) and model_type else "",
        "tensors": f"[{', '.join(map(_scalar, names))}]" if names else "",
    }
    lines = [f"  {key}: {text}" for key, text in entries.items() if text]
    yield from ["match:", *lines] if lines else []


def _tensors(config: Mapping[str, object], layout: _Layout, expected: _Layout) -> Iterator[str]:
    """The rules outside of the layers, and a block for these; comments where there are none."""
    outside = [*_rules("  ", layout.outside, (), expected.outside)]
    inside = [*_rules("      ", layout.inside, layout.uneven, expected.inside)]
    block = [
        f"- for: {{i: {_spelling('num_hidden_layers', config) or layout.layers}}}",
        f"  from: {_scalar(layout.prefix + '.{i}')}",
        "  to: model.layers.{i}",
        "  rules:",
    ]
    is_active = _has_rule(inside)
    yield from outside
    if inside and layout.layers:
        yield from (f"  {'' if is_active else '# '}{line}" for line in block)
        yield from inside
    dropped = any(name.endswith("inv_freq") for name in (*layout.outside, *layout.inside))
    if dropped:
        yield '  - {drop: "**.inv_freq", because: a buffer that is rebuilt}'
    if not (is_active or dropped or _has_rule(outside)):
        yield "  []"


def _has_rule(lines: list[str]) -> bool:
    return any(not line.lstrip().startswith("#") for line in lines)


def _rules(
    indent: str,
    shapes: Mapping[str, Shape],
    uneven: Collection[str],
    expected: Mapping[str, Shape],
) -> Iterator[str]:
    """`keep` and `rename` for what is sure, and comments for other names and for missing ones."""
    kept = [name for name in shapes if name in expected and name not in uneven]
    missing = {name: shape for name, shape in expected.items() if name not in kept}
    left = {n: s for n, s in shapes.items() if n not in kept and not n.endswith("inv_freq")}
    count = Counter(left.values())
    fits = {
        name: [other for other in missing if missing[other] == shape and name not in uneven]
        for name, shape in left.items()
    }
    renamed = {
        name: found[0]
        for name, found in fits.items()
        if len(found) == 1 and count[left[name]] == 1 and _usable(name)
    }
    if kept:
        yield f"{indent}- keep:"
        yield from (f"{indent}    - {name}    # {[*shapes[name]]}" for name in kept)
    if renamed:
        yield f"{indent}- rename:    # the only ones of these shapes"
        for name, target in renamed.items():
            yield f"{indent}    {_scalar(name)}: {target}    # {[*shapes[name]]}"
    unknown = fold(name for name in left if name not in renamed)
    if unknown:
        yield f"{indent}# Not recognised; `rename` them, or `drop` them with a reason:"
    for one in unknown[:_MAX_COMMENTS]:
        what = f"{one.count:,} tensors"
        if one.text in left:
            names = ", ".join(fits[one.text][:_MAX_NAMES])
            what = f"{[*left[one.text]]}" + (f": {names}" if names else "")
            if one.text in uneven:
                what = "differs between layers"
        yield f"{indent}# - rename: {{{_scalar(one.text)}: }}    # {what}"
        yield from _fused(indent, one.text, left.get(one.text, ()), missing)
    if len(unknown) > _MAX_COMMENTS:
        yield f"{indent}# and {len(unknown) - _MAX_COMMENTS:,} more kinds"
    lacking = [one.text for one in fold(name for name in missing if name not in renamed.values())]
    if lacking:
        yield f"{indent}# Nothing makes: {', '.join(lacking)}"


def _fused(indent: str, name: str, shape: Shape, missing: Mapping[str, Shape]) -> Iterator[str]:
    """What a tensor may be split into, as comments."""
    for parts in _FUSED:
        fitting = [missing[part] for part in parts if part in missing]
        rows = [one[0] for one in fitting if one[1:] == shape[1:]]
        if len(rows) == len(parts) and shape[:1] == (sum(rows),):
            yield f"{indent}# - split: {_scalar(name)}    # or `deinterleave` it, see the code"
            yield f"{indent}#   into: [{', '.join(parts)}]"
            yield f"{indent}#   sizes: {rows}"


def _config(config: Mapping[str, object], plain: PlainClass) -> Iterator[str]:
    """The lines of a `config` table for the class `plain`, and comments on all other keys."""
    keep: list[str] = []
    derive: list[str] = []
    constant: list[str] = []
    missing: list[str] = []
    used = {*_ABOUT_FILES}
    for key in plain.keys:
        spelling = _spelling(key, config)
        used.add(spelling)
        if spelling == key:
            keep.append(key)
        elif key == "hidden_act" and config.get(spelling) in SILU:
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
    if keep:
        yield f"  keep: [{', '.join(keep)}]"
    for title, entries in (("derive", derive), ("set", constant)):
        if entries:
            yield f"  {title}:"
            yield from (f"    {entry}" for entry in entries)
    if missing:
        yield f"  # Not in the config, so as {plain.architecture} has it: {', '.join(missing)}."
    others = [
        f"{_quoted(key)}: {show(value)}"
        for key, value in config.items()
        if key not in used and value is not None
    ]
    if others:
        yield "  # No rule reads these; `require` what must have one value:"
        for text in others[:_MAX_COMMENTS]:
            yield f"  #   {text if text.isprintable() else _quoted(text)}"


def _usable(name: str) -> bool:
    try:
        return not parse_name(name).variables and name != ""
    except ValueError:
        return False


def _quoted(text: str) -> str:
    """A text on one line between quotes; what cannot be printed becomes a question mark."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:300])
    return json.dumps(printable, ensure_ascii=False)


def _scalar(text: str) -> str:
    """A text as YAML: quoted where it would be something else."""
    return text if _PLAIN.fullmatch(text) and text not in _NO_TEXTS else _quoted(text)
