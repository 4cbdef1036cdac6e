"""Which family an LLM belongs to: architectures, model type and tensor names decide together.

No single one of them is enough: early InternLM2 configs say `model_type: internlm`, and every
remote-code copy of Llama has an architecture of its own. LLMs that are known to have no exact
target are matched in the same way, and refused with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, ClassVar

from xtuner2llava.errors import Fault, MappingError, UnsupportedError, raise_faults
from xtuner2llava.mapping.expressions import Expression, say, show
from xtuner2llava.mapping.names import TextTemplate, fold

_MAX_NAMES = 8


@dataclass(frozen=True, slots=True)
class Match:
    """One of `architectures`, one of `model_type`, all `tensors` must be there; `when` must hold.

    What the mapping does not name, or the config does not say, is not held against it.
    """

    architectures: Annotated[tuple[str, ...], "an architecture"] = ()
    model_type: Annotated[tuple[str, ...], "a model type"] = ()
    tensors: Annotated[tuple[str, ...], "a tensor name"] = ()
    when: Expression | None = None

    def __bool__(self) -> bool:
        return bool(self.architectures or self.model_type or self.tensors)

    def evidence(
        self, config: Mapping[str, object], names: Collection[str] | None
    ) -> tuple[list[str], list[str]]:
        """What agrees with an LLM, and what differs."""
        agree, differ = [], []
        for key, wanted, said in (
            ("architecture", self.architectures, texts(config.get("architectures"))),
            ("model_type", self.model_type, texts(config.get("model_type"))),
        ):
            if wanted and said:
                if set(wanted) & set(said):
                    agree.append(key)
                else:
                    differ.append(f"its {key} is {' or '.join(wanted)}")
        if self.tensors and names is not None:
            absent = [name for name in self.tensors if name not in names]
            if absent:
                differ.append(f"it has a tensor `{absent[0]}`")
            else:
                agree.append("tensor names")
        if self.when is not None and not _holds(self.when, config):
            differ.append(f"its config says `{self.when.text}`")
        return agree, differ

    def fits(self, config: Mapping[str, object], names: Collection[str] | None) -> bool:
        agree, differ = self.evidence(config, names)
        return bool(agree) and not differ


def choose(
    matches: Mapping[str, Match], config: Mapping[str, object], names: Collection[str] | None
) -> str:
    """The one family of `matches` that fits.

    Raises `MappingError` if none does, or several: with what was seen, which came near, and why
    they are not it.
    """
    found = {family: match.evidence(config, names) for family, match in matches.items() if match}
    fitting = [family for family, (agree, differ) in found.items() if agree and not differ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise MappingError(
            f"families {' and '.join(fitting)} both fit this LLM",
            advice="Say which one is meant, with `--mapping NAME`.",
        )
    near = "".join(
        f"{family} has the same {' and '.join(agree)}, but {' and '.join(differ)}. "
        for family, (agree, differ) in found.items()
        if agree
    )
    folded = fold(names or ())
    listed = ", ".join(str(name) for name in folded[:_MAX_NAMES]) or "none"
    more = f" and {len(folded) - _MAX_NAMES:,} more kinds" if len(folded) > _MAX_NAMES else ""
    seen = (
        f"architectures are {show(config.get('architectures'))}, model_type is "
        f"{show(config.get('model_type'))}, and tensors are {listed}{more}"
    )
    known = f"Known families: {', '.join(found)}. "
    raise MappingError(
        f"no family fits this LLM, whose {seen}",
        advice=(
            f"{near or known}Name a family that has the same tensors with `--mapping NAME`, or "
            "begin a mapping of your own with `xtuner2llava mappings draft CHECKPOINT`."
        ),
    )


def _holds(condition: Expression, config: Mapping[str, object]) -> bool:
    """A config is untrusted: a condition that has no value for it does not hold."""
    try:
        return condition.condition(config)
    except MappingError:
        return False


def texts(value: object) -> tuple[str, ...]:
    """A config is untrusted: anything but a text, or texts in a list, says nothing."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(text for text in values if text and isinstance(text, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why nothing supports an LLM that fits `match`, or a format a plain class; what to do instead.

    The texts may name keys of the LLM's config.
    """

    TITLE: ClassVar = "a refusal"
    where: str
    match: Match = Match()
    because: TextTemplate
    instead: TextTemplate

    def fault(self, config: Mapping[str, object]) -> Fault:
        return Fault(self.where, say(self.because, config), say(self.instead, config))


@dataclass(frozen=True, slots=True)
class Refusals:
    """LLMs that nothing supports, and by format the plain classes that it does not."""

    llms: tuple[Refusal, ...] = ()
    formats: Mapping[str, Mapping[str, Refusal]] = field(default_factory=dict)

    def check(self, config: Mapping[str, object], names: Collection[str] | None) -> None:
        """Raises `UnsupportedError` with the reason if an LLM is one of `llms`."""
        fitting = (refusal for refusal in self.llms if refusal.match.fits(config, names))
        raise_faults(UnsupportedError, [refusal.fault(config) for refusal in islice(fitting, 1)])
