"""Which family an LLM belongs to: architectures, model type and tensor names decide together.

No single one of them is enough: early InternLM2 configs say `model_type: internlm`, and every
remote-code copy of Llama has an architecture of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.expression import Expression
from xtuner2llava.mapping.names import fold
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.values import show
from xtuner2llava.mapping.yaml import Table

_KEYS = ("architectures", "model_type", "tensors", "when")
_MAX_NAMES = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """What speaks for a family and what against it; nothing against means that it matches."""

    agree: tuple[str, ...]
    differ: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """One of `architectures`, one of `model_types`, all `tensors` must be there; `when` must hold.

    What the mapping does not name, or the config does not say, is not held against it.
    """

    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    when: Expression | None = None

    def __bool__(self) -> bool:
        return bool(self.architectures or self.model_types or self.tensors)

    def verdict(self, config: Mapping[str, object], names: Collection[str] | None) -> Verdict:
        agree: list[str] = []
        differ: list[str] = []
        for key, wanted, found in (
            ("architecture", self.architectures, _texts(config.get("architectures"))),
            ("model_type", self.model_types, _texts(config.get("model_type"))),
        ):
            if wanted and found:
                if set(wanted) & set(found):
                    agree.append(key)
                else:
                    differ.append(f"its {key} is {' or '.join(wanted)}")
        absent = [name for name in self.tensors if names is not None and name not in names]
        if absent:
            differ.append(f"it has a tensor `{absent[0]}`")
        elif self.tensors and names is not None:
            agree.append("tensor names")
        if self.when is not None and not _holds(self.when, config):
            differ.append(f"its config says `{self.when.text}`")
        return Verdict(tuple(agree), tuple(differ))

    def fits(self, config: Mapping[str, object], names: Collection[str] | None) -> bool:
        verdict = self.verdict(config, names)
        return bool(verdict.agree) and not verdict.differ


def read_match(reader: Reader, table: Table) -> Match:
    reader.keys(table, _KEYS, "`match`")
    entries = table.entries
    return Match(
        reader.texts(entries.get("architectures"), "an architecture"),
        reader.texts(entries.get("model_type"), "a model type"),
        reader.texts(entries.get("tensors"), "a tensor name"),
        reader.expression(entries["when"], "`when`") if "when" in entries else None,
    )


def choose(
    matches: Mapping[str, Match], config: Mapping[str, object], names: Collection[str] | None
) -> str:
    """The one family of `matches` that fits.

    Raises `MappingError` if none does, or several: with what was seen, which came near, and why
    they are not it.
    """
    verdicts = {family: match.verdict(config, names) for family, match in matches.items() if match}
    fitting = [family for family, match in matches.items() if match.fits(config, names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise MappingError(
            f"families {' and '.join(fitting)} both fit this LLM",
            advice="Say which one is meant, with `--mapping NAME`.",
        )
    raise MappingError(
        f"no family fits this LLM, whose {_seen(config, names)}{_near(verdicts)}",
        advice=(
            "Name a family that has the same tensors with `--mapping NAME`, or begin a mapping of "
            "your own with `xtuner2llava mappings draft CHECKPOINT`."
        ),
    )


def _seen(config: Mapping[str, object], names: Collection[str] | None) -> str:
    folded = fold(names or ())
    listed = ", ".join(str(name) for name in folded[:_MAX_NAMES])
    more = f" and {len(folded) - _MAX_NAMES:,} more kinds" if len(folded) > _MAX_NAMES else ""
    return (
        f"architectures are {show(config.get('architectures'))}, model_type is "
        f"{show(config.get('model_type'))}, and tensors are {listed or 'none'}{more}"
    )


def _near(verdicts: Mapping[str, Verdict]) -> str:
    near: Sequence[str] = [
        f"\n    {family} has the same {' and '.join(verdict.agree)}, but "
        f"{' and '.join(verdict.differ)}"
        for family, verdict in verdicts.items()
        if verdict.agree
    ]
    return "".join(near) or f"\n    Known families: {', '.join(verdicts)}"


def _holds(condition: Expression, config: Mapping[str, object]) -> bool:
    """Config values are somebody else's: a condition that has no value for them does not hold."""
    try:
        return condition.condition(config)
    except MappingError:
        return False


def _texts(value: object) -> tuple[str, ...]:
    """Config values are somebody else's: what is no text, or list of texts, says nothing."""
    if isinstance(value, str):
        return (value,)
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list | tuple) else ()
