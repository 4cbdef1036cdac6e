"""Text for terminals: names in an untrusted file may hold control sequences."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

_MIN_COLUMN = 10  # characters; a narrower column is hard to read
_PARTS = re.compile(r"([\t\n\x0b\x0c\r ]+)|(?<=[./_])(?=\w)")


def printable(text: str) -> str:
    """`text` with all that is neither visible nor a line break or tab written as an escape.

    So no tensor name can move the cursor, hide what follows, or reverse the reading direction.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or char.isprintable() else _escaped(char) for char in text
    )


def one_line(text: str) -> str:
    """`text` from an untrusted file as one line: a name with line feeds shows them as escapes."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def shortened(text: str, longest: int = 4000) -> str:
    """`text`, of which the middle is left out if it has more than `longest` characters."""
    excess = len(text) - longest
    if excess <= 0:
        return text
    half = longest // 2
    return f"{text[:half]} [... {excess:,} characters ...] {text[-half:]}"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def open_closed_streams() -> None:
    """Makes /dev/null of each standard stream that this process was started without.

    Else the next file that is opened, such as a shard, is where everything for stderr goes.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # The system gives the lowest free number, which is the stream's.
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: PTH123, SIM115


def accept_any_text() -> None:
    """Makes stdout and stderr write what their encoding lacks as escapes, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def columns(stream: TextIO | None = None) -> int | None:
    """How many characters a line of `stream` has, stdout if None; None where it is not a terminal.

    Lines of a file or a pipe are not broken, so that `grep` finds what it looks for.
    """
    stream = sys.stdout if stream is None else stream
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrapped(text: str, width: int | None) -> str:
    """`text` with long lines broken at words, and what follows indented; as it is with None."""
    if width is None:
        return text
    return "\n".join(
        line if len(line) <= width else _broken(line, width) for line in text.split("\n")
    )


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, width: int | None = None) -> str:
    """Rows in aligned columns under a header, no wider than `width` or else the terminal.

    The widest columns are broken at words until the table fits.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    room = columns() if width is None else width
    excess = 0 if room is None else sum(widths) + 2 * (len(widths) - 1) - room
    while excess > 0 and max(widths) > _MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
        excess -= 1
    lines = []
    for row in (header, ["─" * width for width in widths], *rows):
        cells = [_lines(cell, width) for cell, width in zip(row, widths, strict=True)]
        for index in range(max(map(len, cells))):
            line = (cell[index] if index < len(cell) else "" for cell in cells)
            lines.append("  ".join(map(str.ljust, line, widths)).rstrip())
    return "\n".join(lines)


def _lines(cell: str, width: int) -> list[str]:
    """`cell` in lines, broken at words; after a dot, slash or underscore where a word is longer."""
    if len(cell) <= width:
        return [cell]
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False)
    if any(len(word) > width for word in cell.split()):
        wrapper.wordsep_simple_re = _PARTS
    return wrapper.wrap(cell)


def _broken(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
