"""Whether a target computes what was trained: exactly, up to a length, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from xtuner2llava.errors import Fault
from xtuner2llava.mapping import Limit
from xtuner2llava.storage.json_file import Json

Kind = Literal["exact", "exact_up_to", "exact_if_right", "not_exact", "not_possible"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a target is to what was trained.

    `exact` is the trained function, but for rounding to the dtype that is written. `tokens` is the
    length of a sequence, images counted as their patches, within which it is exact; None without
    such a limit. `transformers` are ranges of versions, all of which the one that loads it must be
    in. `if_right` is what all of this depends on, where only the user says so: a mapping of their
    own, or a family that they named and that does not match the LLM.
    """

    kind: Kind
    tokens: int | None = None
    transformers: tuple[str, ...] = ()
    if_right: str | None = None

    @classmethod
    def of(
        cls,
        limits: Iterable[Limit] = (),
        *,
        inexact: Iterable[str] = (),
        faults: Iterable[Fault] = (),
    ) -> Fidelity:
        """That of a target with these caveats; `inexact` are reasons why it is only near."""
        limits = tuple(limits)
        if tuple(faults):
            return cls("not_possible")
        if tuple(inexact) or not all(limit.is_bounded for limit in limits):
            return cls("not_exact")
        tokens = min((x.tokens for x in limits if x.tokens is not None), default=None)
        ranges = dict.fromkeys(x.transformers for x in limits if x.transformers is not None)
        if_right = next((x.if_right for x in limits if x.if_right is not None), None)
        kind: Kind = "exact" if tokens is None else "exact_up_to"
        return cls("exact_if_right" if if_right else kind, tokens, tuple(ranges), if_right)

    @property
    def is_possible(self) -> bool:
        return self.kind != "not_possible"

    def __str__(self) -> str:
        if self.kind == "not_possible":
            return "not possible, because"
        if self.kind == "not_exact":
            return "possible, not exact"
        up_to = "" if self.tokens is None else f" up to {self.tokens} tokens"
        versions = f" with transformers {', '.join(self.transformers)}" if self.transformers else ""
        if self.if_right is None:
            return f"exact{up_to}{versions}"
        return f"exact{up_to}{versions} if {self.if_right} is right; its logits were not compared"

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON, for a report on the target."""
        return {
            "verdict": self.kind,
            "exact_up_to": self.tokens,
            "transformers": list(self.transformers),
            "if_right": self.if_right,
        }
