"""What a verification found: one row for each check, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xtuner2llava.errors import ConversionError
from xtuner2llava.storage.json_file import Json

OK = "ok"
FAILED = "FAILED"
WARNING = "warning"
SKIPPED = "skipped"
# Checks that others ask for by name.
TENSORS = "tensors against the checkpoint"
LOGITS = "logits against the trained model"
REFERENCE = "logits against the reference"

_SHOWN = 5
_WRONG_LOGITS = (
    "With a mapping of your own, compare with the model's code what names and shapes "
    "do not decide: gate and up, k and v, the order of the rows of a fused tensor, the config."
)
# A result with its detail.
Finding = tuple[str, str]


def judge(faults: Sequence[str], fine: str) -> Finding:
    """`FAILED` with the first few of `faults`; `OK` with the detail `fine` where there are none."""
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return (FAILED, "; ".join([*faults[:_SHOWN], *more])) if faults else (OK, fine)


@dataclass(frozen=True, slots=True)
class Check:
    """One row of a verification: `result` is "ok", "FAILED", "warning" or "skipped".

    A warning is what the folder alone does not decide; a skipped check was not made, and `detail`
    says why. Neither fails a verification.
    """

    name: str
    result: str
    detail: str

    @classmethod
    def failed(cls, name: str, error: ConversionError) -> Check:
        """A check that could not be made, because the files for it are damaged."""
        texts = [f"{f.where}: {f.what}" if f.where else f.what for f in error.faults]
        return cls(name, *judge(texts, ""))


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of a folder. `figures` are the numbers behind them, by part."""

    out: Path
    checks: tuple[Check, ...]
    figures: dict[str, Json] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.with_result(FAILED)

    def with_result(self, result: str) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.result == result)

    def named(self, name: str) -> Check:
        """The check called `name`. Raises `KeyError` if it was not made."""
        return {check.name: check for check in self.checks}[name]

    @property
    def proven(self) -> bool:
        """Whether everything is right, and the logits are those of the real model's own code."""
        return self.passed and any(c.name == REFERENCE and c.result == OK for c in self.checks)

    @property
    def verdict(self) -> str:
        """One sentence: whether the folder is right, and which checks were not made."""
        made = len(self.checks) - len(self.with_result(SKIPPED))
        wrong = [check.name for check in self.with_result(FAILED)]
        text = (
            f"NOT VERIFIED: {len(wrong)} of {made} checks failed: {', '.join(wrong)}."
            if wrong
            else f"Verified: {made} checks, none failed."
        )
        if {LOGITS, REFERENCE} & {*wrong}:
            text += f" {_WRONG_LOGITS}"
        for result, word in ((WARNING, "Warnings"), (SKIPPED, "Skipped")):
            names = [check.name for check in self.with_result(result)]
            text += f" {word}: {', '.join(names)}." if names else ""
        return f"{text} Exact: its logits are those of the reference." if self.proven else text

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "out": str(self.out),
            "passed": self.passed,
            "exact_by_reference": self.proven,
            "verdict": self.verdict,
            "checks": [
                {"check": c.name, "result": c.result, "detail": c.detail} for c in self.checks
            ],
            "figures": dict(self.figures),
        }
