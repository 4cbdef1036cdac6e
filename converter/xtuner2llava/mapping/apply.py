"""Steps applied to lazy tensors: every source used once, every target made once, shapes checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.names import (
    Folded,
    Suggestions,
    TensorFaults,
    fold,
    shortened,
    unnumbered,
)
from xtuner2llava.mapping.rules import Step
from xtuner2llava.tensors import LazyTensor


@dataclass(frozen=True, slots=True)
class Origin:
    """What a target is made of: the verb, the source names, and the place of the rule."""

    verb: str
    sources: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source tensor that is left out, why, and by which rule."""

    name: str
    because: str
    where: str


@dataclass(frozen=True, slots=True)
class Applied:
    """Every target by name, in the order of the steps, with its origin; and what was left out."""

    outputs: dict[str, LazyTensor]
    origins: dict[str, Origin]
    dropped: tuple[Dropped, ...]


def apply(steps: Sequence[Step], tensors: Mapping[str, LazyTensor], *, where: str = "") -> Applied:
    """What `steps` make of `tensors`, without reading any data.

    `where` is the file of the faults that no single rule has. Raises `MappingError` with all
    faults: sources that are missing, unused or used twice; targets made twice; shapes that a rule
    does not fit.
    """
    faults = TensorFaults()
    outputs: dict[str, LazyTensor] = {}
    origins: dict[str, Origin] = {}
    dropped: list[Dropped] = []
    taken: dict[str, str] = {}
    missing: list[tuple[Step, str]] = []
    for step in steps:
        absent = [name for name in step.sources if name not in tensors]
        missing.extend((step, name) for name in absent)
        for name in step.sources:
            if name in taken and name not in absent:
                faults.add(step.where, name, f"is already taken by {taken[name]}")
            taken.setdefault(name, step.where)
        for name in step.targets:
            if not name:
                faults.add(step.where, step.sources[0], "would be left without a name")
            if name in origins:
                faults.add(step.where, name, f"is already made by {origins[name].where}")
            origins.setdefault(name, Origin(step.verb, step.sources, step.where))
        if step.verb == "drop":
            dropped.extend(Dropped(name, step.rule.because, step.where) for name in step.sources)
        elif not absent:
            try:
                results = step.make([tensors[name] for name in step.sources])
            except ValueError as error:
                subject = (step.sources or step.targets)[0]
                faults.add(step.where, subject, f"cannot be used by `{step.verb}`: {error}")
            else:
                for name, result in zip(step.targets, results, strict=True):
                    outputs.setdefault(name, result)
    unused = fold(name for name in tensors if name not in taken)
    everything = [*_missing(missing, unused), *faults.faults(), *_unused(unused, missing, where)]
    raise_faults(MappingError, everything)
    return Applied(outputs, origins, tuple(dropped))


def _missing(missing: Sequence[tuple[Step, str]], unused: Sequence[Folded]) -> list[Fault]:
    """Faults for sources that are not there, each with the unused name most like it."""
    meant = Suggestions({folded.template: str(folded) for folded in unused})
    faults = TensorFaults()
    for step, name in missing:
        near = meant.near(name)
        what = f"is not in the checkpoint, `{step.verb}` needs it"
        if step.verb == "move":
            what = "is not the beginning of a tensor's name"
        faults.add(step.where, name, what, f"Did you mean {near}?" if near else "")
    return faults.faults()


def _unused(
    unused: Sequence[Folded], missing: Sequence[tuple[Step, str]], where: str
) -> list[Fault]:
    wanted = Suggestions({unnumbered(name): step.where for step, name in missing})
    faults = []
    for folded in unused:
        near = wanted.near(folded.template)
        advice = "Write a rule for it, or `drop` it with a reason."
        if near:
            advice = f"{near} asks for a name like it."
        what = "is in the checkpoint, and no rule takes it"
        faults.append(Fault(f"{where}, {folded}", what, advice))
    return shortened(faults)
