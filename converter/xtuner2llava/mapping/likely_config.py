"""The config keys of an unknown LLM: which says what, by their words and by the tensors' shapes."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from xtuner2llava.mapping import likely_roles as likely
from xtuner2llava.mapping.expressions import show
from xtuner2llava.mapping.likely_roles import Layout
from xtuner2llava.mapping.plain_class import PlainClass
from xtuner2llava.mapping.similar import SPELLINGS

_MAX_COMMENTS = 60
_SAME_AS_SILU = ("swiglu", "swish", "silu")


@dataclass(slots=True)
class Sizes:
    """How the class's sizes are said in the source config's keys, or as numbers from shapes."""

    expressions: dict[str, str] = field(default_factory=dict)
    dims: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, object], layout: Layout) -> Sizes:
        sizes = cls()
        inside = layout.inside
        embedding = layout.outside.shape(f"{likely.EMBEDDING}.weight") or (None, None)
        sizes.say(config, "vocab_size", embedding[0])
        sizes.say(config, "hidden_size", embedding[1])
        sizes.say(config, "num_hidden_layers", layout.layers)
        sizes.say(config, "num_attention_heads", None)
        both, down = (inside.shape(f"{p}.weight") for p in (likely.GATE_UP, likely.DOWN))
        inner = down[1] if down else both[0] // 2 if both else None
        sizes.say(config, "intermediate_size", inner)
        heads = _number(config, sizes.expressions.get("num_attention_heads"))
        head = embedding[1] // heads if heads and embedding[1] else None
        q_norm = inside.shape(f"{likely.Q_NORM}.weight")
        if q_norm:
            head = q_norm[0]
            sizes.say(config, "head_dim", head)
        k, qkv = (inside.shape(f"{place}.weight") for place in (likely.K_PROJ, likely.QKV))
        rows = k[0] if k else (qkv[0] - (heads or 0) * (head or 0)) // 2 if qkv else None
        sizes.say(config, "num_key_value_heads", rows // head if rows and head else None)
        said = sizes.expressions
        if said.get("num_key_value_heads") == str(heads):
            said["num_key_value_heads"] = said["num_attention_heads"]
        sizes.dims["layers"] = said.get("num_hidden_layers", "0")
        if qkv and heads and head:
            width = f"{said.get('hidden_size')} // {said['num_attention_heads']}"
            sizes.dims["head"] = said.get("head_dim", width)
            sizes.dims["queries"] = f"{said['num_attention_heads']} * head"
            sizes.dims["keys"] = f"{said.get('num_key_value_heads', heads)} * head"
        if both:
            sizes.dims["inner"] = said["intermediate_size"]
        return sizes

    def say(self, config: Mapping[str, object], key: str, value: int | None) -> None:
        """The key, another spelling, half of one, or `value` itself, which shapes have told."""
        spellings = [name for name in (key, *SPELLINGS.get(key, ())) if _is_size(config, name)]
        for name in spellings:
            if value is None or config[name] == value:
                self.expressions[key] = name
                return
        for name in spellings:
            if config[name] == 2 * (value or 0):
                self.expressions[key] = f"{name} // 2"
                return
        if value is not None:
            self.expressions[key] = str(value)


def _is_size(config: Mapping[str, object], name: str) -> bool:
    value = config.get(name)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(config: Mapping[str, object], expression: str | None) -> int | None:
    value = config.get(expression or "")
    return value if isinstance(value, int) else None


def config_lines(
    config: Mapping[str, object], layout: Layout, plain: PlainClass, sizes: Sizes
) -> Iterator[str]:
    """The lines of a `config` table for the class `plain`, and comments on all other keys."""
    keep: list[str] = []
    derive: dict[str, str] = {}
    constant: dict[str, str] = {}
    missing: list[str] = []
    used: set[str] = set()
    for key in plain.keys:
        said = sizes.expressions.get(key)
        spelling = said or next((n for n in (key, *SPELLINGS.get(key, ())) if n in config), None)
        used |= set(re.findall(r"\w+", spelling or ""))
        if spelling == key:
            keep.append(key)
        elif key == "hidden_act" and spelling and config[spelling] in _SAME_AS_SILU:
            constant[key] = f"silu    # {spelling} is {show(config[spelling])}"
        elif spelling is not None and spelling.isdecimal():
            constant[key] = f"{spelling}    # from the tensors' shapes"
        elif spelling is not None and _is_name(spelling.partition(" ")[0]):
            # Other versions of transformers want a float.
            derive[key] = f"{spelling} * 1.0" if key == "rope_theta" else spelling
        elif key in plain.required:
            constant[key] = "0    # required, and not in the config: say it"
        elif key == "sliding_window":
            constant[key] = "null    # the class would have one"
        elif key != "rope_scaling":
            missing.append(f"{key} {show(plain.default[key])}")
    found = layout.inside.found
    if plain.name == "llama" and f"{likely.O_PROJ}.bias" in found and "attention_bias" not in keep:
        constant["attention_bias"] = "true    # of q, k, v and o"
    has_head = f"{likely.HEAD}.weight" in layout.outside.found
    if not has_head and "tie_word_embeddings" not in (*keep, *derive):
        constant["tie_word_embeddings"] = "true    # there is no head"
    if keep:
        yield f"  keep: [{', '.join(keep)}]"
    for title, entries in (("derive", derive), ("set", constant)):
        if entries:
            yield f"  {title}:"
            yield from (f"    {key}: {text}" for key, text in entries.items())
    missing = [text for text in missing if text.partition(" ")[0] not in constant]
    if missing:
        yield f"  # Not in the config, so as {plain.architecture} has it: {', '.join(missing)}."
    others = [
        f"{quoted(key)}: {show(value)}"
        for key, value in config.items()
        if key not in used and key not in keep and value is not None and key not in _ABOUT_FILES
    ]
    if others:
        yield "  # Nothing looks at these; `require` what must have one value:"
        for text in others[:_MAX_COMMENTS]:
            yield f"  #   {text if text.isprintable() else quoted(text)}"


_ABOUT_FILES = ("architectures", "auto_map", "model_type", "torch_dtype", "transformers_version")


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def quoted(text: str) -> str:
    """A text on one line between quotes; what cannot be printed becomes a question mark."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:300])
    return json.dumps(printable, ensure_ascii=False)
