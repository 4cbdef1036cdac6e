"""Text for terminals: names in a stranger's file may hold commands to them."""

from __future__ import annotations

import io
import sys


def printable(text: str) -> str:
    """`text` with all that is neither visible nor a line break or tab written as an escape.

    So no tensor name can move the cursor, hide what follows, or reverse the reading direction.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or char.isprintable() else _escaped(char) for char in text
    )


def shortened(text: str, longest: int = 4000) -> str:
    """`text`, of which the middle is left out if it has more than `longest` characters."""
    surplus = len(text) - longest
    if surplus <= 0:
        return text
    half = longest // 2
    return f"{text[:half]} [... {surplus:,} characters ...] {text[-half:]}"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def accept_any_text() -> None:
    """Makes stdout and stderr write what their encoding lacks as escapes, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
