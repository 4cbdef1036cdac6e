"""`convert`, `plan` and `inspect`: the stages of a conversion, one after the other.

open      the checkpoint and the base models as lazy tensors        sources/
plan      what every output file will be                            planning/
write     shards into OUT.partial, checksummed and verified         writing/
describe  config, tokenizer, card, conversion.json                  metadata/
publish   OUT.partial becomes OUT, or a commit on the Hub             hub/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import OutputError
from xtuner2llava.mapping import model_name
from xtuner2llava.metadata import CARD_NAME, Template, model_card
from xtuner2llava.metadata.finished_output import FinishedOutput, finished_output
from xtuner2llava.metadata.next_steps import folder_name_warnings, next_steps
from xtuner2llava.metadata.provenance import describe, fingerprint, provenance, sources
from xtuner2llava.metadata.report import Report
from xtuner2llava.metadata.small_files import small_files, xtuner_config_file
from xtuner2llava.metadata.stages import Stages
from xtuner2llava.metadata.version import version
from xtuner2llava.options import (
    ConvertOptions,
    InspectOptions,
    OnProgress,
    Options,
    PathOrText,
    PushOptions,
    parse_size,
)
from xtuner2llava.planning.llava_config import json_bytes
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.planner import make_plan
from xtuner2llava.planning.ties import first_difference
from xtuner2llava.sources import Checkpoint, open_checkpoint, open_training
from xtuner2llava.sources.xtuner_folder import PART_FOLDERS
from xtuner2llava.writing import OutputFolder, Written, WrittenShard, write_shards
from xtuner2llava.writing.out_record import RECORD_NAME

if TYPE_CHECKING:
    # Imported where they are used: most conversions start sooner without them.
    from xtuner2llava.hub.upload import Destination, Pushed, Upload
    from xtuner2llava.inspection.inspection import Inspection


def convert(checkpoint: PathOrText, out: PathOrText, options: ConvertOptions) -> Report:
    """Converts the XTuner checkpoint at `checkpoint` into the folder `out`, see `api.convert`."""
    destination = _destination(options)
    template = None if options.card_template is None else Template.read(options.card_template)
    stages = Stages()
    opened = _open(checkpoint, options, stages)
    with stages.stage("plan") as stage:
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
        stage.nbytes = planned.nbytes
        work = _Work(Path(out), options, planned, small, destination, stages)
    if options.on_plan is not None:
        options.on_plan(planned)
    return (None if options.overwrite else work.already_done()) or work.write()


def _destination(options: ConvertOptions) -> Destination | None:
    """Where it is published, if that is asked for and allowed."""
    publishing = (options.push_to_hub, options.revision, options.commit_message)
    if not (options.private or options.low_disk or any(v is not None for v in publishing)):
        return None
    from xtuner2llava.hub import push as hub

    destination = hub.choose_destination(options)
    if destination is not None:
        hub.check_access(destination)
    return destination


@dataclass(frozen=True, slots=True)
class _Work:
    """A planned conversion into `out`; `small` are its small files but for conversion.json."""

    out: Path
    options: ConvertOptions
    planned: Plan
    small: Mapping[str, bytes]
    destination: Destination | None
    stages: Stages

    def already_done(self) -> Report | None:
        """The report on an `out` that is this conversion already; it is published if asked for."""
        record = provenance(self.planned, self.options, version(), self.small)
        found = finished_output(self.out, self.planned, record)
        if found is None:
            return None
        pushed: Pushed | None = None
        if self.destination is not None:
            from xtuner2llava.hub import push as hub

            with self.stages.stage("upload") as stage:
                pushed = hub.push_folder(
                    self.out,
                    self.destination,
                    jobs=self.options.jobs,
                    on_progress=self.options.on_progress,
                )
                stage.nbytes = pushed.nbytes
        return self._report(found, pushed, already=True)

    def write(self) -> Report:
        """Writes and publishes it, or goes on with what an earlier run left."""
        options, planned, stages = self.options, self.planned, self.stages
        pushed: Pushed | None = None
        with ExitStack() as stack:
            folder = stack.enter_context(self._folder())
            upload: Upload | None = None
            if self.destination is not None and options.low_disk:
                from xtuner2llava.hub import push as hub
                from xtuner2llava.hub.upload import open_upload

                upload = stack.enter_context(open_upload(self.destination))
                upload.check_card(self.small[CARD_NAME].decode("utf-8"))
            with stages.stage("write") as stage:
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
                stage.nbytes = sum(shard.size for shard in written.shards)
            with stages.stage("describe"):
                done = self._describe(folder, written)
            with stages.stage("publish"):
                if upload is None:
                    folder.publish()
                else:
                    pushed = hub.publish_small_files(upload, folder.path)
        if self.destination is not None and pushed is None:
            from xtuner2llava.hub import push as hub

            with stages.stage("upload") as stage:
                pushed = hub.publish_converted(
                    self.out,
                    tuple(done.blake3),
                    self.destination,
                    jobs=options.jobs,
                    on_progress=options.on_progress,
                )
                stage.nbytes = pushed.nbytes
        return self._report(done, pushed, shards=written.shards)

    def _folder(self) -> OutputFolder:
        planned, checkpoint = self.planned, self.planned.checkpoint
        parts = (checkpoint.llm, checkpoint.visual_encoder)
        home, out = (Path(os.path.realpath(p)) for p in (checkpoint.artifact.path, self.out))
        if out.parent == home and out.name in PART_FOLDERS:
            raise OutputError(
                f"would be read as a part of the checkpoint {home.name}",
                where=str(self.out),
                advice="Choose another OUT.",
            )
        record = provenance(planned, self.options, version(), self.small)
        described = describe(record, sources(planned))
        return OutputFolder(
            self.out,
            fingerprint(planned, version(), described),
            described=described,
            overwrite=self.options.overwrite,
            restart=self.options.restart,
            protected=[
                checkpoint.artifact.path,
                *(part.folder for part in parts if part.folder is not None),
            ],
        )

    def _describe(self, folder: OutputFolder, written: Written) -> FinishedOutput:
        """Writes the small files beside the shards, and says what there is then."""
        shards = [(shard.filename, shard.size, shard.blake3) for shard in written.shards]
        nonfinite = tuple((found.name, found.nan, found.infinite) for found in written.nonfinite)
        for name, data in self.small.items():
            folder.write_bytes(name, data)
        record = provenance(self.planned, self.options, version(), self.small, shards, nonfinite)
        folder.write_bytes(RECORD_NAME, json_bytes(record))
        files = {name: size for name, size, _ in shards} | {
            path.name: path.stat().st_size for path in folder.path.iterdir() if path.is_file()
        }
        return FinishedOutput(files, {name: digest for name, _, digest in shards}, nonfinite)

    def _report(
        self,
        done: FinishedOutput,
        pushed: Pushed | None,
        *,
        already: bool = False,
        shards: Sequence[WrittenShard] = (),
    ) -> Report:
        return Report(
            out=None if self.options.low_disk and not already else self.out,
            plan=self.planned,
            files=dict(sorted(done.files.items())),
            blake3=dict(done.blake3),
            seconds=self.stages.seconds,
            verified=self.options.verify and not already,
            resumed=tuple(shard.filename for shard in shards if shard.kept),
            kept_bytes=sum(shard.kept_bytes for shard in shards),
            nonfinite=done.nonfinite,
            warnings=folder_name_warnings(self.planned, _last_name(self.out, pushed)),
            next_steps=next_steps(self.planned),
            pushed=pushed,
            already_converted=already,
        )


def push(out: PathOrText, repo_id: str, options: PushOptions) -> Pushed:
    """Publishes the folder `out`, see `api.push`."""
    from xtuner2llava.hub.push import push_folder
    from xtuner2llava.hub.upload import Destination

    destination = Destination.of(repo_id, options)
    with Stages().stage("upload") as stage:
        pushed = push_folder(
            Path(out), destination, jobs=options.jobs, on_progress=options.on_progress
        )
        stage.nbytes = pushed.nbytes
    return pushed


def plan(checkpoint: PathOrText, options: Options) -> Plan:
    """What `convert` would do, see `api.plan`."""
    stages = Stages()
    opened = _open(checkpoint, options, stages)
    with stages.stage("plan") as stage:
        planned = make_plan(opened, options)
        stage.nbytes = planned.nbytes
    return planned


def inspect(checkpoint: PathOrText, options: InspectOptions) -> Inspection:
    """What `checkpoint` is, see `api.inspect`."""
    from xtuner2llava.inspection.inspection import inspect_checkpoint

    if Path(checkpoint).suffix == ".py":
        return inspect_checkpoint(open_training(checkpoint, options), options)
    return inspect_checkpoint(open_checkpoint(checkpoint, options, base_weights=False), options)


def _open(checkpoint: PathOrText, options: Options, stages: Stages) -> Checkpoint:
    with stages.stage("open") as stage:
        opened = open_checkpoint(checkpoint, options, stream_base=options.stream_base)
        stage.nbytes = sum(file.size for file in (*opened.artifact.files, *opened.base_files))
    return opened


def _untied(planned: Plan) -> list[str]:
    """Tensors that are left out for being tied, and differ from what they are tied to.

    It reads both; most checkpoints store them once, and then there is nothing to read.
    """
    return [tie.name for tie in planned.ties if first_difference(tie.tensor, tie.other) is not None]


def _last_name(out: PathOrText, pushed: Pushed | None) -> str:
    """The name by which LLaVA will choose the class: the folder's, or the repository's."""
    return model_name(Path(out)) if pushed is None else pushed.repo_id.rpartition("/")[2]


def _named(on_progress: OnProgress | None, stage: str) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(stage, done, total)
