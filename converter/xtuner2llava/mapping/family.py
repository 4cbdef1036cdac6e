"""Families: what an LLM is, and the plain class that it becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import PurePath
from typing import Annotated, TypeVar

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.apply import Applied, apply
from xtuner2llava.mapping.caveats import Caveat, Limit, limits
from xtuner2llava.mapping.config_rules import ConfigRules, failures, read_config_rules
from xtuner2llava.mapping.detect import Match
from xtuner2llava.mapping.expressions import Environment, Expression, show
from xtuner2llava.mapping.format import Format
from xtuner2llava.mapping.names import advice_for
from xtuner2llava.mapping.plain_class import PlainClass, with_dims
from xtuner2llava.mapping.rules import RuleOrBlock, read_rules
from xtuner2llava.mapping.schema import GIVEN, Reader, key
from xtuner2llava.mapping.similar import doubtful_defaults
from xtuner2llava.mapping.yaml import Document, Node
from xtuner2llava.tensors.lazy import LazyTensor

_T = TypeVar("_T")
# Keys that are not about what is computed, or that other stages decide (dtype, token ids).
HOUSEKEEPING = frozenset(
    (
        *("_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures"),
        *("attn_implementation", "auto_map", "bos_token_id", "dtype", "eos_token_id", "model_type"),
        *("pad_token_id", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"),
    )
)
# By the end of a file's name, the class of transformers that its tokenizer becomes.
_CONVERTED = {"tokenizer.model": "LlamaTokenizer", ".tiktoken": "Qwen2Tokenizer"}
# A range of tokens in a name, such as `<|extra_{0..204}|>`.
_RANGE = re.compile(r"(.*)\{([0-9]{1,6})\.\.([0-9]{1,6})\}(.*)", re.DOTALL)
_MAX_SPECIAL_TOKENS = 10_000


@dataclass(frozen=True, slots=True)
class Generation:
    """Special tokens by their text, whose ids the tokenizer knows.

    They go into config.json and generation_config.json, never onto the tokenizer. None, or an
    empty `eos`, leaves the base model's own ids.
    """

    bos: str | None = None
    eos: tuple[str, ...] = ()
    pad: str | None = None


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """The prompt template that XTuner trains this family with, by its name there, and stop words.

    They go to the card and to conversion.json. None and empty where the family has no single one.
    """

    template: str | None = None
    stop_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One template, with the fields of XTuner's `PROMPT_TEMPLATE` (`xtuner/utils/templates.py`).

    `instruction` has the placeholder `{input}` and may have `{round}`, `system` has `{system}`.
    `name` is None for a template that a config writes out.
    """

    name: str | None
    instruction: str
    system: str = ""
    suffix: str = ""
    suffix_as_eos: bool = False
    sep: str = ""
    stop_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TranslatedConfig:
    """The plain class's config, all its keys explicit, and source keys that nothing reads.

    `doubts` name defaults of the class that stand beside a key of `not_carried` like them.
    """

    values: dict[str, object]
    not_carried: tuple[str, ...]
    doubts: tuple[Limit, ...] = ()


def _read_convert(reader: Reader, node: Node) -> str | None:
    name = reader.plain(str, node, "`convert`")
    if name and (not name.endswith(tuple(_CONVERTED)) or PurePath(name).name != name):
        what = f"`convert` is {show(name)}, expected tokenizer.model or a .tiktoken file"
        reader.fault(node.line, what)
    return name or None


def _read_special_tokens(reader: Reader, node: Node) -> Mapping[str, int]:
    ids: dict[str, int] = {}
    for token, value in reader.table(node, "`special_tokens`").items():
        first, found = value.value, _RANGE.fullmatch(token)
        numbers = range(int(found[2]), int(found[3]) + 1) if found else range(1)
        if type(first) is not int or first < 0:
            reader.fault(value.line, f"{token!r} has no id, but {show(value.data)}")
        elif len(ids) + len(numbers) > _MAX_SPECIAL_TOKENS:
            reader.fault(value.line, f"{token!r} is too many, {_MAX_SPECIAL_TOKENS:,} are allowed")
        else:
            names = [f"{found[1]}{number}{found[4]}" for number in numbers] if found else [token]
            ids |= {name: index for index, name in enumerate(names, first)}
    if len({*ids.values()}) < len(ids):
        reader.fault(node.line, "two of `special_tokens` have the same id")
    return ids


@dataclass(frozen=True, slots=True)
class TokenizerRules:
    """What the tokenizer is made from, where it is code of the model's repository.

    `convert` is a file of the base, and `class_name` the class that it becomes. `special_tokens`
    are ids by text; `<|extra_{0..204}|>: 151646` in YAML numbers 205 tokens from there on.
    """

    convert: Annotated[str | None, _read_convert] = None
    class_name: str | None = field(metadata=key("class"), default=None)
    special_tokens: Annotated[Mapping[str, int], _read_special_tokens] = field(default_factory=dict)


_CONFIG = partial(read_config_rules, allowed=("default", "require", "keep", "derive", "set"))


def _read_tensors(reader: Reader, node: Node) -> tuple[tuple[RuleOrBlock, ...], ...]:
    return (read_rules(reader, node),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An LLM family, with the tables of the families it extends already merged in."""

    name: str = field(metadata=key("family"))
    llms: str | None = None
    """The models that it is for, as people call them."""
    match: Match = field(default_factory=Match)
    dims: Mapping[str, Expression] = field(default_factory=dict)
    layers: Annotated[tuple[tuple[RuleOrBlock, ...], ...], _read_tensors] = field(
        metadata=key("tensors"), default=()
    )
    """Its rules, and those of the families that it extends, which they replace."""
    config: Annotated[ConfigRules, _CONFIG] = field(default_factory=ConfigRules)
    tokenizer: TokenizerRules = field(default_factory=TokenizerRules)
    generation: Generation = Generation()
    chat: ChatDefaults = ChatDefaults()
    caveats: tuple[Caveat, ...] = ()
    target_class: PlainClass = field(metadata=GIVEN)
    own_files: tuple[Document, ...] = field(metadata=GIVEN)
    """This file, and those that it extends."""
    names_read: frozenset[str] = field(metadata=GIVEN, default=frozenset())
    if_right: str | None = field(metadata=GIVEN, default=None)
    """What its results depend on where only the user says so; None for one that is shipped."""

    @property
    def file(self) -> Document:
        return self.own_files[0]

    @property
    def files(self) -> tuple[Document, ...]:
        """The provenance of a conversion: its files, and that of the class."""
        return (*self.own_files, self.target_class.file)

    def environment(self, config: Mapping[str, object]) -> Environment:
        """What its expressions know: the source config, its defaults, and `dims`."""
        return with_dims({**self.config.default, **config}, self.dims)

    def apply(self, config: Mapping[str, object], tensors: Mapping[str, LazyTensor]) -> Applied:
        """What its rules make of the tensors of an LLM with this source config; see `apply`."""
        return apply(self.layers, self.environment(config), tensors, where=self.file.name)

    def translate_config(
        self, config: Mapping[str, object], format_: Format | None = None
    ) -> TranslatedConfig:
        """The config of the plain class, from a source config in the spelling of 4.37.

        Raises `MappingError` with every requirement that does not hold: those of this family, of
        the class, and with `format_` also of that class there.
        """
        plain, environment = self.target_class, self.environment(config)
        faults = failures(self.config.requirements, environment)
        made = self.config.make(environment, faults)
        read = self.names_read | HOUSEKEEPING
        if self.config.keep_all:
            made = {k: environment[k] for k in plain.known if k in environment} | made
            read |= {*plain.known}
        values, wrong = plain.complete(made)
        faults += wrong
        if format_ is not None and not wrong:
            faults += format_.class_faults(plain.name, values)
        raise_faults(MappingError, faults)
        unread = tuple(k for k, value in config.items() if k not in read and value is not None)
        standing = {k: values[k] for k in plain.config.default if k not in made}
        doubts = doubtful_defaults(plain.architecture, standing, config, unread)
        return TranslatedConfig(values, unread, doubts)

    def limits(self, config: Mapping[str, object]) -> list[Limit]:
        """The caveats that hold for a source config. Raises `MappingError`."""
        proof = [] if self.if_right is None else [Limit.unproven(self.if_right)]
        return proof + limits(self.caveats, self.environment(config))

    def chosen_for(self, config: Mapping[str, object], names: Collection[str] | None) -> Family:
        """This family for an LLM that the user says is one, which its `match` may not confirm."""
        if self.if_right is not None or self.match.fits(config, names):
            return self
        return replace(self, if_right=f"family {self.name} for this LLM")

    def over(self, parent: Family) -> Family:
        """This family with the tables of `parent` under its own; `match` is its own."""
        return replace(
            self,
            dims={**parent.dims, **self.dims},
            layers=(*self.layers, *parent.layers),
            config=parent.config.under(self.config),
            tokenizer=_filled(self.tokenizer, parent.tokenizer),
            generation=_filled(self.generation, parent.generation),
            chat=_filled(self.chat, parent.chat),
            caveats=(*parent.caveats, *self.caveats),
            own_files=(*self.own_files, *parent.own_files),
            names_read=self.names_read | parent.names_read,
        )


def _filled(own: _T, parent: _T) -> _T:
    """A dataclass with `parent`'s value of each field that is empty."""
    names = [each.name for each in fields(own)]  # type: ignore[arg-type]
    return type(own)(**{name: getattr(own, name) or getattr(parent, name) for name in names})


def read_family(
    document: Document,
    find_family: Callable[[str], Family],
    find_class: Callable[[str], PlainClass],
    templates: Collection[str],
) -> Family:
    """The family in a file; `find_…` load what it names, or raise `MappingError`.

    Of a family that it extends it takes every table, and puts its own entries over them; `match`
    is its own, since two families that match the same LLM would be none. Raises `MappingError`
    with all faults of the file.
    """
    reader, table = Reader(document), document.table
    parent = reader.found("extends", find_family)
    plain = reader.found("becomes", find_class) or (parent.target_class if parent else None)
    besides = ("extends", "becomes")
    family = reader.root(Family, "a family", besides, target_class=plain, own_files=(document,))
    for name in () if "extends" in table else ("becomes", "tensors"):
        if name not in table:
            reader.fault(document.line, f"a family needs `{name}`")
    family = replace(family, names_read=frozenset(reader.names_read))
    if parent is not None:
        family = family.over(parent)
    template = family.chat.template
    if template is not None and template not in templates:
        what = f"`{template}` is not a prompt template of XTuner"
        advice = advice_for(template, templates, f"It has: {', '.join(templates)}.")
        reader.fault(table["chat"].key_line, what, advice)
    if "tokenizer" in table:
        _check_tokenizer(reader, table["tokenizer"].key_line, family.tokenizer)
    if plain is not None:
        line = table["config"].key_line if "config" in table else document.line
        _check_keys(reader, line, family.config, plain)
    reader.finish()
    return family


def _check_tokenizer(reader: Reader, line: int, rules: TokenizerRules) -> None:
    convert = rules.convert or ""
    made = next((name for end, name in _CONVERTED.items() if convert.endswith(end)), None)
    if rules.class_name and not convert:
        reader.fault(line, "`class` needs `convert`, the file that the tokenizer is made from")
    elif made and rules.class_name not in (None, made):
        reader.fault(line, f"`class` is {show(rules.class_name)}, and `convert` makes a {made}")


def _check_keys(reader: Reader, line: int, rules: ConfigRules, plain: PlainClass) -> None:
    """Faults for keys that the class does not have, and for those it needs and nothing makes."""
    for name, made in rules.keys.items():
        if name not in plain.known:
            what = f"`{name}` is not a config key of {plain.architecture} in transformers 4.37"
            advice = advice_for(name, plain.known, f"It has: {', '.join(plain.known)}.")
            reader.faults.append(Fault(made.where, what, advice))
    lacking = [name for name in plain.config.required if name not in rules.keys]
    if lacking and not rules.keep_all:
        listed = ", ".join(f"`{name}`" for name in lacking)
        what = f"`config` does not make {listed}, which {plain.architecture} needs"
        reader.fault(line, what, "Say it with `keep`, `derive` or `set`.")
