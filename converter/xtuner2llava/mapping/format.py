"""Formats: where the LLM, the projector and the tower go, and the config keys that say so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.caveats import (
    Caveat,
    Limit,
    Requirement,
    failures,
    limits,
    read_requirements,
)
from xtuner2llava.mapping.config_rules import ConfigRules, read_config_rules, read_texts
from xtuner2llava.mapping.expand import Step, expand
from xtuner2llava.mapping.expressions import Environment
from xtuner2llava.mapping.folder_name import FolderName
from xtuner2llava.mapping.plain_class import MappingFile
from xtuner2llava.mapping.rules import Entry, RuleSet, read_rules
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Document, Node

COMPONENTS = ("llm", "projector", "visual_encoder")
_CONFIG_KEYS = ("keep", "derive", "set", "nest")
_Requirements = Annotated[tuple[Requirement, ...], read_requirements]
_Rules = Annotated[tuple[Entry, ...], read_rules]


@dataclass(frozen=True, slots=True)
class FormatClass:
    """What a plain class is called in a format, and what its config must hold there."""

    TITLE: ClassVar = "a class"
    architecture: str
    model_type: str
    requirements: _Requirements = field(default=(), metadata={"key": "require"})
    folder_name: FolderName = field(default_factory=FolderName)
    caveats: tuple[Caveat, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """An output format, with the format it extends already merged in."""

    name: str
    classes: Mapping[str, FormatClass]
    rules: Mapping[str, RuleSet]
    """By component, one of `COMPONENTS`."""
    config_rules: ConfigRules
    files: tuple[MappingFile, ...]
    refused: Mapping[str, Fault] = field(default_factory=dict)
    """Plain classes that it cannot have, each with the reason."""
    requirements: tuple[Requirement, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Tokens that the tokenizer must have, by what they are for: `image` and `pad`."""
    processor: str | None = None
    """The class of transformers that prepares texts and images together, if there is one."""

    @property
    def file(self) -> MappingFile:
        return self.files[0]

    @property
    def nest(self) -> Mapping[str, str]:
        """Where `llm` and `vision` have their configs in config.json; without it, the LLM's keys
        stand at the top and the tower has none."""
        return self.config_rules.nest

    def class_faults(self, name: str, values: Mapping[str, object]) -> list[Fault]:
        """Why this format cannot say an LLM of the plain class `name` with this config."""
        if name not in self.classes:
            if name in self.refused:
                return [self.refused[name]]
            known = ", ".join(self.classes)
            what = f"the format {self.name} has no class for {name}; it has {known}"
            return [Fault(self.file.name, what)]
        return failures(self.classes[name].requirements, values)

    def faults(self, environment: Environment) -> list[Fault]:
        """Its requirements that do not hold; `environment` is that of `config`."""
        return failures(self.requirements, environment)

    def class_limits(self, name: str, values: Mapping[str, object]) -> list[Limit]:
        """The caveats of the plain class `name` here that hold for its config `values`."""
        return limits(self.classes[name].caveats, values)

    def expand(
        self, component: str, environment: Environment, names: Collection[str]
    ) -> list[Step]:
        """The steps for the tensors `names` of a component; see `expand`."""
        return expand(self.rules[component], environment, names)

    def config(self, environment: Environment) -> dict[str, object]:
        """The config keys that it adds to those of the plain class.

        `environment` has the keys of the plain class, and the names that the file uses besides:
        `vision` (the tower's config, and its `name`), `xtuner` (`visual_select_layer`,
        `image_aspect_ratio`), `projector_type`, `projector.depth`, `writes.visual_encoder`, and
        `tokens` (the ids of the format's tokens). Raises `MappingError` with all that has no
        value, and with every requirement of the format that does not hold.
        """
        faults = self.faults(environment)
        values = self.config_rules.make(environment, faults)
        raise_faults(MappingError, faults)
        return values


def _read_config(reader: Reader, node: Node | None) -> ConfigRules:
    return read_config_rules(reader, node, _CONFIG_KEYS)


def _read_tokens(reader: Reader, node: Node) -> Mapping[str, str]:
    return read_texts(reader, node, "`tokens`", ("image", "pad"))


@dataclass(frozen=True, slots=True)
class _Tensors:
    llm: _Rules = ()
    projector: _Rules = ()
    visual_encoder: _Rules = ()


@dataclass(frozen=True, slots=True)
class _FormatFile:
    format: str
    extends: str | None = None
    classes: Mapping[str, FormatClass] = field(default_factory=dict)
    require: _Requirements = ()
    tokens: Annotated[Mapping[str, str], _read_tokens] = field(default_factory=dict)
    processor: str | None = None
    tensors: _Tensors = _Tensors()
    config: Annotated[ConfigRules, _read_config] = field(default_factory=ConfigRules)


def read_format(document: Document, find_format: Callable[[str], Format]) -> Format:
    """The format that a file describes. Raises `MappingError` with all faults of the file."""
    reader, root = Reader(document), document.root
    file = reader.root(_FormatFile, "a format")
    parent = reader.found("extends", find_format)
    if "extends" not in root.entries:
        tensors = reader.table(root.entries.get("tensors"), "`tensors`")
        needed = [("a format", root, key) for key in ("classes", "tensors")]
        needed += [("`tensors`", tensors, key) for key in COMPONENTS if "tensors" in root.entries]
        for what, table, key in needed:
            if key not in table.entries:
                reader.fault(table.line, f"{what} needs `{key}`")
    reader.finish()
    if parent is None:
        parent = Format("", {}, dict.fromkeys(COMPONENTS, RuleSet()), ConfigRules(), ())
    return Format(
        file.format,
        {**parent.classes, **file.classes},
        {key: RuleSet(getattr(file.tensors, key), parent.rules[key]) for key in COMPONENTS},
        parent.config_rules.under(file.config),
        (MappingFile(document.name, document.sha256), *parent.files),
        requirements=(*parent.requirements, *file.require),
        tokens={**parent.tokens, **file.tokens},
        processor=file.processor or parent.processor,
    )
