"""Formats: where the LLM, the projector and the tower go, and the config keys that say so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.caveat import Caveat, Limit, limits, read_caveats
from xtuner2llava.mapping.config_rules import ConfigRules, read_config_rules
from xtuner2llava.mapping.expand import Step, expand
from xtuner2llava.mapping.folder_name import FolderName
from xtuner2llava.mapping.plain_class import MappingFile
from xtuner2llava.mapping.requirement import Requirement, failures, read_requirements
from xtuner2llava.mapping.rules import RuleSet, read_rules
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.values import Environment
from xtuner2llava.mapping.yaml import Document, Node

COMPONENTS = ("llm", "projector", "visual_encoder")
_KEYS = ("extends", "classes", "require", "tokens", "processor", "tensors", "config")
_CLASS_KEYS = ("architecture", "model_type", "require", "folder_name", "caveats")
_CONFIG_KEYS = ("keep", "derive", "set", "nest")
_NESTED = ("llm", "vision")


@dataclass(frozen=True, slots=True)
class FormatClass:
    """What a plain class is called in a format, and what its config must hold there."""

    architecture: str
    model_type: str
    requirements: tuple[Requirement, ...]
    folder_name: FolderName
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
    nest: Mapping[str, str] = field(default_factory=dict)
    """Where `llm` and `vision` have their configs in config.json; without it, the LLM's keys stand
    at the top and the tower has none."""

    @property
    def file(self) -> MappingFile:
        return self.files[0]

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


def _folder_name(reader: Reader, node: Node | None) -> FolderName:
    table = reader.table(node, "`folder_name`")
    reader.keys(table, ("needs", "avoid"), "`folder_name`")
    entries = table.entries
    return FolderName(
        reader.texts(entries.get("needs"), "`needs`"), reader.texts(entries.get("avoid"), "`avoid`")
    )


def _texts(reader: Reader, node: Node | None, what: str, keys: Collection[str]) -> dict[str, str]:
    table = reader.table(node, what)
    reader.keys(table, keys, what)
    return {key: reader.text(value, f"`{key}`") for key, value in table.entries.items()}


def read_format(document: Document, find_format: Callable[[str], Format]) -> Format:
    """The format that a file describes. Raises `MappingError` with all faults of the file."""
    reader = Reader(document)
    root = reader.root("format", _KEYS)
    entries = root.entries
    name = reader.text(reader.required(root, "format", "a format"), "`format`")
    parent = reader.found(root, "extends", find_format)
    classes: dict[str, FormatClass] = dict(parent.classes) if parent else {}
    for key, node in reader.table(entries.get("classes"), "`classes`").entries.items():
        table = reader.table(node, "a class")
        reader.keys(table, _CLASS_KEYS, "a class")
        classes[key] = FormatClass(
            reader.text(reader.required(table, "architecture", "a class"), "`architecture`"),
            reader.text(reader.required(table, "model_type", "a class"), "`model_type`"),
            read_requirements(reader, table.entries.get("require")),
            _folder_name(reader, table.entries.get("folder_name")),
            read_caveats(reader, table.entries.get("caveats")),
        )
    tensors = reader.table(entries.get("tensors"), "`tensors`")
    reader.keys(tensors, COMPONENTS, "`tensors`")
    rules = {
        component: RuleSet(
            read_rules(reader, tensors.entries.get(component)),
            parent.rules[component] if parent else None,
        )
        for component in COMPONENTS
    }
    config = reader.table(entries.get("config"), "`config`")
    reader.keys(config, _CONFIG_KEYS, "`config`")
    config_rules = read_config_rules(reader, config)
    nest = _texts(reader, config.entries.get("nest"), "`nest`", _NESTED)
    tokens = _texts(reader, entries.get("tokens"), "`tokens`", ("image", "pad"))
    requirements = read_requirements(reader, entries.get("require"))
    processor = reader.text(entries.get("processor"), "`processor`") or None
    if parent is not None:
        config_rules = parent.config_rules.under(config_rules)
    elif "extends" not in entries:
        for key in ("classes", "tensors"):
            reader.required(root, key, "a format")
        for component in COMPONENTS:
            if "tensors" in entries:
                reader.required(tensors, component, "`tensors`")
    reader.finish()
    own = MappingFile(document.name, document.sha256)
    if parent is not None:
        requirements = (*parent.requirements, *requirements)
        tokens, nest = {**parent.tokens, **tokens}, {**parent.nest, **nest}
        processor = processor or parent.processor
    return Format(
        name,
        classes,
        rules,
        config_rules,
        (own, *(parent.files if parent else ())),
        requirements=requirements,
        tokens=tokens,
        processor=processor,
        nest=nest,
    )
