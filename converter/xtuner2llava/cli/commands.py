"""The command line: parses, calls the API, shows progress and reports.

Data goes to stdout, talk to stderr. Exit status: 0 done, 1 refused or failed, 2 usage.
What is heavy is imported where it is used, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from xtuner2llava.cli import flags
from xtuner2llava.cli.progress import progress, show_log
from xtuner2llava.cli.terminal import accept_any_text, columns, printable, shortened, wrapped
from xtuner2llava.errors import ConversionError, Fault, listed
from xtuner2llava.options import (
    OUTPUT,
    SPEED,
    TALK,
    ConvertOptions,
    InspectOptions,
    Options,
    PushOptions,
    SourceOptions,
    TryOptions,
    VerifyOptions,
    check_argument,
    parse_size,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from xtuner2llava.planning.plan import Plan

# More do not help; the API has all.
_MAX_FAULTS = 200


class _Group(flags.Group):
    """Turns errors into messages, and exceptions of Ctrl-C and bugs into short ones.

    With --json, an error is JSON on stdout too: for pipelines, which read nothing else.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # What the group must know of errors, also where the arguments are not understood.
        ctx.obj = {"json": "--json" in args, "verbose": False, "interrupted": False}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConversionError as error:
            _tell_faults(error)
            _end(ctx, error, error.faults, error.exit_status)
        except click.UsageError as error:
            if ctx.obj["json"]:
                _print_error("UsageError", [_usage_fault(error)])
            raise
        except KeyboardInterrupt as error:
            what = f"Interrupted. {error}".strip()
            _say(what, err=True)
            _end(ctx, error, [Fault("", what)], 130)
        except BrokenPipeError:
            ctx.exit(1)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            fault = Fault(
                "",
                f"{type(error).__name__}: {error}",
                "This is a fault of xtuner2llava. Please report it with what -v prints.",
            )
            _say(f"Error: {fault.what}\n{fault.advice}", err=True)
            _end(ctx, error, [fault], 1)
        return None


def _end(ctx: click.Context, error: BaseException, faults: Sequence[Fault], status: int) -> None:
    if ctx.obj["verbose"]:
        traceback.print_exception(error)
    if ctx.obj["json"]:
        _print_error(type(error).__name__, faults)
    ctx.exit(status)


def _print_error(kind: str, faults: Sequence[Fault]) -> None:
    _print_json({"error": {"type": kind, "faults": [asdict(fault) for fault in faults]}})


def _usage_fault(error: click.UsageError) -> Fault:
    """What click found wrong with the arguments."""
    where = error.ctx.command_path if error.ctx is not None else ""
    if isinstance(error, click.NoSuchOption):
        where = error.option_name
    elif isinstance(error, click.BadParameter) and error.param is not None:
        where = error.param.opts[0]
    return Fault(where, error.format_message(), f"See `{where} --help`." if " " in where else "")


def _answer_interrupts(ctx: click.Context) -> None:
    """Makes Ctrl-C answer at once, though threads may need a moment; a second one ends at once."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        return  # Whoever started this process in the background has it ignore Ctrl-C.

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        ctx.obj["interrupted"] = True
        # Not through a buffer, whose writing may be what is being interrupted.
        os.write(2, b"\nStopping; Ctrl-C again ends at once.\n")
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    ctx.call_on_close(lambda: signal.signal(signal.SIGINT, before))


def _fitting_threads(options: ConvertOptions) -> Callable[[Plan], None]:
    """What has torch use as many threads for each job that computes as there are cores for it.

    With more, each product of matrices waits for threads that wait for a core. The library leaves
    that number alone, which belongs to the whole process; here, the process is ours.
    """

    def fit(plan: Plan) -> None:
        from xtuner2llava.writing import computing_jobs

        memory = parse_size(options.max_memory)
        computing = computing_jobs(plan.shards.shards, options.jobs, memory)
        if computing:
            import torch

            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // computing)))

    return fit


def _say(text: str, *, err: bool = False) -> None:
    click.echo(wrapped(printable(text), columns(sys.stderr if err else sys.stdout)), err=err)


def _tell_faults(error: ConversionError) -> None:
    count, texts = len(error.faults), listed(error.faults)
    head = f"Error, {count} faults:" if count > 1 else "Error:"
    click.echo(click.style(head, fg="red", bold=True), err=True)
    for text in texts[:_MAX_FAULTS]:
        _say(f"  {_indent(shortened(text))}", err=True)
    if len(texts) > _MAX_FAULTS:
        _say(f"  and {len(texts) - _MAX_FAULTS:,} more", err=True)


def _indent(text: str) -> str:
    return text.replace("\n", "\n  ")


def _remember_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.obj["verbose"] = value
    if value:
        show_log(logging.DEBUG)
    return value


def _calm_the_hub(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Without a terminal, no bars of huggingface_hub; with --quiet, no warnings of its either."""
    if value or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if value:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    return value


def _talk(command: flags.Function) -> flags.Function:
    """The flags of what is said, which every command has."""
    for option in (
        flags.option(TALK, "-q", "--quiet", is_flag=True, callback=_calm_the_hub,
                     help="Only errors on stderr."),
        flags.option(TALK, "-v", "--verbose", is_flag=True, callback=_remember_verbose,
                     expose_value=False, help="What is read from where, each shard, tracebacks."),
        flags.option(TALK, "--json", "as_json", is_flag=True, help="The result as JSON on stdout."),
    ):  # fmt: skip
        command = option(command)
    return command


def _argument(name: str, *, required: bool = True) -> Callable[[flags.Function], flags.Function]:
    """A path, or what may stand for one; an empty text is neither."""

    def check(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            check_argument(parameter.human_readable_name, value)
        return value

    return click.argument(
        name, required=required, callback=check, shell_complete=flags.complete_path
    )


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xtuner2llava")
@click.pass_context
def main(ctx: click.Context, /) -> None:
    """Converts LLaVA models trained with XTuner to official LLaVA and transformers.

    CHECKPOINT is an iter_N.pth file, a DeepSpeed iter_N.pth/ directory, an iter_N_xtuner/ folder,
    or a Hub repo id of such a folder.
    """
    # Threads of torch that wait for work shall not spin: the cores are needed for hashing. It must
    # be said before torch is imported; the library leaves it to whoever owns the process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _answer_interrupts(ctx)
    accept_any_text()


@main.command(cls=flags.GroupedCommand)
@_argument("checkpoint")
@_argument("out")
@flags.takes(ConvertOptions)
@flags.option(SPEED, "--dask", metavar="ADDRESS",
              help="Have the workers of this Dask scheduler write the shards; they must see the "
              "same paths.")  # fmt: skip
@flags.option(OUTPUT, "--dry-run", is_flag=True, help="The same as `plan`.")
@_talk
def convert(
    checkpoint: str,
    out: str,
    dask: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Convert CHECKPOINT into the folder OUT.

    OUT is a new or empty folder. If it holds this conversion, there is nothing to do; if it holds
    an unfinished one, that goes on where it stopped. Anything else needs --overwrite.
    """
    options = flags.collect(ConvertOptions, given)
    if dry_run:
        _show_plan(checkpoint, as_json, flags.collect(Options, given))
        return
    from xtuner2llava.conversion import convert as run

    with ExitStack() as stack:
        executor: Executor | None = None
        if dask is not None:
            from xtuner2llava.cli.dask_cluster import dask_executor

            executor = stack.enter_context(dask_executor(dask))
        options = replace(
            options,
            executor=executor,
            on_plan=None if executor else _fitting_threads(options),
            on_progress=stack.enter_context(progress(quiet=quiet)),
        )
        report = run(checkpoint, out, options)
    if as_json:
        _print_json(report.to_dict())
    elif not quiet:
        from xtuner2llava.cli.rendering import render_report

        _say(render_report(report))


@main.command(cls=flags.GroupedCommand)
@_argument("out")
@_argument("repo_id")
@flags.takes(PushOptions)
@_talk
def push(out: str, repo_id: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Publish OUT on the Hugging Face Hub as REPO_ID.

    OUT is what `convert` wrote, and is checked first. One commit makes it visible; what the Hub has
    already is not sent again, so a run that failed is repeated with the same command.
    """
    from xtuner2llava.conversion import push as run

    options = flags.collect(PushOptions, given)
    with progress(quiet=quiet) as on_progress:
        pushed = run(out, repo_id, replace(options, on_progress=on_progress))
    if as_json:
        _print_json(pushed.to_dict())
    elif not quiet:
        from xtuner2llava.cli.rendering import render_pushed

        _say(render_pushed(pushed))


@main.command("try", cls=flags.GroupedCommand)
@_argument("out")
@_argument("image")
@click.argument("question", required=False)
@flags.takes(TryOptions)
@_talk
def try_model(
    out: str, image: str, question: str | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Ask the model in OUT a QUESTION about the picture IMAGE.

    It is asked with the prompt that it was trained with, and answers greedily, here, on a GPU if
    there is one. A QUESTION with <image> in it is the whole prompt.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from xtuner2llava.cli.rendering import size
    from xtuner2llava.inference.answering import QUESTION, answer, memory_needed

    folder = Path(out)
    if not quiet:
        _say(f"Loading {size(memory_needed(folder))} of weights into memory.", err=True)
    options = flags.collect(TryOptions, given)
    if not as_json:
        options = replace(options, on_text=lambda text: click.echo(text, nl=False))
    found = answer(folder, Path(image), question or QUESTION, options)
    if as_json:
        _print_json(found.to_dict())
    else:
        click.echo()


@main.command(cls=flags.GroupedCommand)
@_argument("out")
@flags.takes(VerifyOptions)
@_talk
@click.pass_context
def verify(ctx: click.Context, /, out: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Check OUT: by itself, against its checkpoint, and at work.

    OUT is a folder that `convert` wrote, or the Hub repo id, owner/name, of a model that `push`
    published: then its small files, headers and sizes are checked there, and no tensor is
    downloaded.
    """
    options = flags.collect(VerifyOptions, given)
    # Configs of LLaVA are not transformers' own, of which it would warn.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from xtuner2llava.cli.rendering import render_verification
    from xtuner2llava.verification import verify_folder

    with progress(quiet=quiet) as on_progress:
        verification = verify_folder(out, replace(options, on_progress=on_progress))
    if as_json:
        _print_json(verification.to_dict())
    elif not quiet:
        _say(render_verification(verification))
    elif not verification.passed:
        _say(verification.verdict, err=True)
    if not verification.passed:
        ctx.exit(1)


@main.command(cls=flags.GroupedCommand)
@_argument("checkpoint")
@flags.takes(Options)
@flags.option(TALK, "--tensors", is_flag=True, help="Also show every tensor, by kind.")
@_talk
def plan(checkpoint: str, tensors: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show what convert would do, and write nothing.

    Only headers and small files are read.
    """
    _show_plan(checkpoint, as_json, flags.collect(Options, given), tensors=tensors)


def _show_plan(checkpoint: str, as_json: bool, options: Options, *, tensors: bool = False) -> None:
    from xtuner2llava.conversion import plan as make

    made = make(checkpoint, options)
    if as_json:
        _print_json(made.to_dict())
    else:
        from xtuner2llava.cli.rendering import render_plan

        _say(render_plan(made, tensors=tensors))


@main.command(cls=flags.GroupedCommand)
@_argument("checkpoint")
@flags.takes(InspectOptions)
@_talk
def inspect(checkpoint: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show what CHECKPOINT is, and what it can become.

    For each format there is a verdict: exact, exact up to so many tokens (images counted as their
    patches), exact if a mapping of your own is right, possible but not exact, or not possible and
    why. With --json these are `verdict`, `exact_up_to`, `transformers`, the versions with which it
    holds, and `if_right`.

    Also takes an XTuner config .py, before training: what will come of it.
    """
    options = flags.collect(InspectOptions, given)
    from xtuner2llava.conversion import inspect as look

    found = look(checkpoint, options)
    if as_json:
        _print_json(found.to_dict())
    else:
        from xtuner2llava.cli.rendering import render_inspection

        _say(render_inspection(found, checkpoint))
    if not found.is_possible:
        click.get_current_context().exit(1)


@main.group(cls=flags.Group)
def mappings() -> None:
    """LLM families and formats: list, show, check, or draft.

    A mapping says what each tensor of an LLM becomes. A file of your own can be checked, and
    drafted from a checkpoint.
    """


@mappings.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def list_mappings(as_json: bool) -> None:
    """The shipped families and formats, and what each becomes."""
    from xtuner2llava.cli.terminal import table
    from xtuner2llava.mapping import Catalogue

    catalogue = Catalogue.shipped()
    rows = [
        ("family", name, found.llms or "", found.target_class.architecture)
        for name, found in catalogue.families.items()
    ]
    for name, described in catalogue.formats.items():
        classes = dict.fromkeys(c.architecture for c in described.classes.values())
        rows.append(("format", name, "", ", ".join(classes)))
    header = ("kind", "name", "llms", "becomes")
    if as_json:
        _print_json([dict(zip(header, row, strict=True)) for row in rows])
    else:
        _say(table(rows, header))


@mappings.command("show")
@click.argument("name", shell_complete=flags.complete_mapping)
def show_mapping(name: str) -> None:
    """The YAML of a shipped family, format or class."""
    from xtuner2llava.mapping import Catalogue

    click.echo(Catalogue.shipped().text_of(name), nl=False)


@mappings.command("check", cls=flags.GroupedCommand)
@_argument("file")
@_argument("checkpoint", required=False)
@flags.takes(SourceOptions)
@_talk
def check_mapping(
    file: str, checkpoint: str | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Check a mapping FILE, and whether it fits CHECKPOINT.

    Without CHECKPOINT, the file alone is checked; with it, as `plan` would.
    """
    from xtuner2llava.errors import MappingError, raise_faults
    from xtuner2llava.mapping import Catalogue

    raise_faults(MappingError, Catalogue.shipped().check(Path(file)))
    if checkpoint is not None:
        # Which name the tower is published under does not matter to the mapping, nor does which
        # of the formats that have its class.
        named = {**given, "mapping": file, "vision_tower_name": "the vision tower"}
        plain = Catalogue.shipped().with_family_file(Path(file)).target_class.name
        if plain not in Catalogue.shipped().formats["llava"].classes:
            named["format"] = "hf"
        options = flags.collect(Options, named)
        if as_json:
            _show_plan(checkpoint, as_json, options)
            return
        from xtuner2llava.conversion import plan as make

        made = make(checkpoint, options)
        if not quiet:
            count = sum(tensor.component == "llm" for tensor in made.tensors)
            _say(f"{file}: fits {checkpoint}: {count} tensors of {made.architecture}")
    elif not quiet:
        _say(f"{file}: no faults")


@mappings.command("draft", cls=flags.GroupedCommand)
@_argument("checkpoint")
@flags.takes(SourceOptions)
def draft_mapping(checkpoint: str, **given: Any) -> None:
    """Print a starter mapping for the LLM of CHECKPOINT."""
    from xtuner2llava.errors import CheckpointError, raise_faults
    from xtuner2llava.mapping import Catalogue, draft
    from xtuner2llava.sources import open_checkpoint

    opened = open_checkpoint(checkpoint, flags.collect(SourceOptions, given))
    config = opened.llm.config.values if opened.llm.config else {}
    shapes = {name: tensor.shape for name, tensor in opened.llm.tensors.items()}
    raise_faults(CheckpointError, [] if shapes and config else opened.faults)
    _say(draft(config, shapes, Catalogue.shipped()).rstrip("\n"))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False, metavar="[DIR]")
@click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr.")
def demo(folder: Path | None, quiet: bool) -> None:
    """Make a tiny XTuner checkpoint in DIR and convert it.

    DIR is `demo` if none is given. What is done is shown with its commands.
    """
    from xtuner2llava.cli.demo import run_demo

    run_demo(folder or Path("demo"), lambda text: None if quiet else _say(text))


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
