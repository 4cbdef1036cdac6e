"""The options of `options.py` as flags of the command line, in groups."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import wraps
from os import PathLike
from typing import Any, TypeVar, get_origin

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from xtuner2llava.cli.progress import show_log
from xtuner2llava.errors import Fault, UsageError, raise_faults
from xtuner2llava.options import (
    GROUPS,
    TALK,
    CheckedOptions,
    check_argument,
    choices,
    flag,
    members,
)

Function = TypeVar("Function", bound=Callable[..., object])


class GroupedOption(click.Option):
    """An option that `--help` lists under the heading `group`."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` lists its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, options in grouped(self, ctx).items():
            records = [option.get_help_record(ctx) for option in options]
            with formatter.section(group):
                formatter.write_dl([record for record in records if record is not None])


def grouped(command: click.Command, ctx: click.Context) -> Mapping[str, list[click.Option]]:
    """The options of `command` under their headings, in the order of `GROUPS`."""
    found: dict[str, list[click.Option]] = {group: [] for group in GROUPS}
    for option in command.get_params(ctx):
        if isinstance(option, click.Option):
            group = option.group if isinstance(option, GroupedOption) else GROUPS[-1]
            found[group].append(option)
    return {group: options for group, options in found.items() if options}


class Choice(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """One of several words; for another one, the word that may have been meant is said."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = did_you_mean(str(value), self.choices)
            raise click.BadParameter(f"{error.message}{hint}", ctx, param) from None


class Group(click.Group):
    """Says which command may have been meant by one that there is not."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            ctx.fail(f"No such command '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)


def complete_path(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Leaves it to the shell, which knows its files; a text by itself completes to nothing."""
    return [CompletionItem(incomplete, type="file")]


def complete_mapping(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The shipped families, or a file."""
    from xtuner2llava.mapping.catalogue import Catalogue

    families = [name for name in Catalogue.shipped().families if name.startswith(incomplete)]
    return [*map(CompletionItem, families), *complete_path(ctx, parameter, incomplete)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence, where `word` is like one of those that are known."""
    found = get_close_matches(word, list(known), n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


def option(group: str, *declarations: str, **attributes: Any) -> Callable[[Function], Function]:
    """A flag that only the command line has."""
    return click.option(*declarations, cls=GroupedOption, group=group, **attributes)


def command(
    group: click.Group,
    kind: type[CheckedOptions],
    *arguments: str,
    name: str | None = None,
    talk: bool = True,
    without: Collection[str] = (),
) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a function a command of `group`, with a flag for each field of `kind` that has a help.

    Fields `without` effect on it have none.
    The function gets its arguments by name, one in brackets need not be given; `kind` as `options`;
    with `talk`, also `as_json` and `quiet`; and the flags that `option` has given it.
    """
    named = [each for each in fields(kind) if each.metadata and each.name not in without]

    def decorate(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def run(**given: Any) -> None:
            values = {each.name: given.pop(each.name) for each in named}
            options = kind(**values)
            _check_typed(values, options)
            function(**given, options=options)

        parameters = [_argument(each) for each in arguments] + [_flag(each) for each in named]
        parameters += getattr(function, "__click_params__", [])[::-1]
        run.__click_params__ = [*parameters, *(_talk() if talk else ())][::-1]  # type: ignore[attr-defined]
        return group.command(name, cls=GroupedCommand)(run)

    return decorate


def _check_typed(values: Mapping[str, object], options: CheckedOptions) -> None:
    """Raises `UsageError` where `options` hold something else than what was typed.

    --for sets --format and --model-type; their defaults, typed, are not known from defaults there.
    """
    ctx, faults = click.get_current_context(), []
    for name, value in values.items():
        is_typed = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_typed and value != (held := getattr(options, name)):
            faults.append(Fault(flag(name), f"is {value!r}, and --for sets {held!r}"))
    raise_faults(UsageError, faults)


def _argument(name: str) -> click.Argument:
    """A path, or what may stand for one; an empty text is neither."""

    def check(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            check_argument(parameter.human_readable_name, value)
        return value

    required = not name.startswith("[")
    return click.Argument(
        [name.strip("[]")], required=required, callback=check, shell_complete=complete_path
    )


def _talk() -> list[click.Parameter]:
    """The flags of what is said, which every command has."""

    def show_details(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
        ctx.obj["verbose"] = value
        if value:
            show_log(logging.DEBUG)
        return value

    def calm_the_hub(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
        """Without a terminal, no bars of huggingface_hub; with --quiet, no warnings either."""
        if value or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if value:
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        return value

    return [
        GroupedOption(
            ["--json", "as_json"], group=TALK, is_flag=True, help="The result as JSON on stdout."
        ),
        GroupedOption(
            ["-v", "--verbose"], group=TALK, is_flag=True, callback=show_details,
            expose_value=False, help="What is read from where, each shard, tracebacks.",
        ),
        GroupedOption(
            ["-q", "--quiet"], group=TALK, is_flag=True, callback=calm_the_hub,
            help="Only errors on stderr.",
        ),
    ]  # fmt: skip


def _flag(each: Field[Any]) -> GroupedOption:
    data, name = each.metadata, flag(each.name)
    default = None if each.default is MISSING else each.default
    attributes: dict[str, Any] = {
        "group": data["group"],
        "help": data["help"] + (f"  [default: {data['unset']}]" if data["unset"] else ""),
        "default": default,
    }
    if each.type is bool:
        declared = f"{name}/--no-{name[2:]}" if default else name
        return GroupedOption(
            [declared, each.name], is_flag=True, show_default=bool(default), **attributes
        )
    known, kinds = choices(each.type), members(each.type)
    numeric = next((kind for kind in (int, float) if kind in kinds), str)
    if PathLike in map(get_origin, kinds):
        complete = complete_mapping if each.name == "mapping" else complete_path
        attributes["shell_complete"] = complete
    return GroupedOption(
        [name, each.name],
        type=Choice(known) if known else numeric,
        metavar=data["metavar"] or None,
        show_default=default is not None,
        **attributes,
    )
