"""What an input is, as data: `xtuner2llava inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from xtuner2llava.errors import ConversionError, Fault
from xtuner2llava.llava.projector import depth_of
from xtuner2llava.llava.vision_tower_name import KEY as VISION_TOWER_KEY
from xtuner2llava.llm_config import trained_llm_config
from xtuner2llava.mapping import Catalogue, Family
from xtuner2llava.options import SourceOptions
from xtuner2llava.planning import make_plan
from xtuner2llava.planning.language_model import choose_family
from xtuner2llava.sources import Checkpoint, Part
from xtuner2llava.sources.json_file import Json
from xtuner2llava.target import Target, prospect
from xtuner2llava.verdict import Verdict

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
class Inspection:
    """What was found; nothing but headers and small files was read."""

    layout: str
    iteration: int | None
    parts: Mapping[str, PartSummary]
    llm_architectures: tuple[str, ...]
    recipe: Mapping[str, Json]
    targets: tuple[Target, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "layout": self.layout,
            "iteration": self.iteration,
            "parts": {
                name: {
                    "weights": part.origin,
                    "trained": part.trained,
                    "base": part.base,
                    "tensors": part.tensors,
                    "parameters": part.parameters,
                    "bytes": part.nbytes,
                    "dtypes": list(part.dtypes),
                }
                for name, part in self.parts.items()
            },
            "llm_architectures": list(self.llm_architectures),
            "xtuner_config": dict(self.recipe),
            "targets": [target.to_dict() for target in self.targets],
            "notes": list(self.notes),
        }


def inspect_checkpoint(checkpoint: Checkpoint, options: SourceOptions) -> Inspection:
    """What `checkpoint` is, and what it can become with the base models that are at hand."""
    contents = checkpoint.contents
    config = checkpoint.llm.config
    targets = [_target(checkpoint, options, name) for name in Catalogue.shipped().formats]
    recipe = checkpoint.recipe
    return Inspection(
        layout=contents.layout,
        iteration=contents.iteration,
        parts={
            "llm": _summary(checkpoint.llm),
            "visual_encoder": _summary(checkpoint.visual_encoder),
            "projector": _summary(checkpoint.projector),
        },
        llm_architectures=config.architectures if config else (),
        recipe={used.name: used.value for used in recipe.used} if recipe else {},
        targets=tuple(targets),
        notes=tuple(note for note in checkpoint.notes if note not in checkpoint.inexact),
    )


def _target(checkpoint: Checkpoint, options: SourceOptions, format_name: str) -> Target:
    """What becomes of `checkpoint` in a format.

    That the tower has no name yet makes nothing impossible: the user gives one to convert.
    """
    unnamed: tuple[str, ...] = ()
    try:
        try:
            plan = make_plan(checkpoint, options.with_format(format_name))
        except ConversionError as error:
            lacking = [fault for fault in error.faults if fault.where == VISION_TOWER_KEY]
            if not lacking or options.vision_tower_name is not None:
                raise
            unnamed = tuple(f"{fault.what}: {fault.advice}" for fault in lacking)
            named = replace(options, vision_tower_name=_ANY_NAME)
            plan = make_plan(checkpoint, named.with_format(format_name))
    except ConversionError as error:
        pending = tuple(fault for fault in error.faults if fault in checkpoint.pending)
        if len(pending) == len(error.faults):
            return _without_weights(checkpoint, options, format_name)
        faults = tuple(fault for fault in error.faults if fault not in pending) or error.faults
        return Target(format_name, None, Verdict.of(faults=faults), (), faults)
    notes = (note for note in plan.notes if note not in checkpoint.notes)
    caveats = (*checkpoint.inexact, *notes, *unnamed)
    return Target(format_name, plan.architecture, plan.verdict, caveats, ())


def _without_weights(checkpoint: Checkpoint, options: SourceOptions, format_name: str) -> Target:
    """What the configs alone say, while weights of a base model are still on the Hub."""
    catalogue, llm = Catalogue.shipped(), checkpoint.llm.config
    family: Family | None = None
    config: dict[str, Json] | None = None
    faults: tuple[Fault, ...] = ()
    try:
        config = trained_llm_config(llm, checkpoint.recipe) if llm is not None else None
        names = checkpoint.llm.tensors.keys() or None
        family = choose_family(catalogue, options.mapping, config or {}, names)
    except ConversionError as error:
        faults = error.faults
    found = prospect(
        catalogue.formats[format_name],
        family,
        config,
        depth=depth_of(checkpoint.projector.tensors),
        inexact=checkpoint.inexact,
        faults=faults,
    )
    if not found.is_possible:
        return found
    unseen = (f"By the configs alone: {f.where}: {f.what}" for f in checkpoint.pending)
    return replace(found, caveats=(*found.caveats, *unseen))


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
