"""Rules as written: one verb each, in blocks that give prefixes and loops.

`keep` and `rename` hold many names; each becomes a `Rule` of its own, with its own line, so that
a child file can replace one of them and an error can point at one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.expressions import Expression
from xtuner2llava.mapping.names import Template, join, nearest
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Items, Node, Scalar, Table


@dataclass(frozen=True, slots=True)
class Rule:
    """What one verb says, names still with placeholders and numbers still as expressions.

    `numbers` are the rows of each part (split, unstack), the rows of each slot (deinterleave), the
    rows (resize), or the shape (fill, shapes). `each` is the variable in the targets of `unstack`,
    and how many of them there are.
    """

    verb: str
    where: str
    sources: tuple[Template, ...] = ()
    targets: tuple[Template, ...] = ()
    numbers: tuple[Expression, ...] = ()
    groups: Expression | None = None
    each: tuple[str, Expression] | None = None
    dim: int = 0
    value: float = 0.0
    lossy: bool = False
    because: str = ""
    condition: Expression | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Rules that share a loop, a prefix on either side, and a condition."""

    where: str
    loops: tuple[tuple[str, Expression], ...]
    source: Template
    target: Template
    rules: tuple[Entry, ...]
    condition: Expression | None = None


Entry: TypeAlias = Rule | Block


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of a file, and of the file it extends, which they take precedence over."""

    entries: tuple[Entry, ...] = ()
    parent: RuleSet | None = None


# The keys of each verb besides itself; those that may be left out end in a question mark.
_VERBS: dict[str, tuple[str, ...]] = {
    "keep": (),
    "rename": (),
    "move": ("to",),
    "split": ("into", "sizes", "dim?"),
    "concat": ("into",),
    "deinterleave": ("into", "groups", "slots"),
    "unstack": ("into", "for", "sizes?"),
    "transpose": ("into",),
    "normalize": ("into",),
    "resize": ("into", "rows", "lossy?"),
    "fill": ("shape", "value?"),
    "drop": ("because",),
}
_MANY_TARGETS = ("split", "deinterleave")


def read_rules(reader: Reader, node: Node | None) -> tuple[Entry, ...]:
    """The rules of a family's or a format's list."""
    return _Rules(reader, _VERBS, ("from", "to")).read(node)


def read_shapes(reader: Reader, node: Node | None) -> tuple[Entry, ...]:
    """The rules of a class, which only say names and shapes."""
    return _Rules(reader, {"shapes": ()}, ("prefix", "prefix")).read(node)


class _Rules:
    def __init__(
        self, reader: Reader, verbs: dict[str, tuple[str, ...]], prefixes: tuple[str, str]
    ) -> None:
        self._reader, self._verbs, self._prefixes = reader, verbs, prefixes

    def read(self, node: Node | None) -> tuple[Entry, ...]:
        rules = self._entries(node, frozenset())
        made: dict[str, str] = {}
        for name, where in _targets(rules, ""):
            if made.setdefault(name, where) != where:
                what = f"`{name}` is already made by {made[name]}"
                advice = "Keep one of them, or give both an `if`."
                self._reader.faults.append(Fault(where, what, advice))
        return rules

    def _entries(self, node: Node | None, variables: frozenset[str]) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for item in self._reader.items(node, "a set of rules"):
            table = item if isinstance(item, Table) else Table(item.line, {}, {})
            if table is not item:
                self._reader.fault(item.line, "a rule is a table of keys and values")
            elif "rules" in table.entries:
                found.append(self._block(table, variables))
            else:
                found.extend(self._rule(table, variables))
        return tuple(found)

    def _block(self, table: Table, outer: frozenset[str]) -> Block:
        reader = self._reader
        reader.keys(table, ("for", *dict.fromkeys(self._prefixes), "rules", "if"), "a block")
        loops = self._loops(table, outer)
        variables = outer | {name for name, _, _ in loops}
        source, target = (self._prefix(table, key, variables) for key in self._prefixes)
        rules = self._entries(table.entries["rules"], variables)
        if not rules:
            reader.fault(table.line, "a block without rules")
        used = {*source.variables, *target.variables, *_variables(rules)}
        for name, line, _ in loops:
            if name not in used and name.isidentifier():
                what = f"the loop variable `{name}` is not used in any name"
                reader.fault(line, what, f"Write {{{name}}} where its number belongs.")
        times = tuple((name, count) for name, _, count in loops)
        where = reader.where(table.line)
        return Block(where, times, source, target, rules, self._expression(table, "if"))

    def _loops(self, table: Table, outer: frozenset[str]) -> list[tuple[str, int, Expression]]:
        """The variables of `for`, the line of each, and how often it runs."""
        reader = self._reader
        loops = []
        for name, line, node in reader.entries(table.entries.get("for"), "`for`"):
            loops.append((name, line, reader.expression(node, f"`{name}`")))
            if not name.isidentifier():
                reader.fault(line, f"`{name}` cannot be a loop variable")
            if name in outer:
                reader.fault(line, f"`{name}` is already the variable of an outer loop")
        return loops

    def _prefix(self, table: Table, key: str, variables: frozenset[str]) -> Template:
        node = table.entries.get(key)
        if node is None or (isinstance(node, Scalar) and node.value == ""):
            return self._name("", table.line, variables)
        return self._name(self._reader.text(node, f"`{key}`"), node.line, variables)

    def _rule(self, table: Table, variables: frozenset[str]) -> Sequence[Rule]:
        reader = self._reader
        verbs = [key for key in table.entries if key in self._verbs]
        if len(verbs) != 1:
            found = " and ".join(f"`{verb}`" for verb in verbs) or "none"
            line = table.lines[verbs[1]] if verbs else table.line
            meant = [nearest(key, [*self._verbs]) for key in table.entries if not verbs]
            known = f"The verbs are {', '.join(self._verbs)}; a block has `rules`."
            advice = next((f"Did you mean `{verb}`?" for verb in meant if verb), known)
            reader.fault(line, f"a rule has one verb, this one has {found}", advice)
            return ()
        (verb,) = verbs
        keys = self._verbs[verb]
        reader.keys(table, (verb, *(key.rstrip("?") for key in keys), "if"), f"`{verb}`")
        for key in keys:
            if not key.endswith("?") and key not in table.entries:
                reader.fault(table.line, f"`{verb}` needs `{key}`")
        if verb in ("keep", "rename", "shapes"):
            return list(self._one_a_name(verb, table, variables))
        return (self._single(verb, table, variables),)

    def _one_a_name(self, verb: str, table: Table, variables: frozenset[str]) -> Iterator[Rule]:
        reader, node = self._reader, table.entries[verb]
        condition = self._expression(table, "if")
        if verb == "keep":
            for item in node.values if isinstance(node, Items) else (node,):
                text = reader.text(item, "a tensor name")
                name = self._name(text, item.line, variables)
                yield Rule(verb, reader.where(item.line), (name,), (name,), condition=condition)
            return
        for text, line, value in reader.entries(node, f"`{verb}`"):
            name, where = self._name(text, line, variables), reader.where(line)
            if verb == "shapes":
                shape = reader.value(tuple[Expression, ...], value, "a shape")
                yield Rule(verb, where, (), (name,), shape, condition=condition)
            else:
                target = self._name(reader.text(value, "the new name"), value.line, variables)
                yield Rule(verb, where, (name,), (target,), condition=condition)

    def _single(self, verb: str, table: Table, outer: frozenset[str]) -> Rule:
        reader, entries = self._reader, table.entries
        loops = self._loops(table, outer) if verb == "unstack" else []
        inner = outer | {name for name, _, _ in loops}
        into = entries.get("to" if verb == "move" else "into")
        listed = verb in _MANY_TARGETS or (verb == "unstack" and isinstance(into, Items))
        sources = self._names(verb, entries[verb], outer, many=verb == "concat")
        targets = self._names(verb, into, inner, many=listed)
        if verb == "fill":
            sources, targets = (), sources
        numbers: tuple[Expression, ...] = ()
        for key in ("sizes", "slots", "shape"):
            if key in entries:
                numbers = reader.value(tuple[Expression, ...], entries[key], f"`{key}`")
        if "rows" in entries:
            numbers = (reader.expression(entries["rows"], "`rows`"),)
        self._check_parts(table, listed, targets, numbers)
        if verb == "unstack":
            self._check_members(table, loops, targets)
        return Rule(
            verb,
            reader.where(table.lines[verb]),
            sources,
            targets,
            numbers,
            self._expression(table, "groups"),
            (loops[0][0], loops[0][2]) if loops else None,
            dim=self._dim(entries.get("dim")),
            value=self._value(entries.get("value")),
            lossy=reader.flag(entries.get("lossy"), "`lossy`"),
            because=reader.text(entries.get("because"), "`because`"),
            condition=self._expression(table, "if"),
        )

    def _check_parts(
        self,
        table: Table,
        listed: bool,
        targets: Sequence[Template],
        numbers: Sequence[Expression],
    ) -> None:
        """A fault unless each of several targets has its number of rows."""
        key = "slots" if "slots" in table.entries else "sizes"
        sizes = table.entries.get(key)
        if listed and isinstance(sizes, Items) and isinstance(table.entries.get("into"), Items):
            if len(numbers) != len(targets):
                what = f"{len(targets)} names in `into`, {len(numbers)} numbers in `{key}`"
                self._reader.fault(sizes.line, what)
        elif "unstack" in table.entries and sizes is None and len(targets) > 1:
            what = f"{len(targets)} names in `into`, and no `sizes`"
            advice = "Say how many rows each of them has."
            self._reader.fault(table.lines["into"], what, advice)

    def _check_members(
        self,
        table: Table,
        loops: Sequence[tuple[str, int, Expression]],
        targets: Sequence[Template],
    ) -> None:
        """Faults unless `unstack` has one loop, whose variable tells its targets apart."""
        if "for" in table.entries and len(loops) != 1:
            what = f"`for` of `unstack` has {len(loops)} variables, expected one"
            self._reader.fault(table.lines["for"], what)
        for target in targets:
            if loops and loops[0][0] not in target.variables:
                what = f"`{target.text}` does not say which one it is"
                self._reader.fault(table.lines["into"], what, f"Write {{{loops[0][0]}}} in it.")

    def _names(
        self, verb: str, node: Node | None, variables: frozenset[str], *, many: bool
    ) -> tuple[Template, ...]:
        """The names of a rule: a list where the verb takes `many`, else a single one."""
        if node is None:
            return ()
        values = self._reader.items(node, "what `into` or `concat` names") if many else (node,)
        if isinstance(node, Items) and not values:
            self._reader.fault(node.line, "a list of names is empty")
        names = []
        for value in values:
            # Only a subtree may be everything; a tensor has a name.
            everything = verb == "move" and isinstance(value, Scalar) and value.value == ""
            text = "" if everything else self._reader.text(value, "a tensor name")
            names.append(self._name(text, value.line, variables, glob=verb == "drop"))
        return tuple(names)

    def _name(
        self, text: str, line: int, variables: frozenset[str], *, glob: bool = False
    ) -> Template:
        name = self._reader.name(text, line, glob=glob)
        for variable in name.variables:
            if variable not in variables:
                known = ", ".join(sorted(variables)) or "none here"
                what = f"`{text}`: `{variable}` is not a loop variable"
                self._reader.fault(line, what, f"Known loop variables: {known}.")
        return name

    def _expression(self, table: Table, key: str) -> Expression | None:
        node = table.entries.get(key)
        return None if node is None else self._reader.expression(node, f"`{key}`")

    def _dim(self, node: Node | None) -> int:
        value = node.value if isinstance(node, Scalar) else None
        if node is None or value in (0, 1):
            return int(value or 0)
        self._reader.fault(node.line, "`dim` is 0 (rows) or 1 (columns)")
        return 0

    def _value(self, node: Node | None) -> float:
        value = node.value if isinstance(node, Scalar) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if node is not None:
            self._reader.fault(node.line, "`value` is a number")
        return 0.0


def _variables(rules: Sequence[Entry]) -> set[str]:
    """The placeholders of all names below; the depth is that of the document."""
    found: set[str] = set()
    for rule in rules:
        if isinstance(rule, Block):
            found |= {*rule.source.variables, *rule.target.variables, *_variables(rule.rules)}
        else:
            for name in (*rule.sources, *rule.targets):
                found.update(name.variables)
    return found


def _targets(rules: Sequence[Entry], prefix: str) -> Iterator[tuple[str, str]]:
    """What is made without a condition, with placeholders as written, and where."""
    for rule in rules:
        if rule.condition is not None:
            continue
        if isinstance(rule, Block):
            yield from _targets(rule.rules, join(prefix, rule.target.text))
        elif rule.verb != "move":
            for name in rule.targets:
                yield join(prefix, name.text), rule.where
