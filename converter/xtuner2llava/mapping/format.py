"""Formats: where the LLM, the projector and the tower go, and the config keys that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.apply import Applied, apply
from xtuner2llava.mapping.caveats import Caveat, Limit, limits
from xtuner2llava.mapping.config_rules import (
    ConfigRules,
    Requirements,
    failures,
    read_config_rules,
)
from xtuner2llava.mapping.detect import Refusal
from xtuner2llava.mapping.expressions import Environment
from xtuner2llava.mapping.rules import RuleOrBlock, read_rules
from xtuner2llava.mapping.schema import ABSENT, GIVEN, Reader, key
from xtuner2llava.mapping.yaml import Document, Node
from xtuner2llava.tensors.lazy import LazyTensor

COMPONENTS = ("llm", "projector", "visual_encoder")


def model_name(path: Path) -> str:
    """What LLaVA calls a model in `path`: for `checkpoint-…`, the folder above counts too.

    `get_model_name_from_path` in `llava/mm_utils.py` of both. A snapshot in the Hub's cache is
    loaded by its repo id.
    """
    path = path.absolute()
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.rpartition("--")[2]
    if path.name.startswith("checkpoint-"):
        return f"{path.parent.name}_{path.name}"
    return path.name


@dataclass(frozen=True, slots=True)
class FolderName:
    """What a folder's name must contain to be loaded as a class, and what it must not.

    Compared in lower case, as haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT do in
    `llava/model/builder.py`.
    """

    needs: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()

    def reasons(self, name: str) -> str:
        """Why LLaVA loads another class by `name`: "lacks 'qwen'"; empty where it does not."""
        lacks = [f"lacks '{word}'" for word in self.needs if word not in name.lower()]
        wrong = [f"contains '{word}'" for word in self.avoid if word in name.lower()]
        return " and ".join([*lacks, *wrong])

    def suggest(self, candidate: str) -> str:
        """`candidate` if it works, or the plainest name that does."""
        return candidate if not self.reasons(candidate) else "-".join(self.needs)


@dataclass(frozen=True, slots=True)
class FormatClass:
    """What a plain class is called in a format, and what its config must hold there."""

    TITLE: ClassVar = "a class"
    architecture: str
    model_type: str
    requirements: Requirements = field(metadata=key("require"), default=())
    folder_name: FolderName = field(default_factory=FolderName)
    caveats: tuple[Caveat, ...] = ()


def _read_tensors(reader: Reader, node: Node) -> Mapping[str, tuple[RuleOrBlock, ...]]:
    table = reader.table(node, "`tensors`", COMPONENTS)
    for name in COMPONENTS:
        if name not in table and node is not ABSENT:
            reader.fault(node.line, f"`tensors` needs `{name}`")
    return {name: read_rules(reader, table.get(name, ABSENT)) for name in COMPONENTS}


_CONFIG = partial(read_config_rules, allowed=("keep", "derive", "set", "nest"))
_TOKENS = partial(Reader.texts, what="`tokens`", allowed=("image", "pad"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """An output format."""

    name: str = field(metadata=key("format"))
    classes: Mapping[str, FormatClass]
    rules: Annotated[Mapping[str, tuple[RuleOrBlock, ...]], _read_tensors] = field(
        metadata=key("tensors")
    )
    """By component, one of `COMPONENTS`."""
    config_rules: Annotated[ConfigRules, _CONFIG] = field(
        metadata=key("config"), default=ConfigRules()
    )
    requirements: Requirements = field(metadata=key("require"), default=())
    tokens: Annotated[Mapping[str, str], _TOKENS] = field(default_factory=dict)
    """Tokens that the tokenizer must have, by what they are for: `image` and `pad`."""
    processor: str | None = None
    """The class of transformers that prepares texts and images together, if there is one."""
    file: Document = field(metadata=GIVEN)
    refused: Mapping[str, Fault] = field(metadata=GIVEN, default_factory=dict)
    """Plain classes that it cannot have, each with the reason."""

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

    def class_limits(self, name: str, values: Mapping[str, object]) -> list[Limit]:
        """The caveats of the plain class `name` here that hold for its config `values`."""
        return limits(self.classes[name].caveats, values)

    def apply(
        self, component: str, environment: Environment, tensors: Mapping[str, LazyTensor]
    ) -> Applied:
        """The tensors of a component under the names that they have here; see `apply`."""
        return apply([self.rules[component]], environment, tensors, where=self.file.name)

    def config(self, environment: Environment) -> dict[str, object]:
        """The config keys that it adds to those of the plain class.

        `environment` has the keys of the plain class, and the names that the file uses besides:
        `vision` (the tower's config, and its `name`), `xtuner` (`visual_select_layer`,
        `image_aspect_ratio`), `projector_type`, `projector.depth`, `writes.visual_encoder`, and
        `tokens` (the ids of the format's tokens). Raises `MappingError` with all that has no
        value, and with every requirement of the format that does not hold.
        """
        faults = failures(self.requirements, environment)
        values = self.config_rules.make(environment, faults)
        raise_faults(MappingError, faults)
        return values


def read_format(document: Document, refusals: Mapping[str, Mapping[str, Refusal]]) -> Format:
    """The format in a file. Raises `MappingError` with all faults of the file.

    `refusals` are, by format, of the plain classes that it cannot have.
    """
    reader = Reader(document)
    found = reader.root(Format, "a format", file=document)
    reader.finish()
    refused = refusals.get(found.name, {})
    return replace(found, refused={name: one.fault({}) for name, one in refused.items()})
