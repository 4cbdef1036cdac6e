"""What a model becomes in a format."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner2llava.errors import Fault
from xtuner2llava.sources.json_file import Json
from xtuner2llava.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Target:
    """What an input can become in a format: its class there, or the reasons why it cannot.

    Where nothing but an option is missing, `needs` names it, `faults` say why, and `otherwise` is
    the verdict once it is given.
    """

    format: str
    architecture: str | None
    verdict: Verdict
    caveats: tuple[str, ...]
    faults: tuple[Fault, ...]
    needs: str | None = None
    otherwise: Verdict | None = None

    @property
    def is_possible(self) -> bool:
        return self.verdict.is_possible

    def __str__(self) -> str:
        """One line, without caveats and faults."""
        if self.needs is not None:
            return f"{self.otherwise} once {self.needs} is given, as {self.architecture}"
        become = f", as {self.architecture}" if self.is_possible else ""
        return f"{self.verdict}{become}"

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "format": self.format,
            "architecture": self.architecture,
            "possible": self.is_possible,
            **self.verdict.to_dict(),
            "needs": self.needs,
            "otherwise": None if self.otherwise is None else self.otherwise.to_dict(),
            "caveats": list(self.caveats),
            "faults": [str(fault) for fault in self.faults],
        }
