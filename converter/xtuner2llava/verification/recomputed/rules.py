"""A family's rules, read from its YAML and applied to whole tensors, apart from `mapping/`.

Shared with the conversion are the YAML files themselves, and nothing that reads or applies them:
what each verb means is spelled out here again, with torch's own operations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import ConversionError, MappingError
from xtuner2llava.verification.recomputed.arithmetic import evaluate, whole_number
from xtuner2llava.verification.recomputed.verbs import VERBS, Rule
from xtuner2llava.verification.recomputed.weight import Weight

if TYPE_CHECKING:
    pass

_MAX_BYTES = 1 << 20
_MAX_RULES = 200_000


@dataclass(frozen=True, slots=True)
class Mappings:
    """A family file and those that it extends, the child first."""

    name: str
    layers: tuple[Mapping[str, Any], ...]

    def table(self, key: str) -> dict[str, Any]:
        """The entries of a table of all files; the child's count."""
        merged: dict[str, Any] = {}
        for layer in reversed(self.layers):
            found = layer.get(key)
            merged |= found if isinstance(found, dict) else {}
        return merged

    def environment(self, config: Mapping[str, object]) -> dict[str, object]:
        """What the expressions know: defaults, the source config, and `dims`."""
        defaults: dict[str, Any] = {}
        for layer in reversed(self.layers):
            rules = layer.get("config")
            found = rules.get("default") if isinstance(rules, dict) else None
            defaults |= found if isinstance(found, dict) else {}
        names = {**defaults, **config}
        for name, expression in self.table("dims").items():
            names[name] = evaluate(expression, names)
        return names

    def apply(
        self, weights: Mapping[str, Weight], config: Mapping[str, object]
    ) -> dict[str, Weight]:
        """The weights of the plain class. Raises `MappingError` where a rule does not fit."""
        return _Application(weights, self.environment(config)).all(self.layers)


def read_family(folder: Path, choice: str) -> Mappings:
    """The family called `choice` in `folder`, or in the file of that path, with its parents."""
    path = Path(choice)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / "families" / f"{choice}.yaml"
    layers = [_yaml(path)]
    while isinstance(parent := layers[-1].get("extends"), str):
        if len(layers) > 20:
            raise MappingError("extends itself", where=path.name)
        layers.append(_yaml(folder / "families" / f"{parent}.yaml"))
    return Mappings(str(layers[0].get("family")), tuple(layers))


def detect_family(folder: Path, config: Mapping[str, object], names: Sequence[str]) -> str:
    """The family whose `match` agrees with an LLM. Raises `MappingError` unless it is one."""
    found = []
    for path in sorted((folder / "families").glob("*.yaml")):
        match = _yaml(path).get("match")
        if not isinstance(match, dict):
            continue
        architectures = config.get("architectures")
        said = set(architectures) if isinstance(architectures, list) else set()
        wanted = match.get("architectures")
        if wanted is not None and said and said.isdisjoint(wanted):
            continue
        if match.get("model_type") is not None and not said:
            kinds = match["model_type"]
            if config.get("model_type") not in (kinds if isinstance(kinds, list) else [kinds]):
                continue
        if all(name in names for name in match.get("tensors") or []):
            found.append(path.stem)
    if len(found) != 1:
        said_text = f"{config.get('architectures')}, {config.get('model_type')}"
        raise MappingError(
            f"{' and '.join(found) or 'no family'} match an LLM with {said_text}",
            advice="Give --mapping, as for convert.",
        )
    return found[0]


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = path.read_bytes()[: _MAX_BYTES + 1]
        tokens = list(yaml.scan(data.decode("utf-8"))) if len(data) <= _MAX_BYTES else None
        if tokens is None or any(isinstance(t, yaml.AliasToken) for t in tokens):
            raise MappingError("is too large, or has aliases", where=path.name)
        value = yaml.safe_load(data)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise MappingError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise MappingError("is no mapping", where=path.name)
    return value


class _Application:
    def __init__(self, weights: Mapping[str, Weight], names: Mapping[str, object]) -> None:
        self._weights, self._names = weights, names
        self._count = 0

    def all(self, layers: Sequence[Mapping[str, Any]]) -> dict[str, Weight]:
        result: dict[str, Weight] = {}
        taken: set[str] = set()
        moves: list[tuple[str, str]] = []
        dropped: list[str] = []
        for layer in layers:
            made_before, taken_before = set(result), set(taken)
            for rule in self._literal(layer.get("tensors") or [], self._names, "", ""):
                if rule.verb == "move":
                    moves.append((rule.sources[0], rule.targets[0]))
                elif rule.verb == "drop" and "*" in rule.sources[0]:
                    dropped.append(rule.sources[0])
                elif made_before.isdisjoint(rule.targets) and taken_before.isdisjoint(rule.sources):
                    taken.update(rule.sources)
                    if rule.verb != "drop":
                        result.update(self._made(rule))
        globs = [_glob(pattern) for pattern in dropped]
        for name in self._weights:
            if name in taken or any(glob.fullmatch(name + ".") for glob in globs):
                continue
            fits = [(len(source), source, target) for source, target in moves
                    if source == "" or name == source or name.startswith(source + ".")]  # fmt: skip
            if not fits:
                raise MappingError("no rule takes it", where=name)
            _, source, target = max(fits)
            rest = name[len(source) :].lstrip(".") if source else name
            result[_joined(target, rest)] = self._weights[name]
        return result

    def _literal(
        self, entries: Sequence[Any], names: Mapping[str, object], source: str, target: str
    ) -> Iterator[Rule]:
        """Loops run, prefixes joined, conditions decided."""
        for entry in entries:
            self._count += 1
            if self._count > _MAX_RULES:
                raise MappingError(f"makes more than {_MAX_RULES:,} rules")
            if "if" in entry and not evaluate(entry["if"], names, missing_is_null=True):
                continue
            if "rules" not in entry:
                yield from _rules(entry, names, source, target)
                continue
            for inner in _rounds(entry.get("for") or {}, names):
                yield from self._literal(
                    entry["rules"],
                    inner,
                    _joined(source, _filled(entry.get("from", ""), inner)),
                    _joined(target, _filled(entry.get("to", ""), inner)),
                )

    def _made(self, rule: Rule) -> dict[str, Weight]:
        absent = [name for name in rule.sources if name not in self._weights]
        if absent:
            raise MappingError(f"`{rule.verb}` needs it, and it is not there", where=absent[0])
        sources = [self._weights[name] for name in rule.sources]
        try:
            made = VERBS[rule.verb](rule, sources)
        except ConversionError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise MappingError(
                f"`{rule.verb}` does not fit: {error}", where=str(rule.sources)
            ) from (error)
        return dict(zip(rule.targets, made, strict=True))


def _rules(
    entry: Mapping[str, Any], names: Mapping[str, object], source: str, target: str
) -> Iterator[Rule]:
    verb = next(verb for verb in (*VERBS, "keep", "rename", "move", "drop") if verb in entry)
    subject = entry[verb]
    into = entry.get("to" if verb == "move" else "into")
    if verb == "keep":
        pairs = [(name, name) for name in (subject if isinstance(subject, list) else [subject])]
    elif verb == "rename":
        pairs = list(subject.items())
    elif verb == "fill":
        pairs = []
        yield Rule(verb, (), (_joined(target, _filled(subject, names)),), entry, names)
    else:
        befores = subject if isinstance(subject, list) else [subject]
        afters = [] if into is None else into if isinstance(into, list) else [into]
        pairs = []
        rounds = list(_rounds(entry["for"], names)) if verb == "unstack" else [names]
        yield Rule(
            verb,
            tuple(_joined(source, _filled(name, names)) for name in befores),
            tuple(_joined(target, _filled(name, inner)) for inner in rounds for name in afters),
            entry,
            names,
        )
    for before, after in pairs:
        one, other = _filled(before, names), _filled(after, names)
        yield Rule("rename", (_joined(source, one),), (_joined(target, other),), entry, names)


def _rounds(
    loops: Mapping[str, Any], names: Mapping[str, object]
) -> Iterator[Mapping[str, object]]:
    if not loops:
        yield names
        return
    (variable, times), *rest = loops.items()
    for number in range(whole_number(times, names)):
        yield from _rounds(dict(rest), {**names, variable: number})


def _filled(text: str, names: Mapping[str, object]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), text)


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _glob(pattern: str) -> re.Pattern[str]:
    """For names with a dot at the end: `**` is any number of parts, `*` anything within one."""
    parts = pattern.split(".")
    if parts.count("**") > 4:
        raise MappingError("has more than four `**`", where=pattern)
    pieces = [
        r"(?:[^.]+\.)*" if part == "**"
        else "[^.]*".join(re.escape(text) for text in part.split("*")) + r"\."
        for part in parts
    ]  # fmt: skip
    return re.compile("".join(pieces))
