"""Rules applied to lazy tensors: loops run, prefixes joined, subtrees and globs resolved.

The rule that takes a tensor is, in this order, one that names it, a `drop` with a glob, and the
`move` with the longest prefix. So a format can move a whole tower and still drop one tensor. Every
source is used once, every target is made once, and shapes are checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.expressions import Environment, Expression
from xtuner2llava.mapping.names import (
    Suggestions,
    TensorFaults,
    below,
    fold,
    join,
    matches,
    shortened,
    unnumbered,
)
from xtuner2llava.mapping.rules import Rule, RuleOrBlock, Step
from xtuner2llava.tensors.lazy import LazyTensor

# The largest models have some 50,000 tensors; a loop over a hostile config ends here.
_MAX_STEPS = 200_000
# Names that globs and prefixes are compared with, half a million a second.
_MAX_COMPARISONS = 10_000_000
# Of a checkpoint with few tensors, more rules than this are not worth the seconds they take.
_STEPS_OF_ANY, _STEPS_A_TENSOR = 20_000, 8


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
    """Every target by name, in the order of the rules, with its origin; and what was left out."""

    outputs: dict[str, LazyTensor]
    origins: dict[str, Origin]
    dropped: tuple[Dropped, ...]


def apply(
    layers: Sequence[Sequence[RuleOrBlock]],
    environment: Environment,
    tensors: Mapping[str, LazyTensor],
    *,
    where: str = "",
) -> Applied:
    """What rules make of `tensors`, without reading any data.

    `layers` are the rules of a file, those of the file that it extends, and so on. A rule replaces
    those of later layers that make one of its targets or read one of its sources. `where` is the
    file of the faults that no single rule has.

    Raises `MappingError` with every expression that has no value; else with all other faults:
    sources that are missing, unused or used twice; targets made twice; shapes that a rule does not
    fit.
    """
    steps = _expand(layers, environment, tensors)
    sources = {name for step in steps for name in step.sources}
    left = [name for name in tensors if name not in sources]
    meant = Suggestions({folded.template: str(folded) for folded in fold(left)})
    missing: dict[str, str] = {}
    faults = TensorFaults()
    outputs: dict[str, LazyTensor] = {}
    origins: dict[str, Origin] = {}
    dropped: list[Dropped] = []
    taken: dict[str, str] = {}
    for step in steps:
        rule, absent = step.rule, [name for name in step.sources if name not in tensors]
        for name in absent:
            near = meant.near(name)
            what = f"is not in the checkpoint, `{rule.verb}` needs it"
            if rule.verb == "move":
                what = "is not the beginning of a tensor's name"
            faults.add(rule.where, name, what, f"Did you mean {near}?" if near else "")
            missing[unnumbered(name)] = rule.where
        for name in step.sources:
            if name in taken and name not in absent:
                faults.add(rule.where, name, f"is already taken by {taken[name]}")
            taken.setdefault(name, rule.where)
        for name in step.targets:
            if not name:
                faults.add(rule.where, step.sources[0], "would be left without a name")
            if name in origins:
                faults.add(rule.where, name, f"is already made by {origins[name].where}")
            origins.setdefault(name, Origin(rule.verb, step.sources, rule.where))
        if rule.verb == "drop":
            dropped.extend(Dropped(name, rule.because, rule.where) for name in step.sources)
        elif not absent:
            try:
                made = step.make([tensors[name] for name in step.sources])
            except ValueError as error:
                subject = (step.sources or step.targets)[0]
                faults.add(rule.where, subject, f"cannot be used by `{rule.verb}`: {error}")
            else:
                for name, result in zip(step.targets, made, strict=True):
                    outputs.setdefault(name, result)
    raise_faults(MappingError, [*faults.faults(), *_unused(left, missing, where)])
    return Applied(outputs, origins, tuple(dropped))


def _unused(names: Iterable[str], missing: Mapping[str, str], where: str) -> list[Fault]:
    """A fault for each of `names`; `missing` are names that rules ask for, and by which rule."""
    faults, asking = TensorFaults(), Suggestions(missing)
    for name in names:
        near = asking.near(name)
        advice = "Write a rule for it, or `drop` it with a reason."
        if near:
            advice = f"{near} asks for a name like it."
        faults.add(where, name, "is in the checkpoint, and no rule takes it", advice)
    return faults.faults()


def _expand(
    layers: Sequence[Sequence[RuleOrBlock]], environment: Environment, names: Collection[str]
) -> list[Step]:
    """The steps that the rules come to. They may still contradict each other."""
    faults: list[Fault] = []
    most = min(_MAX_STEPS, _STEPS_OF_ANY + _STEPS_A_TENSOR * len(names))
    named: list[Step] = []
    patterns: list[Step] = []
    expected: set[str] = set()
    made: set[str] = set()
    read: set[str] = set()
    for depth, entries in enumerate(layers):
        steps = [*Expansion(faults, most).steps(entries, environment)]
        patterns += (step for step in steps if step.rule.is_pattern)
        if depth == 0:
            expected = {step.sources[0] for step in patterns if step.rule.verb == "move"} - {""}
        own = [
            step
            for step in steps
            if not step.rule.is_pattern
            and made.isdisjoint(step.targets)
            and read.isdisjoint(step.sources)
        ]
        made.update(name for step in own for name in step.targets)
        read.update(name for step in own for name in step.sources)
        # What is not there need not be dropped: older checkpoints carry buffers, newer ones do not.
        named += (step for step in own if step.rule.verb != "drop" or step.sources[0] in names)
    left = [name for name in names if name not in read]
    if len(patterns) * len(left) > _MAX_COMPARISONS:
        what = f"with its {len(patterns):,} globs and moves, {len(left):,} tensors take too long"
        faults.append(Fault(patterns[-1].rule.where, what, "Write one glob in place of several."))
    raise_faults(MappingError, shortened(faults))
    return named + _resolve(patterns, left, expected)


def _resolve(
    patterns: Sequence[Step], names: Sequence[str], expected: Collection[str]
) -> list[Step]:
    """A step for each of `names` that a glob drops or a prefix moves.

    A `move` of one of the `expected` prefixes that finds nothing stays as it is: its prefix is
    then a tensor that is missing. Moving all that is left, or what a parent file moves, may be
    moving nothing.
    """
    drops = [step for step in patterns if step.rule.verb == "drop"]
    moves = [step for step in patterns if step.rule.verb == "move"]
    moves.sort(key=lambda step: len(step.sources[0]), reverse=True)
    found: list[Step] = []
    idle = {step.sources[0]: step for step in reversed(moves) if step.sources[0] in expected}
    for name in names:
        dropping = next((step for step in drops if matches(step.sources[0], name)), None)
        if dropping is not None:
            found.append(Step(dropping.rule, (name,), ()))
            continue
        for step in moves:
            rest = below(name, step.sources[0])
            if rest is not None:
                idle.pop(step.sources[0], None)
                found.append(Step(step.rule, (name,), (join(step.targets[0], rest),)))
                break
    return found + list(idle.values())


class Expansion:
    """At most `most` rules of one file, with loops run and numbers computed; adds to `faults`.

    Steps of `move`, and of `drop` with a glob, still stand for all the names they cover.
    """

    def __init__(self, faults: list[Fault], most: int = _MAX_STEPS) -> None:
        self._faults, self._most = faults, most
        self._rules = self._members = 0

    def steps(
        self,
        entries: Iterable[RuleOrBlock],
        environment: Environment,
        source: str = "",
        target: str = "",
    ) -> Iterator[Step]:
        """`source` and `target` are the prefixes of the blocks around `entries`."""
        for entry in entries:
            try:
                if entry.condition is not None and not entry.condition.condition(environment):
                    continue
                if isinstance(entry, Rule):
                    self._count(1, entry.where)
                    yield self._step(entry, environment, source, target)
                    continue
                rounds = [*self._rounds([*entry.loops.items()], environment, entry.where)]
            except MappingError as error:
                self._faults.extend(error.faults)
                continue
            for inner in rounds:
                yield from self.steps(
                    entry.rules,
                    inner,
                    join(source, entry.source.render(inner)),
                    join(target, entry.target.render(inner)),
                )

    def _rounds(
        self, loops: Sequence[tuple[str, Expression]], environment: Environment, where: str
    ) -> Iterator[Environment]:
        """The environment of each round of a block's loops; the last variable runs fastest."""
        if not loops:
            yield environment
            return
        variable, times = loops[0]
        count = times.integer(environment)
        self._count(count, where)
        for number in range(count):
            yield from self._rounds(loops[1:], {**environment, variable: number}, where)

    def _step(self, rule: Rule, environment: Environment, source: str, target: str) -> Step:
        numbers = tuple(number.integer(environment) for number in rule.numbers)
        count = rule.count.integer(environment) if rule.count else 0
        members = [environment]
        if rule.variable is not None:
            self._members += count * len(rule.targets)
            if self._members > _MAX_STEPS:
                raise MappingError(f"makes more than {_MAX_STEPS:,} tensors", where=rule.where)
            members = [{**environment, rule.variable: number} for number in range(count)]
        return Step(
            rule,
            tuple(join(source, name.render(environment)) for name in rule.sources),
            tuple(join(target, name.render(member)) for member in members for name in rule.targets),
            numbers,
            count,
        )

    def _count(self, more: int, where: str) -> None:
        self._rules += more
        if self._rules > self._most:
            raise MappingError(f"its loops make more than {self._most:,} rules", where=where)
