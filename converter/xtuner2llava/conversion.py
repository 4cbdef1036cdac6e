"""`convert`, `plan` and `inspect`: the stages of a conversion, one after the other.

open      the checkpoint and the base models as lazy tensors     sources/
plan      every tensor and every file of OUT                     planning/, metadata/
write     shards into OUT.partial, checksummed and verified      writing/
describe  the planned files beside them, conversion.json closed  metadata/record.py
publish   OUT.partial becomes OUT, or a commit on the Hub          hub/
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.metadata.stages import Stages
from xtuner2llava.options import ConvertOptions, InspectOptions, Options, PathOrText, PushOptions
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.planner import make_plan
from xtuner2llava.sources.checkpoint import open_checkpoint, open_training

if TYPE_CHECKING:
    # Imported where they are used: `plan` and `inspect` start sooner without them.
    from xtuner2llava.hub.upload import Pushed, Upload
    from xtuner2llava.inspection.inspection import Inspection
    from xtuner2llava.metadata.record import FinishedOutput
    from xtuner2llava.metadata.report import Report
    from xtuner2llava.writing.folder import OutputFolder
    from xtuner2llava.writing.writer import Written


def convert(checkpoint: PathOrText, out: PathOrText, options: ConvertOptions) -> Report:
    """Converts the XTuner checkpoint at `checkpoint` into the folder `out`, see `api.convert`."""
    from xtuner2llava.hub.push import check_destination
    from xtuner2llava.metadata.card import read_card_template
    from xtuner2llava.metadata.record import finished_output, with_metadata

    check_destination(options)
    template = read_card_template(options.card_template)
    stages = Stages()
    planned = with_metadata(_planned(checkpoint, options, stages), options, template)
    if options.on_plan is not None:
        options.on_plan(planned)
    conversion = _Conversion(Path(out), planned, options, stages)
    finished = None if options.overwrite else finished_output(Path(out), planned)
    if finished is not None:
        return conversion.report(finished, None, conversion.push())
    if options.low_disk:
        return conversion.write_to_hub()
    return conversion.write()


def plan(checkpoint: PathOrText, options: Options) -> Plan:
    """What `convert` would do, see `api.plan`."""
    return _planned(checkpoint, options, Stages())


def inspect(checkpoint: PathOrText, options: InspectOptions) -> Inspection:
    """What `checkpoint` is, see `api.inspect`."""
    from xtuner2llava.inspection.inspection import inspect_checkpoint

    # Where there is none, opening a checkpoint says more.
    if Path(checkpoint).suffix == ".py" and os.path.exists(checkpoint):  # noqa: PTH110 - or False
        return inspect_checkpoint(open_training(checkpoint, options), options)
    return inspect_checkpoint(open_checkpoint(checkpoint, options, base_weights=False), options)


def push(out: PathOrText, repo_id: str, options: PushOptions) -> Pushed:
    """Publishes the folder `out`, see `api.push`."""
    from xtuner2llava.hub.push import push_folder

    with Stages().stage("upload") as stage:
        pushed = push_folder(Path(out), repo_id, options)
        stage.nbytes = pushed.nbytes
    return pushed


def _planned(checkpoint: PathOrText, options: Options, stages: Stages) -> Plan:
    with stages.stage("open") as stage:
        opened = open_checkpoint(checkpoint, options, stream_base=options.stream_base)
        stage.nbytes = sum(file.size for file in (*opened.artifact.files, *opened.base_files))
    with stages.stage("plan") as stage:
        planned = make_plan(opened, options)
        stage.nbytes = planned.nbytes
    return planned


@dataclass(frozen=True, slots=True)
class _Conversion:
    """A planned conversion into `out`, which is published if the options say so."""

    out: Path
    plan: Plan
    options: ConvertOptions
    stages: Stages

    def write(self) -> Report:
        """Writes OUT, or goes on with what an earlier run left, and publishes it if asked to."""
        with self._folder() as folder:
            written = self._write(folder, None)
            finished = self._describe(folder, written)
            with self.stages.stage("publish"):
                folder.publish()
        pushed = self.push(tuple(finished.blake3))
        return self.report(finished, written, pushed)

    def write_to_hub(self) -> Report:
        """Sends each shard and removes it before the next is written: OUT does not appear."""
        from xtuner2llava.hub.upload import open_upload
        from xtuner2llava.metadata.front_matter import CARD_NAME

        repo_id = str(self.options.push_to_hub)
        with self._folder() as folder, open_upload(repo_id, self.options) as upload:
            upload.check_card(self.plan.files[CARD_NAME].decode("utf-8"))
            written = self._write(folder, upload)
            finished = self._describe(folder, written)
            with self.stages.stage("publish"):
                pushed = upload.commit(folder.path, self.plan.files)
        return self.report(finished, written, pushed)

    def push(self, shards: tuple[str, ...] | None = None) -> Pushed | None:
        """Publishes OUT if asked to; it is checked, unless its `shards` were just written."""
        repo_id = self.options.push_to_hub
        if repo_id is None:
            return None
        from xtuner2llava.hub.push import push_folder, push_written

        with self.stages.stage("upload") as stage:
            if shards is None:
                pushed = push_folder(self.out, repo_id, self.options)
            else:
                pushed = push_written(self.out, shards, self.options)
            stage.nbytes = pushed.nbytes
        return pushed

    def report(
        self, finished: FinishedOutput, written: Written | None, pushed: Pushed | None
    ) -> Report:
        from xtuner2llava.metadata.report import Report

        return Report.of(self.plan, self.out, self.options, finished, written, pushed, self.stages)

    def _folder(self) -> OutputFolder:
        from xtuner2llava.metadata.record import identity
        from xtuner2llava.sources.xtuner_folder import check_no_part
        from xtuner2llava.writing.folder import OutputFolder

        checkpoint = self.plan.checkpoint
        check_no_part(checkpoint.artifact.path, self.out)
        read = (checkpoint.artifact.path, checkpoint.llm.folder, checkpoint.visual_encoder.folder)
        fingerprint, described = identity(self.plan)
        return OutputFolder(
            self.out,
            fingerprint,
            described=described,
            overwrite=self.options.overwrite,
            restart=self.options.restart,
            protected=[path for path in read if path is not None],
        )

    def _write(self, folder: OutputFolder, upload: Upload | None) -> Written:
        from xtuner2llava.options import parse_size
        from xtuner2llava.writing.writer import write_shards

        options = self.options
        on_progress = options.on_progress and partial(
            options.on_progress, "write" if upload is None else "write and upload"
        )
        with self.stages.stage("write") as stage:
            written = write_shards(
                folder,
                self.plan.shards.shards,
                jobs=options.jobs,
                max_memory=parse_size(options.max_memory),
                verify=options.verify,
                executor=options.executor,
                deliver=None if upload is None else upload.deliver,
                on_progress=on_progress,
            )
            stage.nbytes = sum(shard.size for shard in written.shards)
        return written

    def _describe(self, folder: OutputFolder, written: Written) -> FinishedOutput:
        """Writes the planned files beside the shards, the record of them last."""
        from xtuner2llava.metadata.record import FinishedOutput, with_closed_record
        from xtuner2llava.writing.out_record import RECORD_NAME

        with self.stages.stage("describe"):
            files = with_closed_record(self.plan.files, written)
            for name, data in files.items():
                folder.write_bytes(name, data)
        sizes = {shard.filename: shard.size for shard in written.shards}
        sizes |= {name: len(data) for name, data in files.items()}
        return FinishedOutput(sizes, json.loads(files[RECORD_NAME]))
