"""Formats: where the LLM, the projector and the tower go, and the config keys that say so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.caveats import Caveat, Limit, limits
from xtuner2llava.mapping.config_rules import (
    ConfigRules,
    Requirement,
    failures,
    read_config_rules,
    read_requirements,
)
from xtuner2llava.mapping.expand import expand
from xtuner2llava.mapping.expressions import Environment
from xtuner2llava.mapping.folder_name import FolderName
from xtuner2llava.mapping.plain_class import MappingFile
from xtuner2llava.mapping.rules import RuleSet, Step, read_rules
from xtuner2llava.mapping.schema import ABSENT, GIVEN, Reader, key
from xtuner2llava.mapping.yaml import Document, Node

COMPONENTS = ("llm", "projector", "visual_encoder")


_Requirements = Annotated[tuple[Requirement, ...], read_requirements]


@dataclass(frozen=True, slots=True)
class FormatClass:
    """What a plain class is called in a format, and what its config must hold there."""

    TITLE: ClassVar = "a class"
    architecture: str
    model_type: str
    requirements: _Requirements = field(metadata=key("require"), default=())
    folder_name: FolderName = field(default_factory=FolderName)
    caveats: tuple[Caveat, ...] = ()


def _read_tensors(reader: Reader, node: Node) -> Mapping[str, RuleSet]:
    table = reader.table(node, "`tensors`")
    reader.keys(table, COMPONENTS, "`tensors`")
    return {name: read_rules(reader, table.get(name, ABSENT)) for name in COMPONENTS}


def _read_config(reader: Reader, node: Node) -> ConfigRules:
    return read_config_rules(reader, node, ("keep", "derive", "set", "nest"))


def _read_tokens(reader: Reader, node: Node) -> Mapping[str, str]:
    return reader.texts(node, "`tokens`", ("image", "pad"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """An output format, with the format it extends already merged in."""

    name: str = field(metadata=key("format"))
    classes: Mapping[str, FormatClass] = field(default_factory=dict)
    rules: Annotated[Mapping[str, RuleSet], _read_tensors] = field(
        metadata=key("tensors"), default_factory=dict
    )
    """By component, one of `COMPONENTS`."""
    config_rules: Annotated[ConfigRules, _read_config] = field(
        metadata=key("config"), default=ConfigRules()
    )
    requirements: _Requirements = field(metadata=key("require"), default=())
    tokens: Annotated[Mapping[str, str], _read_tokens] = field(default_factory=dict)
    """Tokens that the tokenizer must have, by what they are for: `image` and `pad`."""
    processor: str | None = None
    """The class of transformers that prepares texts and images together, if there is one."""
    files: tuple[MappingFile, ...] = field(metadata=GIVEN)
    refused: Mapping[str, Fault] = field(metadata=GIVEN, default_factory=dict)
    """Plain classes that it cannot have, each with the reason."""

    @property
    def file(self) -> MappingFile:
        return self.files[0]

    @property
    def nest(self) -> Mapping[str, str]:
        """Where `llm` and `vision` have their configs in config.json; without it, the LLM's keys
        stand at the top and the tower has none."""
        return self.config_rules.nest

    def class_faults(self, name: str, values: Mapping[str, object]) -> list[Fault]:
        """Why this format does not support an LLM of the plain class `name` with this config."""
        if name in self.classes:
            return failures(self.classes[name].requirements, values)
        if name in self.refused:
            return [self.refused[name]]
        what = f"the format {self.name} has no class for {name}; it has {', '.join(self.classes)}"
        return [Fault(self.file.name, what)]

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

    def over(self, parent: Format) -> Format:
        """This format with the tables of `parent` under its own."""
        return replace(
            self,
            classes={**parent.classes, **self.classes},
            rules={
                name: RuleSet(
                    self.rules[name].entries if name in self.rules else (), parent.rules[name]
                )
                for name in COMPONENTS
            },
            config_rules=parent.config_rules.under(self.config_rules),
            requirements=(*parent.requirements, *self.requirements),
            tokens={**parent.tokens, **self.tokens},
            processor=self.processor or parent.processor,
            files=(*self.files, *parent.files),
        )


def read_format(document: Document, find_format: Callable[[str], Format]) -> Format:
    """The format in a file. Raises `MappingError` with all faults of the file."""
    reader, table = Reader(document), document.table
    file = MappingFile(document.name, document.sha256)
    found = reader.root(Format, "a format", ("extends",), files=(file,))
    parent = reader.found("extends", find_format)
    if "extends" not in table:
        needed = [("a format", document.line, table, name) for name in ("classes", "tensors")]
        if "tensors" in table:
            node = table["tensors"]
            of_tensors = reader.table(node, "`tensors`")
            needed += [("`tensors`", node.line, of_tensors, name) for name in COMPONENTS]
        for what, line, there, name in needed:
            if name not in there:
                reader.fault(line, f"{what} needs `{name}`")
    reader.finish()
    return found.over(parent) if parent else found
