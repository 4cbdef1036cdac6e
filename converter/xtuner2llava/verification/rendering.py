"""A verification as text for a terminal."""

from __future__ import annotations

import textwrap

from xtuner2llava.verification.outcome import Verification

_WIDTH = 110


def render_verification(verification: Verification) -> str:
    """One row for each check, its detail wrapped, and the verdict."""
    width = max((len(check.name) for check in verification.checks), default=0)
    lines = [f"{verification.out}:", "", f"{'check'.ljust(width)}  result   detail"]
    lines.append(f"{'─' * width}  ───────  {'─' * max(6, _WIDTH - width - 11)}")
    indent = " " * (width + 11)
    for check in verification.checks:
        head = f"{check.name.ljust(width)}  {check.result.ljust(7)}  "
        wrapped = textwrap.wrap(check.detail, max(40, _WIDTH - len(indent)), break_on_hyphens=False)
        lines.append((head + (wrapped[0] if wrapped else "")).rstrip())
        lines += [indent + line for line in wrapped[1:]]
    return "\n".join([*lines, "", verification.verdict])
