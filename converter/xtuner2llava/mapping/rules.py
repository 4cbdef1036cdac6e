"""The rules of the language: one verb each, in blocks that give prefixes and loops.

`keep` and `rename` hold many names; each becomes a `Rule` of its own, with its own line, so that
a child file can replace one of them and an error can point at one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Annotated, Any, NamedTuple, TypeAlias

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.expressions import Expression
from xtuner2llava.mapping.names import TextTemplate, advice_for, join
from xtuner2llava.mapping.schema import ABSENT, Reader
from xtuner2llava.mapping.yaml import Node
from xtuner2llava.tensors.computed import Columns, Fill, Normalize, Transpose
from xtuner2llava.tensors.dtype import FLOAT32
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.rows import Piece, Rows, concat, deinterleave, split, unstack

_Names: TypeAlias = tuple[TextTemplate, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one verb says, names still with placeholders and numbers still as expressions.

    `numbers` are the rows of each part (split, unstack), the rows of each slot (deinterleave), the
    rows (resize), or the shape (fill, shapes). `count` is that of the groups (deinterleave), or of
    the stacked tensors (unstack), which the `variable` in the targets numbers.
    """

    verb: str
    where: str
    sources: _Names = ()
    targets: _Names = ()
    numbers: tuple[Expression, ...] = ()
    count: Expression | None = None
    variable: str | None = None
    dim: int = 0
    value: float = 0.0
    lossy: bool = False
    because: str = ""
    condition: Expression | None = None

    @property
    def formulas(self) -> tuple[str, ...]:
        """`numbers` as written."""
        return tuple(number.text for number in self.numbers)

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for all names that a prefix or a glob covers."""
        return self.verb == "move" or (self.verb == "drop" and "*" in self.sources[0].text)


@dataclass(frozen=True, slots=True)
class RuleBlock:
    """Rules that share loops, a prefix on either side, and a condition."""

    where: str
    loops: Mapping[str, Expression]
    source: TextTemplate
    target: TextTemplate
    rules: tuple[RuleOrBlock, ...]
    condition: Expression | None = None


RuleOrBlock: TypeAlias = Rule | RuleBlock


@dataclass(frozen=True, slots=True)
class Step:
    """A rule for literal tensor names, with the values of its `numbers` and its `count`."""

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    count: int = 0

    def make(self, sources: Sequence[LazyTensor]) -> Sequence[LazyTensor]:
        """One tensor for each target. Raises `ValueError` where the shapes do not fit."""
        match self.rule.verb:
            case "keep" | "rename" | "move":
                return sources
            case "split":
                return _split(self, sources[0])
            case "concat":
                return [concat(sources)]
            case "deinterleave":
                return deinterleave(sources[0], self.count, self.numbers)
            case "unstack":
                members = unstack(sources[0], self.count)
                parts = (_split(self, one) if self.numbers else [one] for one in members)
                return [*chain.from_iterable(parts)]
            case "transpose":
                return [Transpose(sources[0])]
            case "normalize":
                return [Normalize(sources[0])]
            case "resize":
                return [_resize(self, sources[0])]
            case "fill":
                # No file says its dtype; a cast at the end of the plan gives it its neighbours'.
                return [Fill(FLOAT32, self.numbers, self.rule.value)]
        return ()


def _split(step: Step, source: LazyTensor) -> Sequence[LazyTensor]:
    dim = step.rule.dim
    if len(source.shape) <= dim or sum(step.numbers) != source.shape[dim]:
        raise ValueError(
            f"its shape is {list(source.shape)}, and [{', '.join(step.rule.formulas)}] = "
            f"{list(step.numbers)} makes {sum(step.numbers):,} {'columns' if dim else 'rows'}"
        )
    if dim == 0:
        return split(source, step.numbers)
    ends = zip(accumulate(step.numbers), step.numbers, strict=True)
    return [Columns(source, end - size, end) for end, size in ends]


def _resize(step: Step, source: LazyTensor) -> LazyTensor:
    (rows,) = step.numbers
    if not source.shape:
        raise ValueError("a scalar has no rows")
    if rows == source.rows:
        return source
    if rows > source.rows:
        zeros = Fill(source.dtype, (rows - source.rows, *source.row_shape), 0.0)
        return Rows([Piece(source, 0, source.rows), Piece(zeros, 0, zeros.rows)])
    if not step.rule.lossy:
        raise ValueError(
            f"it has {source.rows:,} rows, and [{step.rule.formulas[0]}] = [{rows}] would cut "
            "some; that needs `lossy: true`"
        )
    return Rows([Piece(source, 0, rows)])


def _name(reader: Reader, node: Node, *, glob: bool = False) -> _Names:
    return (reader.name(reader.plain(str, node, "a tensor name"), node.line, glob=glob),)


def _prefix(reader: Reader, node: Node) -> _Names:
    """The beginning of names, which may be empty."""
    return (reader.name("", node.line),) if node.value == "" else _name(reader, node)


def _names(reader: Reader, node: Node) -> _Names:
    if node.value == []:
        reader.fault(node.line, "a list of names is empty")
    items = reader.plain(list, node, "the value of `into` or `concat`")
    return tuple(name for item in items for name in _name(reader, item))


def _name_or_names(reader: Reader, node: Node) -> _Names:
    return (_names if isinstance(node.value, list) else _name)(reader, node)


def _rows(reader: Reader, node: Node) -> tuple[Expression, ...]:
    return (reader.expression(node, "`rows`"),)


def _dim(reader: Reader, node: Node) -> int:
    if type(node.value) is int and node.value in (0, 1):
        return node.value
    reader.fault(node.line, "`dim` is 0 (rows) or 1 (columns)")
    return 0


class _Verb(NamedTuple):
    """How its own key is read, and `into`, and which other keys it has.

    Those that may be left out end in a question mark.
    """

    read: Callable[[Reader, Node], _Names] = _name
    into: Callable[[Reader, Node], _Names] | None = None
    keys: tuple[str, ...] = ()


# What the other keys are in `Rule`.
_FIELDS: Mapping[str, tuple[str, Any]] = {
    "to": ("targets", Annotated[_Names, _prefix]),
    "sizes": ("numbers", tuple[Expression, ...]),
    "slots": ("numbers", tuple[Expression, ...]),
    "shape": ("numbers", tuple[Expression, ...]),
    "rows": ("numbers", Annotated[tuple[Expression, ...], _rows]),
    "groups": ("count", Expression),
    "dim": ("dim", Annotated[int, _dim]),
    "value": ("value", float),
    "lossy": ("lossy", bool),
    "because": ("because", str),
    "if": ("condition", Expression | None),
}
_VERBS: Mapping[str, _Verb] = {
    "keep": _Verb(),
    "rename": _Verb(),
    "move": _Verb(_prefix, keys=("to",)),
    "split": _Verb(_name, _names, ("sizes", "dim?")),
    "concat": _Verb(_names, _name),
    "deinterleave": _Verb(_name, _names, ("groups", "slots")),
    "unstack": _Verb(_name, _name_or_names, ("for", "sizes?")),
    "transpose": _Verb(_name, _name),
    "normalize": _Verb(_name, _name),
    "resize": _Verb(_name, _name, ("rows", "lossy?")),
    "fill": _Verb(_name, keys=("shape", "value?")),
    "drop": _Verb(partial(_name, glob=True), keys=("because",)),
}
# Only in the file of a class: the names and shapes that it has.
_SHAPES = {"shapes": _Verb()}


def read_rules(reader: Reader, node: Node) -> tuple[RuleOrBlock, ...]:
    """The rules of a family's or a format's list."""
    return _Rules(reader, _VERBS, ("from", "to")).read(node)


def read_shapes(reader: Reader, node: Node) -> tuple[RuleOrBlock, ...]:
    """The rules of a class, which only say names and shapes."""
    return _Rules(reader, _SHAPES, ("prefix", "prefix")).read(node)


class _Rules:
    def __init__(
        self, reader: Reader, verbs: Mapping[str, _Verb], prefixes: tuple[str, str]
    ) -> None:
        self._reader, self._verbs, self._prefixes = reader, verbs, prefixes

    def read(self, node: Node) -> tuple[RuleOrBlock, ...]:
        rules = tuple(self._entries(node))
        made: dict[str, str] = {}
        for name, where in _targets(rules, ""):
            if made.setdefault(name, where) != where:
                what = f"`{name}` is already made by {made[name]}"
                advice = "Keep one of them, or give both an `if`."
                self._reader.faults.append(Fault(where, what, advice))
        return rules

    def _entries(self, node: Node) -> Iterator[RuleOrBlock]:
        for item in self._reader.plain(list, node, "a set of rules"):
            if not isinstance(item.value, dict):
                self._reader.fault(item.line, "a rule is a table of keys and values")
            elif "rules" in item.value:
                yield self._block(item, item.value)
            else:
                yield from self._rule(item, item.value)

    def _block(self, node: Node, table: Mapping[str, Node]) -> RuleBlock:
        reader, outer, used = self._reader, self._reader.variables, self._reader.used
        reader.table(node, "a block", ("for", *dict.fromkeys(self._prefixes), "rules", "if"))
        loops = self._loops(table)
        reader.variables, reader.used = outer | loops.keys(), set()
        empty = Node(node.line, node.line, "")
        (source,), (target,) = (_prefix(reader, table.get(key, empty)) for key in self._prefixes)
        rules = tuple(self._entries(table["rules"]))
        if not rules:
            reader.fault(node.line, "a block without rules")
        for name, times in loops.items():
            if name not in reader.used and name.isidentifier():
                what = f"the loop variable `{name}` is not used in any name"
                advice = f"Write {{{name}}} where its number belongs."
                reader.faults.append(Fault(times.where, what, advice))
        reader.variables, reader.used = outer, used | reader.used
        condition = reader.value(Expression | None, table.get("if", ABSENT), "`if`")
        return RuleBlock(reader.where(node.line), loops, source, target, rules, condition)

    def _loops(self, table: Mapping[str, Node]) -> dict[str, Expression]:
        """The variables of `for`, and how often each runs."""
        reader, loops = self._reader, {}
        for name, times in reader.table(table.get("for", ABSENT), "`for`").items():
            loops[name] = reader.expression(times, f"`{name}`")
            if not name.isidentifier():
                reader.fault(times.key_line, f"`{name}` cannot be a loop variable")
            if name in reader.variables:
                what = f"`{name}` is already the variable of an outer loop"
                reader.fault(times.key_line, what)
        return loops

    def _rule(self, node: Node, table: Mapping[str, Node]) -> Iterator[Rule]:
        reader = self._reader
        found = [key for key in table if key in self._verbs]
        if len(found) != 1:
            listed = " and ".join(f"`{verb}`" for verb in found) or "none"
            advice = f"The verbs are {', '.join(self._verbs)}; a block has `rules`."
            for key in [] if found else reversed([*table]):
                advice = advice_for(key, [*self._verbs], advice)
            line = table[found[1]].key_line if found else node.line
            reader.fault(line, f"a rule has one verb, this one has {listed}", advice)
            return
        name = found[0]
        verb = self._verbs[name]
        keys = (name, *(("into",) if verb.into else ()), *verb.keys)
        reader.table(node, f"`{name}`", (*(key.rstrip("?") for key in keys), "if"))
        for key in keys:
            if not key.endswith("?") and key not in table:
                reader.fault(node.line, f"`{name}` needs `{key}`")
        values = {
            field: reader.value(kind, table[key], f"`{key}`")
            for key, (field, kind) in _FIELDS.items()
            if key in table and (key == "if" or key in keys or f"{key}?" in keys)
        }
        if name in ("keep", "rename", "shapes"):
            yield from self._one_a_name(name, table[name], values.get("condition"))
            return
        values["targets" if name == "fill" else "sources"] = verb.read(reader, table[name])
        outer = reader.variables
        if "for" in keys and (loops := self._loops(table)):
            values["variable"], values["count"] = next(iter(loops.items()))
            reader.variables |= loops.keys()
        if verb.into and "into" in table:
            values["targets"] = verb.into(reader, table["into"])
        reader.variables = outer
        rule = Rule(name, reader.where(table[name].key_line), **values)
        self._check_numbers(table, rule)
        yield rule

    def _one_a_name(self, verb: str, node: Node, condition: Expression | None) -> Iterator[Rule]:
        reader = self._reader
        if verb == "keep":
            for item in node.value if isinstance(node.value, list) else [node]:
                name = _name(reader, item)
                yield Rule(verb, reader.where(item.line), name, name, condition=condition)
            return
        for text, value in reader.table(node, f"`{verb}`").items():
            name, where = (reader.name(text, value.key_line),), reader.where(value.key_line)
            if verb == "rename":
                yield Rule(verb, where, name, _name(reader, value), condition=condition)
            else:
                shape = reader.value(tuple[Expression, ...], value, "a shape")
                yield Rule(verb, where, (), name, shape, condition=condition)

    def _check_numbers(self, table: Mapping[str, Node], rule: Rule) -> None:
        """Faults unless each of several targets has its number of rows, and each member a name."""
        key = "slots" if "slots" in table else "sizes"
        names, numbers = len(rule.targets), len(rule.numbers)
        if key in table and numbers and names and names != numbers:
            what = f"{names} names in `into`, {numbers} numbers in `{key}`"
            self._reader.fault(table[key].line, what)
        if rule.verb != "unstack" or not {"for", "into"} <= table.keys():
            return
        loops, line = table["for"].value, table["into"].key_line
        if names > 1 and not numbers:
            what = f"{names} names in `into`, and no `sizes`"
            self._reader.fault(line, what, "Say how many rows each of them has.")
        if isinstance(loops, dict) and len(loops) != 1:
            what = f"`for` of `unstack` has {len(loops)} variables, expected one"
            self._reader.fault(table["for"].key_line, what)
        for name in rule.targets:
            if rule.variable and rule.variable not in name.variables:
                what = f"`{name.text}` does not say which one it is"
                self._reader.fault(line, what, f"Write {{{rule.variable}}} in it.")


def _targets(rules: Sequence[RuleOrBlock], prefix: str) -> Iterator[tuple[str, str]]:
    """What is made without a condition, with placeholders as written, and where."""
    for rule in rules:
        if rule.condition is not None:
            continue
        if isinstance(rule, RuleBlock):
            yield from _targets(rule.rules, join(prefix, rule.target.text))
        elif rule.verb != "move":
            for name in rule.targets:
                yield join(prefix, name.text), rule.where
