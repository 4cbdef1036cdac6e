"""A verification as text for a terminal."""

from __future__ import annotations

from xtuner2llava.cli.terminal import columns, table
from xtuner2llava.verification.outcome import Verification

_WIDTH = 110  # characters, where the output is not a terminal


def render_verification(verification: Verification) -> str:
    """One row for each check, its detail wrapped, and the verdict."""
    rows = [(check.name, check.result, check.detail) for check in verification.checks]
    text = table(rows, ("check", "result", "detail"), width=columns() or _WIDTH)
    return "\n".join([f"{verification.out}:", "", text, "", verification.verdict])
