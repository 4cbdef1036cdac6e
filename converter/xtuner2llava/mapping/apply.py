"""Steps applied to lazy tensors: every source used once, every target made once, shapes checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.expand import Step
from xtuner2llava.mapping.fold import Folded, Suggestions, TensorFaults, fold, shortened, unnumbered
from xtuner2llava.tensors import (
    FLOAT32,
    Columns,
    Fill,
    LazyTensor,
    Normalize,
    Piece,
    Rows,
    Transpose,
    concat,
    deinterleave,
    split,
    unstack,
)


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

    `where` is the file that faults of no single rule are put down to. Raises `MappingError` with
    all faults: sources that are missing, unused or used twice; targets made twice; shapes that a
    rule does not fit.
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
            dropped.extend(Dropped(name, step.because, step.where) for name in step.sources)
        elif not absent:
            try:
                results = _results(step, [tensors[name] for name in step.sources])
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


def _results(step: Step, sources: Sequence[LazyTensor]) -> Sequence[LazyTensor]:
    """One tensor for each target. Raises `ValueError` where the shapes do not fit."""
    match step.verb:
        case "keep" | "rename" | "move":
            return sources
        case "split":
            return _split(step, sources[0])
        case "concat":
            return (concat(sources),)
        case "deinterleave":
            return deinterleave(sources[0], step.groups, step.numbers)
        case "unstack":
            members = unstack(sources[0], step.groups)
            if not step.numbers:
                return members
            return [part for member in members for part in _split(step, member)]
        case "transpose":
            return (Transpose(sources[0]),)
        case "normalize":
            return (Normalize(sources[0]),)
        case "resize":
            return (_resize(step, sources[0]),)
        case "fill":
            # No file says its dtype; a cast at the end of the plan gives it that of its neighbours.
            return (Fill(FLOAT32, step.numbers, step.value),)
    raise ValueError(f"`{step.verb}` makes no tensors")


def _split(step: Step, source: LazyTensor) -> list[LazyTensor]:
    if len(source.shape) <= step.dim or sum(step.numbers) != source.shape[step.dim]:
        what = "columns" if step.dim else "rows"
        raise ValueError(
            f"its shape is {list(source.shape)}, and {step.formula} = {list(step.numbers)} "
            f"makes {sum(step.numbers):,} {what}"
        )
    if step.dim == 0:
        return split(source, step.numbers)
    parts: list[LazyTensor] = []
    first = 0
    for size in step.numbers:
        parts.append(Columns(source, first, first + size))
        first += size
    return parts


def _resize(step: Step, source: LazyTensor) -> LazyTensor:
    rows = step.numbers[0]
    if not source.shape:
        raise ValueError("a scalar has no rows")
    if rows == source.rows:
        return source
    if rows < source.rows:
        if not step.lossy:
            raise ValueError(
                f"it has {source.rows:,} rows, and {step.formula} = [{rows}] would cut some; "
                "that needs `lossy: true`"
            )
        return Rows([Piece(source, 0, rows)])
    zeros = Fill(source.dtype, (rows - source.rows, *source.row_shape), 0.0)
    return Rows([Piece(source, 0, source.rows), Piece(zeros, 0, zeros.rows)])


def _missing(missing: Sequence[tuple[Step, str]], unused: Sequence[Folded]) -> list[Fault]:
    """Faults for sources that are not there, each with the unused name most like it."""
    meant = Suggestions({folded.template: str(folded) for folded in unused})
    faults = TensorFaults()
    for step, name in missing:
        near = meant.near(name)
        if step.verb == "move":
            what = "is the beginning of no tensor's name"
        else:
            what = f"is not in the checkpoint, `{step.verb}` needs it"
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
        faults.append(Fault(where, f"{folded} is in the checkpoint, and no rule takes it", advice))
    return shortened(faults)
