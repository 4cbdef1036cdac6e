"""Rules as written: one verb each, in blocks that give prefixes and loops.

`keep` and `rename` hold many names; each becomes a `Rule` of its own, with its own line, so that
a child file can replace one of them and an error can point at one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.expression import Expression
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


Entry: TypeAlias = "Rule | Block"


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of a file, and of the file it extends, which they take precedence over."""

    entries: tuple[Entry, ...] = ()
    parent: RuleSet | None = None


VERBS: dict[str, tuple[str, ...]] = {
    "keep": (),
    "rename": (),
    "move": ("to",),
    "split": ("into", "sizes", "dim"),
    "concat": ("into",),
    "deinterleave": ("into", "groups", "slots"),
    "unstack": ("into", "for", "sizes"),
    "transpose": ("into",),
    "normalize": ("into",),
    "resize": ("into", "rows", "lossy"),
    "fill": ("shape", "value"),
    "drop": ("because",),
}
SHAPES_VERB: dict[str, tuple[str, ...]] = {"shapes": ()}
_BLOCK_KEYS = ("for", "from", "to", "rules", "if")
_SHAPES_BLOCK_KEYS = ("for", "prefix", "rules", "if")


def read_rules(reader: Reader, node: Node | None, *, shapes: bool = False) -> tuple[Entry, ...]:
    """The rules of a list; with `shapes`, those of a class, which only say names and shapes."""
    rules = _Rules(reader, shapes).entries(node, frozenset())
    made: dict[str, str] = {}
    for name, where in _targets(rules, ""):
        if made.setdefault(name, where) != where:
            what = f"`{name}` is already made by {made[name]}"
            reader.faults.append(Fault(where, what, "Keep one of them, or give both an `if`."))
    return rules


class _Rules:
    def __init__(self, reader: Reader, shapes: bool) -> None:
        self._reader = reader
        self._verbs = SHAPES_VERB if shapes else VERBS
        self._block_keys = _SHAPES_BLOCK_KEYS if shapes else _BLOCK_KEYS
        self._prefixes = ("prefix", "prefix") if shapes else ("from", "to")

    def entries(self, node: Node | None, variables: frozenset[str]) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for item in self._reader.items(node, "a set of rules"):
            if not isinstance(item, Table):
                self._reader.fault(item.line, "a rule is a table of keys and values")
            elif "rules" in item.entries:
                found.append(self._block(item, variables))
            else:
                found.extend(self._rule(item, variables))
        return tuple(found)

    def _block(self, table: Table, outer: frozenset[str]) -> Block:
        reader = self._reader
        reader.keys(table, self._block_keys, "a block")
        loops = self._loops(table, outer)
        variables = outer | {name for name, _ in loops}
        source, target = (self._prefix(table, key, variables) for key in self._prefixes)
        rules = self.entries(table.entries["rules"], variables)
        if not rules:
            reader.fault(table.line, "a block without rules")
        used = {*source.variables, *target.variables, *_variables(rules)}
        for name, _ in loops:
            if name not in used and name.isidentifier():
                what = f"the loop variable `{name}` is not used in any name"
                node = table.entries["for"]
                line = node.lines[name] if isinstance(node, Table) else node.line
                reader.fault(line, what, f"Write {{{name}}} where its number belongs.")
        where = reader.where(table.line)
        return Block(where, loops, source, target, rules, self._condition(table))

    def _prefix(self, table: Table, key: str, variables: frozenset[str]) -> Template:
        node = table.entries.get(key)
        if node is None or (isinstance(node, Scalar) and node.value == ""):
            return self._name("", table.line, variables)
        return self._name(self._reader.text(node, f"`{key}`"), node.line, variables)

    def _rule(self, table: Table, variables: frozenset[str]) -> Sequence[Rule]:
        verbs = [key for key in table.entries if key in self._verbs]
        if len(verbs) != 1:
            found = " and ".join(f"`{verb}`" for verb in verbs) or "none"
            line = table.lines[verbs[1]] if verbs else table.line
            meant = [nearest(key, [*self._verbs]) for key in table.entries if not verbs]
            known = f"The verbs are {', '.join(self._verbs)}; a block has `rules`."
            advice = next((f"Did you mean `{verb}`?" for verb in meant if verb), known)
            self._reader.fault(line, f"a rule has one verb, this one has {found}", advice)
            return ()
        verb = verbs[0]
        self._reader.keys(table, (verb, *self._verbs[verb], "if"), f"`{verb}`")
        for key in self._verbs[verb]:
            if key not in ("dim", "lossy", "value") and (verb, key) != ("unstack", "sizes"):
                self._reader.required(table, key, f"`{verb}`")
        readers: dict[str, Callable[[Table, frozenset[str]], Sequence[Rule]]] = {
            "keep": self._keep,
            "rename": self._rename,
            "shapes": self._shapes,
            "unstack": self._unstack,
        }
        read = readers.get(verb)
        if read is not None:
            return read(table, variables)
        return (self._single(verb, table, variables),)

    def _keep(self, table: Table, variables: frozenset[str]) -> Sequence[Rule]:
        node = table.entries["keep"]
        values = node.values if isinstance(node, Items) else (node,)
        condition = self._condition(table)
        rules = []
        for value in values:
            name = self._name(self._reader.text(value, "a tensor name"), value.line, variables)
            where = self._reader.where(value.line)
            rules.append(Rule("keep", where, (name,), (name,), condition=condition))
        return rules

    def _rename(self, table: Table, variables: frozenset[str]) -> Sequence[Rule]:
        pairs = self._reader.table(table.entries["rename"], "`rename`")
        condition = self._condition(table)
        rules = []
        for source, node in pairs.entries.items():
            line = pairs.lines[source]
            target = self._reader.text(node, "the new name")
            names = self._name(source, line, variables), self._name(target, node.line, variables)
            where = self._reader.where(line)
            rules.append(Rule("rename", where, names[:1], names[1:], condition=condition))
        return rules

    def _shapes(self, table: Table, variables: frozenset[str]) -> Sequence[Rule]:
        shapes = self._reader.table(table.entries["shapes"], "`shapes`")
        condition = self._condition(table)
        rules = []
        for name, node in shapes.entries.items():
            line = shapes.lines[name]
            target = self._name(name, line, variables)
            numbers = self._reader.expressions(node, "a shape")
            where = self._reader.where(line)
            rules.append(Rule("shapes", where, (), (target,), numbers=numbers, condition=condition))
        return rules

    def _unstack(self, table: Table, outer: frozenset[str]) -> Sequence[Rule]:
        reader, entries = self._reader, table.entries
        loops = self._loops(table, outer)
        into, sizes = entries.get("into"), entries.get("sizes")
        numbers = reader.expressions(sizes, "`sizes`")
        variables = outer | {name for name, _ in loops}
        targets = self._names("unstack", into, variables, many=isinstance(into, Items))
        if "for" in entries and len(loops) != 1:
            line = table.lines["for"]
            reader.fault(line, f"`for` of `unstack` has {len(loops)} variables, expected one")
        if sizes is not None and len(numbers) != len(targets):
            what = f"{len(targets)} names in `into`, {len(numbers)} numbers in `sizes`"
            reader.fault(sizes.line, what)
        elif sizes is None and len(targets) > 1:
            what = f"{len(targets)} names in `into`, and no `sizes`"
            reader.fault(table.lines["into"], what, "Say how many rows each of them has.")
        for target in targets:
            if loops and loops[0][0] not in target.variables:
                what = f"`{target.text}` does not say which one it is"
                reader.fault(table.lines["into"], what, f"Write {{{loops[0][0]}}} in it.")
        return [
            Rule(
                "unstack",
                reader.where(table.lines["unstack"]),
                self._names("unstack", entries["unstack"], outer, many=False),
                targets,
                numbers,
                each=loops[0] if loops else None,
                condition=self._condition(table),
            )
        ]

    def _loops(self, table: Table, outer: frozenset[str]) -> tuple[tuple[str, Expression], ...]:
        """The variables of `for`, each with how often it runs."""
        reader, node = self._reader, table.entries.get("for")
        loops = tuple(reader.formulas(node, "`for`"))
        for name, _ in loops:
            line = node.lines[name] if isinstance(node, Table) else table.line
            if not name.isidentifier():
                reader.fault(line, f"`{name}` cannot be a loop variable")
            if name in outer:
                reader.fault(line, f"`{name}` is already the variable of an outer loop")
        return loops

    def _single(self, verb: str, table: Table, variables: frozenset[str]) -> Rule:
        reader, entries = self._reader, table.entries
        subject = self._names(verb, entries[verb], variables, many=verb == "concat")
        into = entries.get("to" if verb == "move" else "into")
        targets = self._names(verb, into, variables, many=verb in ("split", "deinterleave"))
        numbers: tuple[Expression, ...] = ()
        groups: Expression | None = None
        if verb in ("split", "deinterleave"):
            key = "sizes" if verb == "split" else "slots"
            numbers = reader.expressions(entries.get(key), f"`{key}`")
            both = isinstance(into, Items) and isinstance(entries.get(key), Items)
            if both and len(numbers) != len(targets):
                what = f"{len(targets)} names in `into`, {len(numbers)} numbers in `{key}`"
                reader.fault(entries[key].line, what)
        if "groups" in entries:
            groups = reader.expression(entries["groups"], "`groups`")
        if "rows" in entries:
            numbers = (reader.expression(entries["rows"], "`rows`"),)
        if verb == "fill":
            subject, targets = (), subject
            numbers = reader.expressions(entries.get("shape"), "`shape`")
        return Rule(
            verb,
            reader.where(table.lines[verb]),
            subject,
            targets,
            numbers,
            groups,
            dim=self._dim(entries.get("dim")),
            value=self._value(entries.get("value")),
            lossy=reader.flag(entries.get("lossy"), "`lossy`"),
            because=reader.text(entries.get("because"), "`because`"),
            condition=self._condition(table),
        )

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

    def _condition(self, table: Table) -> Expression | None:
        node = table.entries.get("if")
        return None if node is None else self._reader.expression(node, "`if`")

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
    """What is made whatever the config says, with placeholders as written, and where."""
    for rule in rules:
        if rule.condition is not None:
            continue
        if isinstance(rule, Block):
            yield from _targets(rule.rules, join(prefix, rule.target.text))
        elif rule.verb != "move":
            for name in rule.targets:
                yield join(prefix, name.text), rule.where
