"""The plan: everything about the output, known from headers alone, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.mapping import Dropped, FolderName, MappingFile, PromptTemplate
from xtuner2llava.planning.fidelity import Fidelity
from xtuner2llava.planning.generation import TokenIds
from xtuner2llava.sources import Checkpoint
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.writing.shards import ShardPlan


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output: what it is, and what it is made of.

    `sources` are the names of what it is made of, in its component of the checkpoint; `rule` is
    the verb and place of the rule that makes it; `how` is "copy" where bytes pass unchanged, "cast
    from float32" or "compute".
    """

    name: str
    component: str
    tensor: LazyTensor
    sources: tuple[str, ...]
    rule: str
    how: str


@dataclass(frozen=True, slots=True)
class MappingInUse:
    """The mapping in use: the family, the plain class it becomes, the format, and their files."""

    family: str
    target_class: str
    format: str
    files: tuple[MappingFile, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """How a conversation was put into text in training; `prompt` is None where that is unknown."""

    prompt: PromptTemplate | None
    stop_words: tuple[str, ...]

    @property
    def template(self) -> str | None:
        """XTuner's name for the prompt template, if it has one."""
        return self.prompt.name if self.prompt is not None else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will write, known from headers and small files.

    `tensors` are in the order of the output. `files` are all other files of the output by name;
    `metadata.with_metadata` adds the model card and the record. Of the tokenizer's and the
    processor's, `copied_files` are the base models' own, and `made_files` are edited or new.
    `processor` is the class of transformers that prepares images and texts, where the format has
    one. `notes` are for the user and for the record, without paths of this machine.
    """

    checkpoint: Checkpoint
    mapping: MappingInUse
    dtype: str
    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[tuple[str, Dropped], ...]
    config: Mapping[str, Json]
    generation_config: Mapping[str, Json]
    token_ids: TokenIds
    chat: Chat
    files: Mapping[str, bytes]
    copied_files: tuple[Path, ...]
    made_files: tuple[str, ...]
    processor: str | None
    shards: ShardPlan
    folder_name: FolderName
    fidelity: Fidelity
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        found = self.config["architectures"]
        return str(found[0]) if isinstance(found, list) else ""

    @property
    def suggested_name(self) -> str:
        """A folder name under which LLaVA finds the right class, after the base LLM's."""
        base = Path(self.checkpoint.llm.name or "").name
        name = self.folder_name.suggest([f"llava-{base}-xtuner".lower()] if base else [])
        return name or "llava"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(planned.tensor.nbytes for planned in self.tensors)

    def to_dict(self) -> dict[str, Json]:
        """The whole plan as JSON: every tensor with its shape, dtype, sources and rule."""
        checkpoint = self.checkpoint
        parts = {
            "llm": checkpoint.llm,
            "visual_encoder": checkpoint.visual_encoder,
            "projector": checkpoint.projector,
        }
        shard_of = {e.name: s.filename for s in self.shards.shards for e in s.entries}
        return {
            "checkpoint": str(checkpoint.artifact.path),
            "layout": checkpoint.artifact.layout,
            "parts": {name: part.origin for name, part in parts.items()},
            "family": self.mapping.family,
            "becomes": self.mapping.target_class,
            "format": self.mapping.format,
            "architecture": self.architecture,
            **self.fidelity.to_dict(),
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "shards": [{"file": s.filename, "bytes": s.size} for s in self.shards.shards],
            "tensors": [
                {
                    "name": planned.name,
                    "shape": list(planned.tensor.shape),
                    "dtype": planned.tensor.dtype.name,
                    "file": shard_of[planned.name],
                    "how": planned.how,
                    "component": planned.component,
                    "sources": list(planned.sources),
                    "rule": planned.rule,
                }
                for planned in self.tensors
            ],
            "dropped": [
                {"component": component, "name": d.name, "because": d.because}
                for component, d in self.dropped
            ],
            "config": dict(self.config),
            "generation_config": dict(self.generation_config),
            "copied_files": [path.name for path in self.copied_files],
            "made_files": list(self.made_files),
            "chat": {"template": self.chat.template, "stop_words": list(self.chat.stop_words)},
            "notes": list(self.notes),
        }
