"""The command line: parses, calls the API, shows progress and reports.

Data goes to stdout, talk to stderr. Exit status: 0 done, 1 refused or failed, 2 usage.
What is heavy is imported where it is used, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from xtuner2llava.cli import flags
from xtuner2llava.cli.progress import progress
from xtuner2llava.cli.terminal import (
    accept_any_text,
    columns,
    open_closed_streams,
    printable,
    shortened,
    wrapped,
)
from xtuner2llava.errors import ConversionError, Fault, UsageError, listed, refused_path
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
    decided,
    parse_size,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from xtuner2llava.planning.plan import Plan
    from xtuner2llava.storage.json_file import Json

# More do not help; the API has all.
_MAX_FAULTS = 200


class _Result(Protocol):
    def to_dict(self) -> dict[str, Json]: ...


_R = TypeVar("_R", bound=_Result)


class _Group(flags.Group):
    """Turns errors into messages, and exceptions of Ctrl-C and bugs into short ones.

    With --json, an error is JSON on stdout too: for pipelines, which read nothing else.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        open_closed_streams()
        # What the group must know of errors, also where the arguments are not understood.
        ctx.obj = {"json": "--json" in args, "verbose": False, "interrupted": False}
        with _wrong_calls_as_json(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _wrong_calls_as_json(ctx):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            ctx.exit(1)
        except (Exception, KeyboardInterrupt) as error:
            kind, faults, status = _described(error)
            if isinstance(error, KeyboardInterrupt):
                _say(faults[0].what, err=True)
            else:
                _tell(faults)
            if ctx.obj["verbose"]:
                click.echo(printable("".join(traceback.format_exception(error))), err=True)
            if ctx.obj["json"]:
                with suppress(OSError):  # It may be stdout that cannot be written.
                    _print_error(kind, faults)
            ctx.exit(status)


@contextmanager
def _wrong_calls_as_json(ctx: click.Context) -> Iterator[None]:
    """Prints the JSON of a call that click does not understand, if JSON was asked for."""
    try:
        yield
    except click.UsageError as error:
        if ctx.obj["json"]:
            _print_error("UsageError", [_usage_fault(error)])
        raise


def _described(error: BaseException) -> tuple[str, Sequence[Fault], int]:
    """The class of an error, what is said of it, and the exit status."""
    match error:
        case ConversionError():
            return type(error).__name__, error.faults, error.exit_status
        case KeyboardInterrupt():
            return "KeyboardInterrupt", [Fault("", f"Interrupted. {error}".strip())], 130
        case OSError(strerror=str()):
            return _described(refused_path(error))
    advice = "This is a fault of xtuner2llava. Please report it with what -v prints."
    name = type(error).__name__
    return name, [Fault("", f"{name}: {error}", advice)], 1


def _usage_fault(error: click.UsageError) -> Fault:
    """What click found wrong with the arguments."""
    where = error.ctx.command_path if error.ctx is not None else ""
    if isinstance(error, click.NoSuchOption):
        where = error.option_name
    elif isinstance(error, click.BadParameter) and error.param is not None:
        where = error.param.opts[0]
    return Fault(where, error.format_message(), f"See `{where} --help`." if " " in where else "")


def _tell(faults: Sequence[Fault]) -> None:
    texts = listed(faults)
    head = f"Error, {len(faults)} faults:" if len(faults) > 1 else "Error:"
    click.echo(click.style(head, fg="red", bold=True), err=True)
    if len(texts) > _MAX_FAULTS:
        texts[_MAX_FAULTS:] = [f"and {len(texts) - _MAX_FAULTS:,} more"]
    for text in texts:
        _say("  " + shortened(text).replace("\n", "\n  "), err=True)


def _say(text: str, *, err: bool = False) -> None:
    click.echo(wrapped(printable(text), columns(sys.stderr if err else sys.stdout)), err=err)


def _print_json(value: object) -> None:
    """As ASCII: JSON in any encoding, in which no name can hold a control sequence."""
    click.echo(json.dumps(value, indent=2))


def _print_error(kind: str, faults: Sequence[Fault]) -> None:
    _print_json({"error": {"type": kind, "faults": [asdict(fault) for fault in faults]}})


def _show(result: _R, render: Callable[[_R], str], *, as_json: bool, quiet: bool = False) -> None:
    """The result of a command on stdout: as JSON, as text, or not at all."""
    if as_json:
        _print_json(result.to_dict())
    elif not quiet:
        _say(render(result))


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


def _fit_threads(options: ConvertOptions, plan: Plan) -> None:
    """Has torch use as many threads for each job that computes as there are cores for it.

    With more, each product of matrices waits for threads that wait for a core. The library leaves
    that number alone, which belongs to the whole process; here, the process is ours.
    """
    from xtuner2llava.writing.writer import computing_jobs

    memory = parse_size(options.max_memory)
    computing = computing_jobs(plan.shards.shards, options.jobs, memory)
    if computing:
        import torch

        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // computing)))


@contextmanager
def _dask_executor(address: str) -> Iterator[Executor]:
    """The workers of the scheduler at `address`, such as "tcp://scheduler:8786".

    A shard whose worker dies is written by another one: the scheduler tries again. Raises
    `UsageError` if Dask is not installed, or no scheduler answers there.
    """
    try:
        from distributed import Client  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UsageError(
            f"Dask is not installed ({error})",
            where="--dask",
            advice="Install it: pip install distributed",
        ) from None
    try:
        client: Any = Client(address, timeout="10s", set_as_default=False)  # type: ignore[no-untyped-call,unused-ignore]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no scheduler answers at {address} ({str(error).strip() or type(error).__name__})",
            where="--dask",
            advice="Give the address that `dask scheduler` shows, such as tcp://host:8786.",
        ) from error
    with client:
        executor: Executor = client.get_executor(pure=False)
        yield executor


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xtuner2llava")
@click.pass_context
def main(ctx: click.Context, /) -> None:
    """Converts LLaVA models trained with XTuner to official LLaVA and transformers.

    CHECKPOINT is an iter_N.pth file, a DeepSpeed iter_N.pth/ directory, an iter_N_xtuner/ folder,
    or a Hub repo id of such a folder.
    """
    # Threads of torch and numpy that wait for work must not spin: the cores are needed for hashing.
    # Both read this when they are imported. The library leaves it to whoever owns the process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _answer_interrupts(ctx)
    accept_any_text()


@flags.command(main, ConvertOptions, "checkpoint", "out")
@flags.option(SPEED, "--dask", metavar="ADDRESS",
              help="Have the workers of this Dask scheduler write the shards; they must see the "
              "same paths.")  # fmt: skip
@flags.option(OUTPUT, "--dry-run", is_flag=True, help="The same as `plan`.")
def convert(
    checkpoint: str,
    out: str,
    *,
    options: ConvertOptions,
    dask: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert CHECKPOINT into the folder OUT.

    OUT is a new or empty folder. If it holds this conversion, there is nothing to do; if it holds
    an unfinished one, that goes on where it stopped. Anything else needs --overwrite.
    """
    if dry_run:
        _show_plan(checkpoint, options, as_json=as_json)
        return
    from xtuner2llava.cli.rendering import render_report
    from xtuner2llava.conversion import convert as run

    with ExitStack() as stack:
        if dask is None:
            options = replace(options, on_plan=partial(_fit_threads, options))
        else:
            options = replace(options, executor=stack.enter_context(_dask_executor(dask)))
        on_progress = stack.enter_context(progress(quiet=quiet))
        report = run(checkpoint, out, replace(options, on_progress=on_progress))
    _show(report, render_report, as_json=as_json, quiet=quiet)


@flags.command(main, PushOptions, "out", "repo_id")
def push(out: str, repo_id: str, *, options: PushOptions, as_json: bool, quiet: bool) -> None:
    """Publish OUT on the Hugging Face Hub as REPO_ID.

    OUT is what `convert` wrote, and is checked first. One commit makes it visible; what the Hub has
    already is not sent again, so a run that failed is repeated with the same command.
    """
    from xtuner2llava.cli.rendering import render_pushed
    from xtuner2llava.conversion import push as run

    with progress(quiet=quiet) as on_progress:
        pushed = run(out, repo_id, replace(options, on_progress=on_progress))
    _show(pushed, render_pushed, as_json=as_json, quiet=quiet)


@flags.command(main, TryOptions, "out", "image", "[question]", name="try")
def try_model(
    out: str, image: str, question: str | None, *, options: TryOptions, as_json: bool, quiet: bool
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
    if not as_json:
        options = replace(options, on_text=lambda text: click.echo(printable(text), nl=False))
    found = answer(folder, Path(image), question or QUESTION, options)
    _show(found, lambda _: "", as_json=as_json)  # The text is there already.


@flags.command(main, VerifyOptions, "out")
def verify(out: str, *, options: VerifyOptions, as_json: bool, quiet: bool) -> None:
    """Check OUT: by itself, against its checkpoint, and at work.

    OUT is a folder that `convert` wrote, or the Hub repo id, owner/name, of a model that `push`
    published: then its small files, headers and sizes are checked there, and no tensor is
    downloaded.
    """
    # Configs of LLaVA are not transformers' own, of which it would warn.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from xtuner2llava.cli.rendering import render_verification
    from xtuner2llava.verification.run import verify_folder

    with progress(quiet=quiet) as on_progress:
        verification = verify_folder(out, replace(options, on_progress=on_progress))
    _show(verification, render_verification, as_json=as_json, quiet=quiet)
    if not verification.passed:
        if quiet and not as_json:
            _say(verification.verdict, err=True)
        click.get_current_context().exit(1)


@flags.command(main, Options, "checkpoint")
@flags.option(TALK, "--tensors", is_flag=True, help="Also show every tensor, by kind.")
def plan(checkpoint: str, *, options: Options, tensors: bool, as_json: bool, quiet: bool) -> None:
    """Show what convert would do, and write nothing.

    Only headers and small files are read. What is on the Hub is downloaded first, weights too; the
    base LLM's are not with --stream-base.
    """
    _show_plan(checkpoint, options, as_json=as_json, tensors=tensors)


def _show_plan(checkpoint: str, options: Options, *, as_json: bool, tensors: bool = False) -> None:
    from xtuner2llava.cli.rendering import render_plan
    from xtuner2llava.conversion import plan as run

    _show(run(checkpoint, options), partial(render_plan, tensors=tensors), as_json=as_json)


@flags.command(main, InspectOptions, "checkpoint")
def inspect(checkpoint: str, *, options: InspectOptions, as_json: bool, quiet: bool) -> None:
    """Show what CHECKPOINT is, and what it can become.

    Only headers and small files are read. Weights of base models are not downloaded; a CHECKPOINT
    on the Hub is, whole.

    For each format there is a verdict: exact, exact up to so many tokens (images counted as their
    patches), exact if a mapping of your own is right, possible but not exact, or not possible and
    why. With --json these are `verdict`, `exact_up_to`, `transformers`, the versions with which it
    holds, and `if_right`.

    Also takes an XTuner config .py, before training: what will come of it.
    """
    from xtuner2llava.cli.rendering import render_inspection
    from xtuner2llava.conversion import inspect as run

    found = run(checkpoint, options)
    _show(found, partial(render_inspection, name=checkpoint), as_json=as_json)
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
    from xtuner2llava.mapping.catalogue import Catalogue

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
    """The YAML of a shipped family, format or class.

    `llama` is the family, `classes/llama` the class.
    """
    from xtuner2llava.mapping.catalogue import Catalogue

    click.echo(Catalogue.shipped().text_of(name), nl=False)


@flags.command(mappings, SourceOptions, "file", "[checkpoint]", name="check", without=["mapping"])
def check_mapping(
    file: str, checkpoint: str | None, *, options: SourceOptions, as_json: bool, quiet: bool
) -> None:
    """Check a mapping FILE, and whether it fits CHECKPOINT.

    Without CHECKPOINT, the file alone is checked; with it, as `plan` would.
    """
    from xtuner2llava.errors import MappingError, raise_faults
    from xtuner2llava.mapping.catalogue import Catalogue

    shipped = Catalogue.shipped()
    raise_faults(MappingError, shipped.check(Path(file)))
    if checkpoint is None:
        what = "says how a checkpoint is read, and without CHECKPOINT none is"
        raise_faults(UsageError, [Fault(name, what) for name in decided(options)])
        if as_json:
            _print_json({"file": file, "faults": []})
        elif not quiet:
            _say(f"{file}: no faults")
        return
    from xtuner2llava.conversion import plan as run

    # Which name the tower is published under does not matter to the mapping, nor does which of the
    # formats that have its class.
    plain = shipped.with_family_file(Path(file)).target_class.name
    named = {"mapping": file, "format": "hf"}
    if plain in shipped.formats["llava"].classes:
        tower = options.vision_tower_name or "the vision tower"
        named |= {"format": "llava", "vision_tower_name": tower}
    made = run(checkpoint, Options(**{**vars(options), **named}))
    count = sum(tensor.component == "llm" for tensor in made.tensors)
    fits = f"{file}: fits {checkpoint}: {count} tensors of {made.architecture}"
    _show(made, lambda _: fits, as_json=as_json, quiet=quiet)


@flags.command(
    mappings, SourceOptions, "checkpoint", name="draft", talk=False,
    without="tokenizer mapping vision_lora_alpha include_vision_tower vision_tower_name bos_token "
    "dtype".split(),
)  # fmt: skip
def draft_mapping(checkpoint: str, *, options: SourceOptions) -> None:
    """Print a starter mapping for the LLM of CHECKPOINT."""
    from xtuner2llava.errors import CheckpointError, raise_faults
    from xtuner2llava.mapping.catalogue import Catalogue
    from xtuner2llava.mapping.draft import draft
    from xtuner2llava.sources.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint, options)
    config = opened.llm.config.values if opened.llm.config else {}
    shapes = {name: tensor.shape for name, tensor in opened.llm.tensors.items()}
    raise_faults(CheckpointError, [] if shapes and config else opened.faults)
    # Not wrapped: it is for a file.
    click.echo(printable(draft(config, shapes, Catalogue.shipped())), nl=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False, metavar="[DIR]")
@click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr.")
def demo(folder: Path | None, quiet: bool) -> None:
    """Make a tiny XTuner checkpoint in DIR and convert it.

    DIR is `demo` if none is given. What is done is shown with its commands.
    """
    from xtuner2llava.cli.demo import run_demo

    run_demo(folder or Path("demo"), lambda text: None if quiet else _say(text))
