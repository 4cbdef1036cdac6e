"""The plan: everything about the output, known from headers alone, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.apply import Dropped
from xtuner2llava.mapping.caveats import Limit
from xtuner2llava.mapping.family import PromptTemplate
from xtuner2llava.mapping.format import FolderName
from xtuner2llava.mapping.yaml import Document
from xtuner2llava.planning.config import TokenIds
from xtuner2llava.planning.redaction import redact_name
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.storage.json_file import Json, items
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.writing.shards import ShardPlan

Kind = Literal["exact", "exact_up_to", "exact_if_right", "not_exact", "not_possible"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a target is to what was trained.

    `exact` is the trained function, but for rounding to the dtype that is written. `tokens` is the
    length of a sequence, images counted as their patches, within which it is exact; None without
    such a limit. `transformers` are ranges of versions, all of which the one that loads it must be
    in. `if_right` is what all of this depends on, where only the user says so: a mapping of their
    own, or a family that they named and that does not match the LLM.
    """

    kind: Kind
    tokens: int | None = None
    transformers: tuple[str, ...] = ()
    if_right: str | None = None

    @classmethod
    def of(cls, limits: Sequence[Limit] = (), *, inexact: Sequence[str] = ()) -> Fidelity:
        """That of a target with these caveats; `inexact` are reasons why it is only near."""
        if inexact or not all(limit.is_bounded for limit in limits):
            return cls("not_exact")
        tokens = min((x.tokens for x in limits if x.tokens is not None), default=None)
        ranges = dict.fromkeys(x.transformers for x in limits if x.transformers is not None)
        if_right = next((x.if_right for x in limits if x.if_right is not None), None)
        kind: Kind = "exact" if tokens is None else "exact_up_to"
        return cls("exact_if_right" if if_right else kind, tokens, tuple(ranges), if_right)

    @property
    def is_possible(self) -> bool:
        return self.kind != "not_possible"

    def __str__(self) -> str:
        if self.kind == "not_possible":
            return "not possible, because"
        if self.kind == "not_exact":
            return "possible, not exact"
        up_to = "" if self.tokens is None else f" up to {self.tokens} tokens"
        versions = f" with transformers {', '.join(self.transformers)}" if self.transformers else ""
        if self.if_right is None:
            return f"exact{up_to}{versions}"
        return f"exact{up_to}{versions} if {self.if_right} is right; its logits were not compared"

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON, for a report on the target."""
        return {
            "verdict": self.kind,
            "exact_up_to": self.tokens,
            "transformers": list(self.transformers),
            "if_right": self.if_right,
        }


class Findings:
    """Faults and notes for the user, in the order in which planning finds them; each note once."""

    def __init__(self, faults: Iterable[Fault] = (), notes: Iterable[str] = ()) -> None:
        self.faults = list(faults)
        self.notes = dict.fromkeys(notes)

    def note(self, *sentences: str | None) -> None:
        self.notes.update(dict.fromkeys(text for text in sentences if text is not None))


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
    files: tuple[Document, ...]


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
        return str(items(self.config, "architectures")[0])

    @property
    def suggested_name(self) -> str:
        """A folder name under which LLaVA finds the right class, after the base LLM's."""
        # It stands in lines of code and commands.
        base = re.sub(r"[^\w.-]+", "-", Path(redact_name(self.checkpoint.llm.name or "")).name)
        name = self.folder_name.suggest(f"llava-{base}-xtuner".lower() if base else "")
        return name or "llava"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(planned.tensor.nbytes for planned in self.tensors)

    def to_dict(self) -> dict[str, Json]:
        """The whole plan as JSON: every tensor with its shape, dtype, sources and rule."""
        checkpoint = self.checkpoint
        shard_of = {e.name: s.filename for s in self.shards.shards for e in s.entries}
        return {
            "checkpoint": str(checkpoint.artifact.path),
            "layout": checkpoint.artifact.layout,
            "parts": {name: part.origin for name, part in checkpoint.parts.items()},
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
