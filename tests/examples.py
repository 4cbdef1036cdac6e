"""Commands and programs in Markdown, run as a reader would, and held to what the page shows.

A ```console block holds commands after `$`, each with what it prints; a line `...` stands for any
lines, `...` within a line for any text. A command that shows `Error` must fail, and every other one
succeed. Without shown output, anything may be printed. Python blocks run too. What a command prints
goes to a terminal of 80 columns.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[\w ]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# A command, which goes on after a backslash, and its output.
COMMAND = re.compile(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", re.DOTALL)
# Seconds, and the bytes of a folder, which change with the words of its model card.
CHANGING = re.compile(r"\b\d+\.\d s\b|\b\d+\.\d\d kB(?= in \d+ shard)")
# The lines that a command writes about its stages where stderr is not a terminal, as here.
LOG = re.compile(r"^\d{4}-\d\d-\d\dT[\d:]{8} .*\n", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A command of a shell with what it shows, or the text of a Python program."""

    language: str
    text: str
    shown: str = ""


def blocks(page: Path) -> Iterator[re.Match[str]]:
    yield from BLOCK.finditer(page.read_text(encoding="utf-8"))


def examples(page: Path) -> Iterator[Example]:
    for block in blocks(page):
        if block["reason"] is not None:
            continue
        if block["language"] == "python":
            yield Example("python", block["text"])
        if block["language"] == "console":
            for part in re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]:
                command, output = COMMAND.fullmatch(part).groups()  # type: ignore[union-attr]
                yield Example("console", command, output)


def pattern(shown: str) -> re.Pattern[str]:
    """What matches the output that a page shows."""
    lines = CHANGING.sub("N", shown).rstrip().split("\n")
    text = "".join(
        "(?:.*\n)*?" if line == "..." else re.escape(line).replace(re.escape("..."), ".*") + "\n"
        for line in lines
    )
    return re.compile(text)


def fault(example: Example, status: int, printed: str) -> str | None:
    """How a command behaved other than its page shows; None if it did not."""
    if (status != 0) != example.shown.startswith("Error"):
        return f"exit status {status}"
    if example.shown and not pattern(example.shown).fullmatch(
        CHANGING.sub("N", printed.rstrip()) + "\n"
    ):
        return "other output"
    return None


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The exit status, and what stands on a terminal, then what was said of errors."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=theirs, stderr=errors
        ) as process,
    ):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux ends a pseudo terminal with EIO.
            pass
        os.close(ours)
        status = process.wait()
        errors.seek(0)
        said = errors.read().decode()
    return status, shown.decode().replace("\r\n", "\n") + LOG.sub("", said)


def mismatch(example: Example, folder: Path, environment: dict[str, str]) -> str | None:
    """How an example differs from its page, with what it prints; None if it does not."""
    command = ["bash", "-c", example.text]
    if example.language == "python":
        command = [sys.executable, "-W", "error", "-c", example.text]
    status, printed = run(command, folder, environment)
    found = fault(example, status, printed)
    return None if found is None else f"{found}\n{example.text}\n{printed}"
