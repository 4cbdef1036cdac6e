"""Families: what an LLM is, and the plain class that it becomes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from xtuner2llava.errors import MappingError, raise_faults
from xtuner2llava.mapping.caveat import Caveat, Limit, limits
from xtuner2llava.mapping.config_rules import ConfigRules
from xtuner2llava.mapping.detection import Match
from xtuner2llava.mapping.expand import Step, expand
from xtuner2llava.mapping.expression import Expression
from xtuner2llava.mapping.format import Format
from xtuner2llava.mapping.plain_class import MappingFile, PlainClass, with_dims
from xtuner2llava.mapping.requirement import Requirement, failures
from xtuner2llava.mapping.rules import RuleSet
from xtuner2llava.mapping.similar import doubtful_defaults
from xtuner2llava.mapping.values import Environment, show

# Keys that are not about what is computed, or that other stages decide (dtype, token ids).
HOUSEKEEPING = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "model_type",
        "pad_token_id",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


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
class Chat:
    """The prompt template that XTuner trains this family with, by its name there, and stop words.

    They go to the card and to conversion.json. None and empty where the family has no single one.
    """

    template: str | None = None
    stop_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TranslatedConfig:
    """The plain class's config, all its keys explicit, and source keys that nothing looked at.

    `doubts` name defaults of the class that stand beside a key of `not_carried` like them.
    """

    values: dict[str, object]
    not_carried: tuple[str, ...]
    doubts: tuple[Limit, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """An LLM family, with the tables of the families it extends already merged in."""

    name: str
    becomes: PlainClass
    match: Match
    dims: Mapping[str, Expression]
    rules: RuleSet
    config: ConfigRules
    requirements: tuple[Requirement, ...]
    tokenizer: Mapping[str, object]
    generation: Generation
    chat: Chat
    caveats: tuple[Caveat, ...]
    files: tuple[MappingFile, ...]
    """This file, those it extends, and the class: what a conversion should be put down to."""
    names_read: frozenset[str]
    if_right: str | None = None
    """What its results depend on where only the user says so; None for one that is shipped."""

    @property
    def file(self) -> MappingFile:
        return self.files[0]

    def environment(self, config: Mapping[str, object]) -> Environment:
        """What its expressions know: the source config, its defaults, and `dims`."""
        return with_dims({**self.config.default, **config}, self.dims)

    def expand(self, config: Mapping[str, object], names: Collection[str]) -> list[Step]:
        """Its rules for a checkpoint with this source config and these tensor names."""
        return expand(self.rules, self.environment(config), names)

    def translate_config(
        self, config: Mapping[str, object], format_: Format | None = None
    ) -> TranslatedConfig:
        """The config of the plain class, from a source config in the spelling of 4.37.

        Raises `MappingError` with every requirement that does not hold: those of this family, of
        the class, and with `format_` also of that class there.
        """
        environment = self.environment(config)
        faults = failures(self.requirements, environment)
        made = self.config.make(environment, faults)
        if self.config.keep_all:
            known = (*self.becomes.keys, *self.becomes.checked)
            made = {key: environment[key] for key in known if key in environment} | made
        values, wrong = self.becomes.complete(made)
        faults += wrong
        if format_ is not None:
            faults += format_.class_faults(self.becomes.name, values)
        raise_faults(MappingError, list(dict.fromkeys(faults)))
        unread = self._not_carried(config)
        doubts = self._doubts(
            {key: values[key] for key in self.becomes.default if key not in made}, config, unread
        )
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

    def _doubts(
        self,
        standing: Mapping[str, object],
        config: Mapping[str, object],
        unread: tuple[str, ...],
    ) -> tuple[Limit, ...]:
        """A limit for each key of `standing`, the class's defaults, that a key unread is like."""
        return tuple(
            Limit(
                f"{key} is {show(default)}, the default of {self.becomes.architecture}, and nothing"
                f" reads {other}, which the LLM's config says is {show(value)}: in a mapping,"
                f" `derive: {{{key}: {other}}}` reads it, `set: {{{key}: {show(default)}}}` says"
                " that the default is right."
            )
            for key, default, other, value in doubtful_defaults(standing, config, unread)
        )

    def _not_carried(self, config: Mapping[str, object]) -> tuple[str, ...]:
        read = self.names_read | HOUSEKEEPING
        if self.config.keep_all:
            read |= {*self.becomes.keys, *self.becomes.checked}
        return tuple(key for key, value in config.items() if key not in read and value is not None)
