"""What may differ in a target, and the limits within which it is exact."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.expressions import Environment, Expression, say, show
from xtuner2llava.mapping.names import TextTemplate
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Node

_BOUND = re.compile(r"(<=|>=|<|>) ?([0-9]{1,4}(?:\.[0-9]{1,4}){0,3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Limit:
    """A caveat that holds: its sentence, and within what the target is exact all the same.

    `tokens` counts those of one sequence, an image as its patches; `transformers` is a range of
    versions such as `>=4.38, <5.4`; `if_right` is what must be right, such as the user's own file.
    Without any of them, the target is not exact.
    """

    text: str
    tokens: int | None = None
    transformers: str | None = None
    if_right: str | None = None

    @classmethod
    def unproven(cls, what: str) -> Limit:
        """That the result depends on `what`, which only the user has vouched for.

        It can stand beside a caveat with which the target is not exact.
        """
        return cls(
            f"Correct only if {what} is right; its logits were not compared. "
            "`verify OUT --reference FILE.npz` compares them with the trained model's.",
            if_right=what,
        )

    @property
    def is_bounded(self) -> bool:
        """Whether anything is exact."""
        return not (self.tokens is None and self.transformers is None and self.if_right is None)


def _read_length(reader: Reader, node: Node) -> Expression:
    value = node.value
    if isinstance(value, int | float) and (isinstance(value, bool | float) or value <= 0):
        what = f"`exact_up_to` is {show(value)}, a number of tokens was expected"
        reader.fault(node.line, what)
    return reader.expression(node, "`exact_up_to`")


def _read_versions(reader: Reader, node: Node) -> str:
    text = reader.plain(str, node, "`transformers`")
    parts = [part.strip() for part in text.split(",")]
    if text and not all(_BOUND.fullmatch(part) for part in parts):
        what = f"`{text}` is not a range of versions"
        reader.fault(node.line, what, "Write it as in `>=4.38, <5.4`.")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caveat:
    """What may differ after the conversion, under a condition on a config."""

    TITLE: ClassVar = "a caveat"
    where: str
    when: Expression | None = None
    say: TextTemplate
    exact_up_to: Annotated[Expression | None, _read_length] = None
    transformers: Annotated[str | None, _read_versions] = None

    def limit(self, environment: Environment) -> Limit | None:
        """What it says of a config; None where it does not hold. Raises `MappingError`."""
        if self.when is not None and not self.when.condition(environment):
            return None
        tokens = None if self.exact_up_to is None else self.exact_up_to.integer(environment)
        if tokens == 0:
            raise MappingError(
                "`exact_up_to` is 0, a number of tokens was expected",
                where=self.where,
                advice="Where nothing is exact, leave it out.",
            )
        return Limit(say(self.say, environment), tokens, self.transformers)


def limits(caveats: Sequence[Caveat], environment: Environment) -> list[Limit]:
    """What those of `caveats` say that hold. Raises `MappingError`."""
    found = (caveat.limit(environment) for caveat in caveats)
    return [limit for limit in found if limit is not None]
