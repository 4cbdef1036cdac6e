"""The command line in the process of the tests, which has imported torch already."""

from __future__ import annotations

import os
from pathlib import Path
from subprocess import CompletedProcess

from click.testing import CliRunner

from xtuner2llava.cli.commands import main


def run(*arguments: object, cwd: Path | None = None) -> CompletedProcess[str]:
    """What `xtuner2llava ARGUMENTS` says, run in the folder `cwd`.

    What a program of its own could differ in, a test starts: signals, a terminal, variables that
    are read when a module is imported.
    """
    words = [*map(str, arguments)]
    before = Path.cwd()
    os.chdir(cwd or before)
    try:
        done = CliRunner().invoke(main, words, prog_name="xtuner2llava", catch_exceptions=False)
    finally:
        os.chdir(before)
    return CompletedProcess(words, done.exit_code, done.stdout, done.stderr)
