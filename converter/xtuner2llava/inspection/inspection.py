"""What an input is, a checkpoint or a config before training, as data: `xtuner2llava inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from xtuner2llava.errors import ConversionError, Fault
from xtuner2llava.inspection.token_advice import Advice, TokenAdvice
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.options import InspectOptions
from xtuner2llava.planning.plan import Fidelity
from xtuner2llava.planning.planner import Assessment
from xtuner2llava.planning.vision_tower import KEY as VISION_TOWER_KEY
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.sources.part import Part
from xtuner2llava.storage.json_file import Json

_ANY_NAME = "openai/any"


@dataclass(frozen=True, slots=True)
class PartSummary:
    """One part of the model in numbers; `nbytes` as stored, `dtypes` by number of elements."""

    origin: str
    trained: bool
    base: str | None
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: the name that the training recorded, and the folder that is read."""

    recorded: str | None
    folder: str | None


@dataclass(frozen=True, slots=True)
class TargetFormat:
    """What an input can become in a format: its class there, or the reasons why it cannot.

    Where nothing but an option is missing, `needs` names it, `faults` say why, and `otherwise` is
    the verdict once it is given.
    """

    format: str
    architecture: str | None
    fidelity: Fidelity
    caveats: tuple[str, ...]
    faults: tuple[Fault, ...]
    needs: str | None = None
    otherwise: Fidelity | None = None

    @property
    def is_possible(self) -> bool:
        return self.fidelity.is_possible

    def __str__(self) -> str:
        """One line, without caveats and faults."""
        if self.needs is not None:
            return f"{self.otherwise} once {self.needs} is given, as {self.architecture}"
        become = f", as {self.architecture}" if self.is_possible else ""
        return f"{self.fidelity}{become}"

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "format": self.format,
            "architecture": self.architecture,
            "possible": self.is_possible,
            **self.fidelity.to_dict(),
            "needs": self.needs,
            "otherwise": None if self.otherwise is None else self.otherwise.to_dict(),
            "caveats": list(self.caveats),
            "faults": [str(fault) for fault in self.faults],
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found; nothing but headers and small files was read.

    Of a config before training, `advice` are sentences for the user, and `lines` what should be
    added to the config.
    """

    layout: str
    iteration: int | None
    parts: Mapping[str, PartSummary]
    bases: Mapping[str, Base]
    llm_architectures: tuple[str, ...]
    family: str | None
    training_config: Mapping[str, Json]
    targets: tuple[TargetFormat, ...]
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def is_possible(self) -> bool:
        """Whether at least one format is."""
        return any(target.is_possible for target in self.targets)

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        values = asdict(self, dict_factory=_as_json)
        return {**values, "targets": [target.to_dict() for target in self.targets]}


def _as_json(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    names = {"training_config": "xtuner_config", "origin": "weights", "nbytes": "bytes"}
    return {names.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in items}


def inspect_checkpoint(checkpoint: Checkpoint, options: InspectOptions) -> Inspection:
    """What `checkpoint` is, and what it can become with the base models that are here."""
    config, training_config = checkpoint.llm.config, checkpoint.training_config
    formats = [options.with_format(name) for name in Catalogue.shipped().formats]
    found = Assessment(checkpoint, formats[0])  # What holds of the checkpoint is the same for all.
    assessments = [found, *(Assessment(checkpoint, each, found) for each in formats[1:])]
    parts = {"llm": checkpoint.llm, "visual_encoder": checkpoint.visual_encoder}
    folders = {name: (part.name, part.folder) for name, part in parts.items()}
    tokenizer = found.known(lambda: found.base_tokenizer[0].folder)
    folders["tokenizer"] = (checkpoint.training_data.tokenizer.path, tokenizer)
    advice = list(_advice(checkpoint, found)) if checkpoint.before_training else []
    return Inspection(
        layout=checkpoint.artifact.layout,
        iteration=checkpoint.artifact.iteration,
        parts={name: _summary(part) for name, part in checkpoint.parts.items()},
        bases={
            part: Base(name, None if folder is None else str(folder))
            for part, (name, folder) in folders.items()
        },
        llm_architectures=config.architectures if config else (),
        family=found.known(lambda: found.family.name),
        training_config=training_config.used if training_config else {},
        targets=tuple(_target(checkpoint, options, each) for each in assessments),
        notes=tuple(note for note in _notes(checkpoint) if note not in checkpoint.inexact),
        advice=tuple(sentence for sentence, _ in advice),
        lines=tuple(line for _, line in advice if line is not None),
    )


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What holds for every target."""
    training_config = checkpoint.training_config
    return (*checkpoint.notes, *(training_config.notes if training_config is not None else ()))


def _target(checkpoint: Checkpoint, options: InspectOptions, found: Assessment) -> TargetFormat:
    """What becomes of `checkpoint` in a format, by its assessment.

    Where only the tower's name is at fault, the rest is judged as if the user had given one.
    """
    if not found.faults:
        unseen = (f"By the configs alone: {f.where}: {f.what}" for f in checkpoint.pending)
        said = _notes(checkpoint)
        notes = (note for note in found.found.notes if note not in said)
        caveats = (*checkpoint.inexact, *notes, *unseen)
        architecture = found.described.architecture
        return TargetFormat(found.format.name, architecture, found.fidelity, caveats, ())
    if options.vision_tower_name is None and {f.where for f in found.faults} == {VISION_TOWER_KEY}:
        named = replace(options, vision_tower_name=_ANY_NAME)
        other = _target(
            checkpoint, named, Assessment(checkpoint, named.with_format(found.format.name), found)
        )
        if other.is_possible:
            return replace(
                other,
                fidelity=found.fidelity,
                faults=found.faults,
                needs="--vision-tower-name",
                otherwise=other.fidelity,
            )
    return TargetFormat(found.format.name, None, found.fidelity, (), found.faults)


def _advice(checkpoint: Checkpoint, found: Assessment) -> Iterable[Advice]:
    """What to change in a config before it trains; nothing where its LLM is not known."""
    with suppress(ConversionError):
        advice = TokenAdvice(
            checkpoint.training_data,
            found.family,
            found.base_tokenizer[0],
            found.tokenizer,
            found.catalogue.stop_words,
        )
        generation = found.known(lambda: found.base_generation) or {}
        return advice.all(generation, found.llm_config)
    return ()


def _summary(part: Part) -> PartSummary:
    elements: Counter[str] = Counter()
    for tensor in part.tensors.values():
        elements[tensor.stored_dtype.name] += math.prod(tensor.shape)
    return PartSummary(
        origin=part.origin,
        trained=part.trained,
        base=part.name,
        tensors=len(part.tensors),
        parameters=sum(elements.values()),
        nbytes=sum(math.prod(t.shape) * t.stored_dtype.itemsize for t in part.tensors.values()),
        dtypes=tuple(name for name, _ in elements.most_common()),
    )
