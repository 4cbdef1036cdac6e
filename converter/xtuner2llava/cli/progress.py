"""What is said while a command runs: a bar on a terminal, else lines of the log; all on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from xtuner2llava.cli.terminal import printable
from xtuner2llava.options import OnProgress

_FORMAT, _TIME = "%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"


class _Handler(logging.Handler):
    """Writes each record as one line, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(self.format(record)).replace("\n", "\\n")
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
        else:
            click.echo(line, err=True)


def show_log(level: int) -> None:
    """Shows the log of the library from `level` on until the running command ends."""
    logger, handler = logging.getLogger("xtuner2llava"), _Handler()
    handler.setFormatter(logging.Formatter(_FORMAT, _TIME))
    before = logger.level

    def end() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before)

    logger.addHandler(handler)
    logger.setLevel(level)
    click.get_current_context().find_root().call_on_close(end)


@contextmanager
def progress(*, quiet: bool) -> Iterator[OnProgress]:
    """Takes (stage, bytes done, bytes in all) for a bar on a terminal.

    Without a terminal, a line for each stage says that it ended.
    """
    noted = click.get_current_context().obj
    on_terminal = sys.stderr.isatty()
    if not (quiet or on_terminal or noted["verbose"]):
        show_log(logging.INFO)
    bar: Any = None
    shown = ""

    def update(stage: str, done: int, total: int) -> None:
        nonlocal bar, shown
        if noted["interrupted"]:  # A library that was being imported may have swallowed it.
            raise KeyboardInterrupt
        if quiet or not on_terminal:
            return
        if bar is None or stage != shown:
            from tqdm import tqdm

            if bar is not None:
                bar.close()
            bar = tqdm(total=total, desc=stage, unit="B", unit_scale=True, leave=False)
            shown = stage
        bar.update(done - bar.n)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()
