"""What a model becomes in a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.errors import ConversionError, Fault
from xtuner2llava.mapping import Family, Format, Limit
from xtuner2llava.planning.language_model import translate
from xtuner2llava.sources.json_file import Json
from xtuner2llava.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Target:
    """What an input can become in a format: its class there, or the reasons why it cannot."""

    format: str
    architecture: str | None
    verdict: Verdict
    caveats: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def is_possible(self) -> bool:
        return self.verdict.is_possible

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "format": self.format,
            "architecture": self.architecture,
            "possible": self.is_possible,
            **self.verdict.to_dict(),
            "caveats": list(self.caveats),
            "faults": [str(fault) for fault in self.faults],
        }


def prospect(
    format_: Format,
    family: Family | None,
    config: Mapping[str, Json] | None,
    *,
    depth: int | None,
    inexact: Sequence[str],
    faults: Sequence[Fault],
) -> Target:
    """What configs alone say of a format, without looking at a tensor.

    `config` is the LLM's, `depth` the projector's number of layers, where they are known; `inexact`
    and `faults` are reasons that hold for every format.
    """
    found, limits = list(faults), list[Limit]()
    if family is not None and config is not None:
        try:
            _, limits = translate(family, config, format_)
        except ConversionError as error:
            found += error.faults
    if depth is not None:
        environment = {"projector": {"depth": depth}, "writes": {"visual_encoder": True}}
        found += format_.faults(environment)
    verdict = Verdict.of(limits, inexact=inexact, faults=found)
    if family is None or not verdict.is_possible:
        return Target(format_.name, None, verdict, (), tuple(found))
    architecture = format_.classes[family.becomes.name].architecture
    caveats = (*inexact, *(limit.text for limit in limits))
    return Target(format_.name, architecture, verdict, caveats, ())
