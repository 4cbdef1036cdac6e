#!/usr/bin/env python
"""Writes docs/cli.md from the commands; with --check, says whether the page is current."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click

from xtuner2llava.cli.commands import main
from xtuner2llava.cli.flags import grouped

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """\
# Command line

Written by `scripts/cli_docs.py` from `options.py`; do not edit it.

In Python, the functions of the same names take the same options, with the same defaults, as keyword
arguments: `--max-shard-size 2GB` is `max_shard_size="2GB"`, `--no-verify` is `verify=False`. The
options of `Talk`, `--dry-run` and `--dask` are those of the command line only.

Results go to stdout, everything else to stderr. The exit status is 0, 1 for what was refused or
failed, and 2 for a command that contradicts itself. With `--json`, an error is JSON on stdout too,
`{"error": {"type": "PlanError", "faults": [{"where": "", "what": "", "advice": ""}]}}`, where
`type` is the class of the [error](api.md#errors). Where stderr is not a terminal, `convert`,
`verify` and `push` write a line when a stage ends: time, stage, bytes, seconds.

For completion of commands, options, their values and families, add this to `~/.bashrc`, or the same
with `zsh` or `fish`: `eval "$(_XTUNER2LLAVA_COMPLETE=bash_source xtuner2llava)"`.
"""


def page() -> str:
    context = click.Context(main, info_name="xtuner2llava", **main.context_settings)
    return "\n".join([HEAD, *_commands(main, context)])


def _commands(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None:
            continue
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _commands(command, inner)
            continue
        usage = " ".join([inner.command_path, *command.collect_usage_pieces(inner)])
        yield f"## {inner.command_path}\n\n```\n{usage}\n```\n\n{cleandoc(command.help or '')}\n"
        for heading, options in grouped(command, inner).items():
            yield f"| {heading} | default | |\n|---|---|---|"
            yield from (_row(option, inner) for option in options)
            yield ""


def _row(option: click.Option, context: click.Context) -> str:
    names, text = option.get_help_record(context) or ("", "")
    words, _, default = text.partition("  [default: ")
    cells = (f"`{names}`", default.removesuffix("]"), words)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is not current: run scripts/cli_docs.py")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
