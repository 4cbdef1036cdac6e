"""The options of `options/` as flags of the command line, in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from os import PathLike
from typing import Any, TypeVar, get_origin

import click
from click.shell_completion import CompletionItem

from xtuner2llava.options import GROUPS, CheckedOptions, choices, flag, members

Function = TypeVar("Function", bound=Callable[..., object])
_Options = TypeVar("_Options", bound=CheckedOptions)


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
    from xtuner2llava.mapping import Catalogue

    families = [name for name in Catalogue.shipped().families if name.startswith(incomplete)]
    return [*map(CompletionItem, families), *complete_path(ctx, parameter, incomplete)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence, where `word` is like one of those that are known."""
    found = get_close_matches(word, list(known), n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


def option(group: str, *declarations: str, **attributes: Any) -> Callable[[Function], Function]:
    """A flag that only the command line has."""
    return click.option(*declarations, cls=GroupedOption, group=group, **attributes)


def takes(kind: type[CheckedOptions]) -> Callable[[Function], Function]:
    """Gives a command a flag for every field of `kind` that has a help text."""

    def decorate(command: Function) -> Function:
        for each in reversed(fields(kind)):
            if each.metadata:
                command = _flag(each)(command)
        return command

    return decorate


def collect(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """The options of `kind` among the values that click parsed, with others that were `given`."""
    return kind(**{each.name: given[each.name] for each in fields(kind) if each.name in given})


def _flag(each: Field[Any]) -> Callable[[Function], Function]:
    data, name = each.metadata, flag(each.name)
    default = None if each.default is MISSING else each.default
    help = data["help"] + (f"  [default: {data['unset']}]" if data["unset"] else "")
    attributes: dict[str, Any] = {"help": help, "default": default}
    if each.type is bool:
        declared = f"{name}/--no-{name[2:]}" if default else name
        attributes |= {"is_flag": True, "show_default": bool(default)}
        return option(data["group"], declared, each.name, **attributes)
    known, kinds = choices(each.type), members(each.type)
    numeric = next((kind for kind in (int, float) if kind in kinds), str)
    if known:
        attributes["type"] = Choice(known)
    else:
        attributes["type"] = numeric
    if PathLike in map(get_origin, kinds):
        complete = complete_mapping if each.name == "mapping" else complete_path
        attributes["shell_complete"] = complete
    attributes["metavar"] = data["metavar"] or None
    return option(data["group"], name, each.name, show_default=default is not None, **attributes)
