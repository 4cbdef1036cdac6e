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
from xtuner2llava.tokenizers import MadeFile
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
class Tie:
    """A tensor that is not written, because it must be the same as another that is."""

    name: str
    tensor: LazyTensor
    same_as: str
    other: LazyTensor


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
    """What a conversion will write. Nothing of it has been read but headers and small files.

    `tensors` stand in the order of the output; `files` are copied byte for byte under their own
    names, and `made_files` are made when they are written. `processor` is the class of transformers
    that prepares images and texts, where the format has one. `notes` are for the user and for
    conversion.json, without paths of this machine.
    """

    checkpoint: Checkpoint
    mapping: MappingInUse
    dtype: str
    tensors: tuple[PlannedTensor, ...]
    ties: tuple[Tie, ...]
    dropped: tuple[tuple[str, Dropped], ...]
    config: Mapping[str, Json]
    generation_config: Mapping[str, Json]
    token_ids: TokenIds
    chat: Chat
    files: tuple[Path, ...]
    made_files: Mapping[str, MadeFile]
    processor: str | None
    shards: ShardPlan
    folder_name: FolderName
    verdict: Fidelity
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
    def small_files(self) -> tuple[str, ...]:
        """The names of the tokenizer's and the processor's files, copied or made."""
        return tuple(sorted([*(path.name for path in self.files), *self.made_files]))

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
            **self.verdict.to_dict(),
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
            "copied_files": [path.name for path in self.files],
            "made_files": list(self.made_files),
            "chat": {"template": self.chat.template, "stop_words": list(self.chat.stop_words)},
            "notes": list(self.notes),
        }
