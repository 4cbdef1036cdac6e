"""`convert`, `plan` and `inspect`: the stages of a conversion, one after the other.

open      the checkpoint and the base models as lazy tensors        sources/
plan      what every output file will be                            planning/
write     shards into OUT.partial, checksummed and verified         writing/
describe  config, tokenizer, card, conversion.json                  llava/, provenance.py
publish   OUT.partial becomes OUT, or a commit on the Hub             hub/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.llava.config import json_bytes
from xtuner2llava.mapping import model_name
from xtuner2llava.model_card import CARD_NAME, Template, model_card
from xtuner2llava.next_steps import folder_name_warnings, next_steps
from xtuner2llava.options import (
    ConvertOptions,
    InspectOptions,
    OnProgress,
    Options,
    PathOrText,
    PushOptions,
    parse_size,
)
from xtuner2llava.planning import make_plan
from xtuner2llava.planning.plan import Plan
from xtuner2llava.provenance import plan_identity, provenance
from xtuner2llava.report import Report
from xtuner2llava.small_files import small_files, xtuner_config_file
from xtuner2llava.sources import Checkpoint, open_checkpoint, open_training
from xtuner2llava.ties import first_difference
from xtuner2llava.version import version
from xtuner2llava.writing import OutputFolder, write_shards

if TYPE_CHECKING:
    # Imported where they are used: most conversions start sooner without them.
    from xtuner2llava.hub import Destination, Pushed, Upload
    from xtuner2llava.inspection import Inspection


def convert(checkpoint: PathOrText, out: PathOrText, options: ConvertOptions) -> Report:
    """Converts the XTuner checkpoint at `checkpoint` into the folder `out`, see `api.convert`."""
    destination: Destination | None = None
    publishing = (options.push_to_hub, options.revision, options.commit_message)
    if options.private or options.low_disk or any(value is not None for value in publishing):
        from xtuner2llava import hub

        destination = hub.choose_destination(options)
    template = None if options.card_template is None else Template.read(options.card_template)
    timer = _Timer()
    with timer.stage("open"):
        opened = open_checkpoint(checkpoint, options, stream_base=options.stream_base)
    with timer.stage("plan"):
        planned = make_plan(opened, options)
        untied = _untied(planned)
        if untied:
            planned = make_plan(opened, options, untied)
        # Before anything is written: what is wrong with a tokenizer may show only now.
        small = small_files(planned)
        if options.include_xtuner_config:
            small["xtuner_config.py"] = xtuner_config_file(opened, options.xtuner_config)
        card = model_card(planned, version(), options, verified=options.verify, template=template)
        small[CARD_NAME] = card.encode("utf-8")
        if destination is not None:
            hub.check_access(destination)
    if options.on_plan is not None:
        options.on_plan(planned)
    fingerprint = planned.shards.fingerprint(plan_identity(planned, version()))
    inputs = _inputs(opened)
    pushed: Pushed | None = None
    with ExitStack() as stack:
        folder = stack.enter_context(
            OutputFolder(
                out,
                fingerprint,
                overwrite=options.overwrite,
                resume=options.resume,
                protected=inputs,
            )
        )
        upload: Upload | None = None
        if destination is not None and options.low_disk:
            upload = stack.enter_context(hub.Upload(destination))
            upload.check_card(card)
        with timer.stage("write"):
            written = write_shards(
                folder,
                planned.shards.shards,
                jobs=options.jobs,
                max_memory=parse_size(options.max_memory),
                verify=options.verify,
                executor=options.executor,
                deliver=None if upload is None else hub.deliver_to(upload),
                on_progress=_named(
                    options.on_progress, "write" if upload is None else "write and upload"
                ),
            )
        nonfinite = tuple((found.name, found.nan, found.infinite) for found in written.nonfinite)
        with timer.stage("describe"):
            shards = [(shard.filename, shard.size, shard.blake3) for shard in written.shards]
            for name, data in small.items():
                folder.write_bytes(name, data)
            record = provenance(planned, version(), shards, small, nonfinite)
            folder.write_bytes("conversion.json", json_bytes(record))
            files = {name: size for name, size, _ in shards} | {
                path.name: path.stat().st_size for path in folder.path.iterdir() if path.is_file()
            }
        with timer.stage("publish"):
            if upload is None:
                folder.publish()
            else:
                pushed = hub.publish_small_files(upload, folder.path)
    if destination is not None and pushed is None:
        with timer.stage("upload"):
            pushed = hub.publish_converted(
                Path(out),
                tuple(name for name, _, _ in shards),
                destination,
                jobs=options.jobs,
                on_progress=options.on_progress,
            )
    return Report(
        out=None if options.low_disk else Path(out),
        plan=planned,
        files=dict(sorted(files.items())),
        blake3={name: digest for name, _, digest in shards},
        seconds=timer.seconds,
        verified=options.verify,
        resumed=tuple(shard.filename for shard in written.shards if shard.kept),
        nonfinite=nonfinite,
        warnings=folder_name_warnings(planned, _last_name(out, pushed)),
        next_steps=next_steps(planned),
        pushed=pushed,
    )


def push(out: PathOrText, repo_id: str, options: PushOptions) -> Pushed:
    """Publishes the folder `out`, see `api.push`."""
    from xtuner2llava import hub

    destination = hub.Destination.of(repo_id, options)
    return hub.push_folder(
        Path(out), destination, jobs=options.jobs, on_progress=options.on_progress
    )


def plan(checkpoint: PathOrText, options: Options) -> Plan:
    """What `convert` would do, see `api.plan`."""
    return make_plan(open_checkpoint(checkpoint, options, stream_base=options.stream_base), options)


def inspect(checkpoint: PathOrText, options: InspectOptions) -> Inspection:
    """What `checkpoint` is, see `api.inspect`."""
    from xtuner2llava.inspection import inspect_checkpoint

    if Path(checkpoint).suffix == ".py":
        return inspect_checkpoint(open_training(checkpoint, options), options)
    return inspect_checkpoint(open_checkpoint(checkpoint, options, base_weights=False), options)


def _untied(planned: Plan) -> list[str]:
    """Tensors that are left out for being tied, and differ from what they are tied to.

    It reads both; most checkpoints store them once, and then there is nothing to read.
    """
    return [tie.name for tie in planned.ties if first_difference(tie.tensor, tie.other) is not None]


def _inputs(opened: Checkpoint) -> list[Path]:
    """What is read, and must survive `overwrite`."""
    parts = (opened.llm, opened.visual_encoder)
    return [opened.contents.path, *(part.folder for part in parts if part.folder is not None)]


def _last_name(out: PathOrText, pushed: Pushed | None) -> str:
    """The name by which LLaVA will choose the class: the folder's, or the repository's."""
    return model_name(Path(out)) if pushed is None else pushed.repo_id.rpartition("/")[2]


def _named(on_progress: OnProgress | None, stage: str) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(stage, done, total)


class _Timer:
    """Wall time of the stages, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
