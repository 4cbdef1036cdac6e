"""Rules made literal: loops run, prefixes joined, numbers computed, subtrees and globs resolved.

The rule that takes a tensor is, in this order, one that names it, a `drop` with a glob, and the
`move` with the longest prefix. So a format can move a whole tower and still drop one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.expressions import Environment
from xtuner2llava.mapping.names import below, join, matches, shortened
from xtuner2llava.mapping.rules import Block, Entry, Rule, Step

# The largest models have some 50,000 tensors; a loop over a hostile config ends here.
_MAX_STEPS = 200_000
# Of a checkpoint with few tensors, more rules than this are not worth the seconds they take.
_STEPS_OF_ANY, _STEPS_A_TENSOR = 20_000, 8


def expand(
    layers: Sequence[Sequence[Entry]], environment: Environment, names: Collection[str]
) -> list[Step]:
    """The steps for a checkpoint that has the tensors `names`.

    `layers` are the rules of a file, those of the file that it extends, and so on. A rule replaces
    those of later layers that make one of its targets or read one of its sources. Steps may still
    contradict each other or ask for tensors that are not there: `apply` checks that, together with
    the shapes.

    Raises `MappingError` with every expression that has no value here.
    """
    faults: list[Fault] = []
    present = frozenset(names)
    most = min(_MAX_STEPS, _STEPS_OF_ANY + _STEPS_A_TENSOR * len(present))
    named: list[Step] = []
    patterns: list[Step] = []
    made: set[str] = set()
    read: set[str] = set()
    own_moves: set[str] | None = None
    for entries in layers:
        own = []
        for step in Expansion(faults, most).steps(entries, environment):
            if step.rule.is_pattern:
                patterns.append(step)
            elif made.isdisjoint(step.targets) and read.isdisjoint(step.sources):
                own.append(step)
        if own_moves is None:
            own_moves = {step.sources[0] for step in patterns if step.verb == "move"} - {""}
        made.update(name for step in own for name in step.targets)
        read.update(name for step in own for name in step.sources)
        # What is not there need not be dropped: older checkpoints carry buffers, newer ones do not.
        named += (step for step in own if step.verb != "drop" or step.sources[0] in present)
    raise_faults(MappingError, shortened(faults))
    return named + _resolve(patterns, [n for n in names if n not in read], own_moves or ())


class Expansion:
    """At most `most` rules of one file, with loops run and numbers computed; adds to `faults`.

    Steps of `move`, and of `drop` with a glob, still stand for all the names they cover.
    """

    def __init__(self, faults: list[Fault], most: int = _MAX_STEPS) -> None:
        self._faults, self._most = faults, most
        self._rules = self._members = 0

    def steps(
        self,
        entries: Sequence[Entry],
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
                    self._count_rules(1, entry.where)
                    yield self._step(entry, environment, source, target)
                    continue
                rounds = self._rounds(entry, environment)
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

    def _rounds(self, block: Block, environment: Environment) -> list[Environment]:
        """The environment of each round of a block's loops; the last variable runs fastest."""
        rounds = [environment]
        for variable, times in block.loops.items():
            # A count may depend on the variables before it.
            counts = [times.integer(outer) for outer in rounds]
            self._count_rules(sum(counts), block.where)
            rounds = [
                {**outer, variable: number}
                for outer, count in zip(rounds, counts, strict=True)
                for number in range(count)
            ]
        return rounds

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

    def _count_rules(self, more: int, where: str) -> None:
        self._rules += more
        if self._rules > self._most:
            raise MappingError(f"its loops make more than {self._most:,} rules", where=where)


def _resolve(
    patterns: Sequence[Step], names: Sequence[str], expected: Collection[str]
) -> list[Step]:
    """A step for each of `names` that a glob drops or a prefix moves.

    A `move` of one of the `expected` prefixes that finds nothing stays as it is: its prefix is
    then a tensor that is missing. Moving all that is left, or what a parent file moves, may be
    moving nothing.
    """
    drops = [step for step in patterns if step.verb == "drop"]
    moves = [step for step in patterns if step.verb == "move"]
    moves.sort(key=lambda step: len(step.sources[0]), reverse=True)
    found: list[Step] = []
    idle = {step.sources[0]: step for step in reversed(moves) if step.sources[0] in expected}
    for name in names:
        step = next((step for step in drops if matches(step.sources[0], name)), None)
        if step is not None:
            found.append(Step(step.rule, (name,), ()))
            continue
        for step in moves:
            rest = below(name, step.sources[0])
            if rest is not None:
                idle.pop(step.sources[0], None)
                found.append(Step(step.rule, (name,), (join(step.targets[0], rest),)))
                break
    return found + list(idle.values())
