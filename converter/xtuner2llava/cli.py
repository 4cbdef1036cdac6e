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
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from xtuner2llava.errors import ConversionError
from xtuner2llava.progress import ProgressBar
from xtuner2llava.terminal import accept_any_text, printable, shortened

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from xtuner2llava.planning.plan import Plan

_Command = TypeVar("_Command", bound=Callable[..., object])
OnProgress: TypeAlias = Callable[[str, int, int], None]

# More are no help to anybody; the API has all.
_MAX_FAULTS = 200


class _Group(click.Group):
    """Turns errors into messages, and exceptions of Ctrl-C and bugs into short ones."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConversionError as error:
            _tell_faults(error)
            _exit(ctx, error, error.exit_status)
        except KeyboardInterrupt as error:
            _say(f"Interrupted. {error}".strip(), err=True)
            _exit(ctx, error, 130)
        except BrokenPipeError:
            ctx.exit(1)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            _say(
                f"Error: {type(error).__name__}: {error}\n"
                "This is a fault of xtuner2llava. Please report it with what -v prints.",
                err=True,
            )
            _exit(ctx, error, 1)
        return None


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


def _heeding_interrupts(on_progress: OnProgress) -> OnProgress:
    """`on_progress`, raising once more what a library that was being imported has swallowed."""
    noted = click.get_current_context().obj

    def update(stage: str, done: int, total: int) -> None:
        if noted.get("interrupted"):
            raise KeyboardInterrupt
        on_progress(stage, done, total)

    return update


def _fitting_threads(jobs: int | None) -> Callable[[Plan], None]:
    """What has torch use as many threads for each job that computes as there are cores for it.

    With more, each product of matrices waits for threads that wait for a core. The library leaves
    that number alone, which belongs to the whole process; here, the process is ours.
    """

    def fit(plan: Plan) -> None:
        from xtuner2llava.writing import computing_jobs

        computing = computing_jobs(plan.shards.shards, jobs)
        if computing:
            import torch

            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // computing)))

    return fit


def _exit(ctx: click.Context, error: BaseException, status: int) -> None:
    if (ctx.obj or {}).get("verbose"):
        traceback.print_exception(error)
    ctx.exit(status)


def _say(text: str, *, err: bool = False) -> None:
    click.echo(printable(text), err=err)


def _tell_faults(error: ConversionError) -> None:
    count = len(error.faults)
    head = f"Error, {count} faults:" if count > 1 else "Error:"
    click.echo(click.style(head, fg="red", bold=True), err=True)
    for fault in error.faults[:_MAX_FAULTS]:
        _say(f"  {_indent(shortened(str(fault)))}", err=True)
    if count > _MAX_FAULTS:
        _say(f"  and {count - _MAX_FAULTS:,} more", err=True)


def _indent(text: str) -> str:
    return text.replace("\n", "\n  ")


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _remember_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.obj["verbose"] = value
    return value


def _calm_the_hub(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Without a terminal, no bars of huggingface_hub; with --quiet, no warnings of its either."""
    if value or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if value:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    return value


_talk = _options(
    click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout."),
    click.option("-v", "--verbose", is_flag=True, callback=_remember_verbose, expose_value=False,
                 help="More on stderr, and tracebacks."),
    click.option("-q", "--quiet", is_flag=True, callback=_calm_the_hub,
                 help="Only errors on stderr."),
)  # fmt: skip
_bases = _options(
    click.option("--llm", metavar="PATH_OR_REPO",
                 help="Base LLM: config and tokenizer, and weights where the checkpoint has none "
                 "or LoRA.  [default: what the XTuner config names]"),
    click.option("--vision", metavar="PATH_OR_REPO", help="Base vision tower, likewise."),
    click.option("--xtuner-config", metavar="FILE.py", type=click.Path(path_type=Path),
                 help="Read as data; no code in it is run.  [default: the one in the checkpoint]"),
)  # fmt: skip
_mapping = click.option(
    "--mapping",
    metavar="NAME_OR_FILE",
    help="LLM family.  [default: found by config and tensor names]",
)
_choices = _options(
    _mapping,
    click.option("--format", default="llava", show_default=True, metavar="NAME",
                 help="`llava`: official LLaVA; `hf`: LlavaForConditionalGeneration."),
    click.option("--model-type", type=click.Choice(["official", "llava"]), default="official",
                 show_default=True, help="`llava` for servers that know no other."),
    click.option("--dtype", default="auto", show_default=True,
                 type=click.Choice(["auto", "keep", "float16", "bfloat16", "float32"]),
                 help="auto: the base LLM's torch_dtype; keep: as stored."),
    click.option("--include-vision-tower/--no-include-vision-tower", default=True,
                 show_default=True,
                 help="Write the tower's tensors even if it was frozen: the only layout that "
                 "LLaVA and LLaVA-NeXT both load right."),
    click.option("--vision-tower-name", metavar="ID", help="What to write as mm_vision_tower."),
    click.option("--bos-token", metavar="TOKEN",
                 help="Put it on the tokenizer, as XTuner's advice for Qwen does; LLaVA then drops "
                 "a token after each image.  [default: none for Qwen, else the base's]"),
    click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE"),
    click.option("--lora-alpha", type=float, metavar="N",
                 help="The LLM's LoRA alpha, where it is recorded nowhere."),
    click.option("--vision-lora-alpha", type=float, metavar="N", help="The tower's, likewise."),
    click.option("--weights", type=click.Choice(["master", "module"]), default="master",
                 show_default=True,
                 help="Of a DeepSpeed directory: float32 master or 16-bit module weights."),
)  # fmt: skip


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xtuner2llava")
@click.pass_context
def main(ctx: click.Context, /) -> None:
    """Converts LLaVA models trained with XTuner to official LLaVA.

    CHECKPOINT is an iter_N.pth file, a DeepSpeed iter_N.pth/ directory, an iter_N_xtuner/ folder,
    or a Hub repo id of such a folder.
    """
    # Threads of torch that wait for work shall not spin: the cores are needed for hashing. It must
    # be said before torch is imported; the library leaves it to whoever owns the process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ctx.obj = {}  # Commands note here what the group must know of errors, such as --verbose.
    _answer_interrupts(ctx)
    accept_any_text()


_stream = click.option(
    "--stream-base", is_flag=True,
    help="Read the base LLM's safetensors from the Hub as they are needed; nothing is stored.",
)  # fmt: skip
_repository = _options(
    click.option("--private", is_flag=True, help="If the repository is made, only you see it."),
    click.option("--revision", metavar="BRANCH", help="Made if need be.  [default: main]"),
    click.option("--commit-message", metavar="TEXT"),
)


@main.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@_bases
@_choices
@_stream
@click.option("--jobs", type=click.IntRange(1), metavar="N",
              help="Shards written at once.  [default: min(4, cores)]")  # fmt: skip
@click.option("--max-memory", default="256MB", show_default=True, metavar="SIZE",
              help="Working buffers of all shards together; Python and torch come on "
              "top.")  # fmt: skip
@click.option("--dask", metavar="ADDRESS",
              help="Have the workers of this Dask scheduler write the shards; they must see the "
              "same paths.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="The same as `plan`.")
@click.option("--verify/--no-verify", default=True, show_default=True,
              help="Read OUT back and compare it with its sources, bit for bit.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--card-template", metavar="FILE.md", type=click.Path(path_type=Path),
              help="Your own model card; {{ usage }}, {{ parts }} and others are filled "
              "in.")  # fmt: skip
@click.option("--include-xtuner-config", is_flag=True,
              help="Write xtuner_config.py too, without paths, data and secrets.")  # fmt: skip
@click.option("--push-to-hub", metavar="REPO_ID", help="Publish OUT there when it is complete.")
@_repository
@click.option("--low-disk", is_flag=True,
              help="With --push-to-hub: send and remove each shard before the next is written; OUT "
              "does not appear.")  # fmt: skip
@_talk
def convert(
    checkpoint: str,
    out: Path,
    jobs: int | None,
    max_memory: str,
    dask: str | None,
    dry_run: bool,
    verify: bool,
    resume: bool,
    overwrite: bool,
    card_template: Path | None,
    include_xtuner_config: bool,
    push_to_hub: str | None,
    private: bool,
    revision: str | None,
    commit_message: str | None,
    low_disk: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Convert CHECKPOINT into the folder OUT, which must not exist or be empty."""
    if dry_run:
        _show_plan(checkpoint, as_json, choices)
        return
    from xtuner2llava.conversion import convert as run

    with ExitStack() as stack:
        executor: Executor | None = None
        if dask is not None:
            from xtuner2llava.dask_cluster import dask_executor

            executor = stack.enter_context(dask_executor(dask))
        bar = stack.enter_context(ProgressBar(show=not quiet and sys.stderr.isatty()))
        report = run(
            checkpoint,
            out,
            jobs=jobs,
            max_memory=max_memory,
            executor=executor,
            verify=verify,
            resume=resume,
            overwrite=overwrite,
            card_template=card_template,
            include_xtuner_config=include_xtuner_config,
            push_to_hub=push_to_hub,
            private=private,
            revision=revision,
            commit_message=commit_message,
            low_disk=low_disk,
            on_plan=None if executor else _fitting_threads(jobs),
            on_progress=_heeding_interrupts(bar.update),
            **choices,
        )
    if as_json:
        _print_json(report.to_dict())
    elif not quiet:
        from xtuner2llava.rendering import render_report

        _say(render_report(report))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo_id")
@_repository
@click.option("--jobs", type=click.IntRange(1), metavar="N",
              help="Files sent at once.  [default: min(4, cores)]")  # fmt: skip
@_talk
def push(
    out: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    commit_message: str | None,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish OUT, which `convert` wrote, on the Hugging Face Hub as REPO_ID.

    It is checked first. One commit makes it visible; what the Hub has already is not sent again, so
    a run that failed is repeated with the same command.
    """
    from xtuner2llava.conversion import push as run

    with ProgressBar(show=not quiet and sys.stderr.isatty()) as bar:
        pushed = run(
            out,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            jobs=jobs,
            on_progress=_heeding_interrupts(bar.update),
        )
    if as_json:
        _print_json(pushed.to_dict())
    elif not quiet:
        from xtuner2llava.rendering import render_pushed

        _say(render_pushed(pushed))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", metavar="CHECKPOINT",
              help="Recompute every tensor from it, and compare bit for bit. Give the options that "
              "were given to convert.")  # fmt: skip
@click.option("--logits", is_flag=True,
              help="With --against: also run both models, layer by layer, and compare their "
              "logits.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True,
              help="With --logits: run the base LLM's own Python, where transformers does not have "
              "its class.")  # fmt: skip
@_bases
@_choices
@_talk
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    out: Path,
    against: str | None,
    logits: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Check the folder OUT: by itself, against its checkpoint, and at work."""
    # Configs of LLaVA are not transformers' own, of which it would warn.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from xtuner2llava.verification import verify as run
    from xtuner2llava.verification.rendering import render_verification

    for name in ("format", "model_type"):
        # The folder says these itself, and is held to them only where they are asked for.
        if ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            choices[name] = None
    with ProgressBar(show=not quiet and sys.stderr.isatty()) as bar:
        verification = run(
            out,
            against=against,
            logits=logits,
            trust_remote_code=trust_remote_code,
            on_progress=_heeding_interrupts(bar.update),
            **choices,
        )
    if as_json:
        _print_json(verification.to_dict())
    elif not quiet:
        _say(render_verification(verification))
    elif not verification.passed:
        _say(verification.verdict, err=True)
    if not verification.passed:
        ctx.exit(1)


@main.command()
@click.argument("checkpoint")
@_bases
@_choices
@_stream
@_talk
def plan(checkpoint: str, as_json: bool, quiet: bool, **choices: Any) -> None:
    """Show what convert would do; reads headers only, writes nothing."""
    _show_plan(checkpoint, as_json, choices)


def _show_plan(checkpoint: str, as_json: bool, choices: Mapping[str, Any]) -> None:
    from xtuner2llava.conversion import plan as make

    made = make(checkpoint, **choices)
    if as_json:
        _print_json(made.to_dict())
    else:
        from xtuner2llava.rendering import render_plan

        _say(render_plan(made))


@main.command()
@click.argument("checkpoint")
@_bases
@_mapping
@_talk
def inspect(checkpoint: str, as_json: bool, quiet: bool, **choices: Any) -> None:
    """Show what CHECKPOINT is, and what it can become.

    For each format there is a verdict: exact, exact up to so many tokens (images counted as their
    patches), possible but not exact, or not possible and why. With --json these are `verdict`,
    `exact_up_to` and `transformers`, the versions with which it holds.

    Also takes an XTuner config .py, before training: what will come of it.
    """
    if checkpoint.endswith(".py"):
        _show_outlook(checkpoint, as_json, choices)
        return
    from xtuner2llava.conversion import inspect as look

    found = look(checkpoint, **choices)
    if as_json:
        _print_json(found.to_dict())
    else:
        from xtuner2llava.rendering import render_inspection

        _say(render_inspection(found, checkpoint))


def _show_outlook(config: str, as_json: bool, choices: Mapping[str, Any]) -> None:
    from xtuner2llava.conversion import foresee_training

    outlook = foresee_training(
        config, llm=choices["llm"], vision=choices["vision"], mapping=choices["mapping"]
    )
    if as_json:
        _print_json(outlook.to_dict())
    else:
        from xtuner2llava.rendering import render_outlook

        _say(render_outlook(outlook))
    if not outlook.is_good:
        click.get_current_context().exit(1)


@main.group()
def mappings() -> None:
    """LLM families and output formats: list, show, check a file of your own, or draft one."""


@mappings.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def list_mappings(as_json: bool) -> None:
    """The shipped families and formats, and what each becomes."""
    from xtuner2llava.language import Catalogue
    from xtuner2llava.rendering import table

    catalogue = Catalogue.shipped()
    rows = [("family", n, f.becomes.architecture) for n, f in catalogue.families.items()]
    rows += [
        ("format", name, ", ".join(c.architecture for c in found.classes.values()))
        for name, found in catalogue.formats.items()
    ]
    if as_json:
        _print_json([{"kind": kind, "name": n, "becomes": b} for kind, n, b in rows])
    else:
        click.echo(table(rows, ("kind", "name", "becomes")))


@mappings.command("show")
@click.argument("name")
def show_mapping(name: str) -> None:
    """The YAML of a shipped family, format or class."""
    from xtuner2llava.language import Catalogue

    click.echo(Catalogue.shipped().text_of(name), nl=False)


@mappings.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("checkpoint", required=False)
@_bases
@_talk
def check_mapping(
    file: Path, checkpoint: str | None, as_json: bool, quiet: bool, **choices: Any
) -> None:
    """Check a mapping FILE; with CHECKPOINT also whether it fits, as `plan` would."""
    from xtuner2llava.errors import MappingError, raise_faults
    from xtuner2llava.language import check_file

    raise_faults(MappingError, check_file(file))
    if checkpoint is not None:
        # Which name the tower is published under is no question of the mapping.
        named = {**choices, "mapping": file, "vision_tower_name": "the vision tower"}
        _show_plan(checkpoint, as_json, named)
    elif not quiet:
        _say(f"{file}: no faults")


@mappings.command("draft")
@click.argument("checkpoint")
@_bases
def draft_mapping(
    checkpoint: str, llm: str | None, vision: str | None, xtuner_config: Path | None
) -> None:
    """Print a starter mapping for the LLM of CHECKPOINT."""
    from xtuner2llava.errors import CheckpointError, raise_faults
    from xtuner2llava.language import Catalogue, draft
    from xtuner2llava.sources import BaseChoice, open_checkpoint

    opened = open_checkpoint(checkpoint, BaseChoice(llm, vision), xtuner_config=xtuner_config)
    config = opened.llm.config.values if opened.llm.config else {}
    shapes = {name: tensor.shape for name, tensor in opened.llm.tensors.items()}
    raise_faults(CheckpointError, [] if shapes and config else opened.faults)
    _say(draft(config, shapes, Catalogue.shipped()).rstrip("\n"))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False, metavar="[DIR]")
@click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr.")
def demo(folder: Path | None, quiet: bool) -> None:
    """Make a tiny XTuner checkpoint in DIR (default: demo), convert it, and say what was done."""
    from xtuner2llava.demo import run_demo

    run_demo(folder or Path("demo"), lambda text: None if quiet else click.echo(text))


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
