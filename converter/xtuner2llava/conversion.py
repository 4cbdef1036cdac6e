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
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import PlanError
from xtuner2llava.language import model_name
from xtuner2llava.llava.config import json_bytes
from xtuner2llava.model_card import CARD_NAME, Template, model_card
from xtuner2llava.next_steps import next_steps
from xtuner2llava.options import Options, PathOrText
from xtuner2llava.planning import make_plan
from xtuner2llava.planning.plan import Plan
from xtuner2llava.provenance import plan_identity, provenance
from xtuner2llava.report import Report
from xtuner2llava.small_files import small_files, xtuner_config_file
from xtuner2llava.sources import Checkpoint, open_checkpoint
from xtuner2llava.ties import first_difference
from xtuner2llava.version import version
from xtuner2llava.writing import OutputFolder, parse_size, write_shards

if TYPE_CHECKING:
    # Imported where they are used: most conversions start sooner without them.
    from xtuner2llava.hub import Destination, Pushed, Upload
    from xtuner2llava.inspection import Inspection
    from xtuner2llava.outlook import Outlook

# Called with (stage, bytes done, bytes in all), from one thread at a time.
OnProgress = Callable[[str, int, int], None]


def convert(
    checkpoint: PathOrText,
    out: str | PathLike[str],
    *,
    llm: PathOrText | None = None,
    vision: PathOrText | None = None,
    xtuner_config: PathOrText | None = None,
    mapping: PathOrText | None = None,
    format: str = "llava",
    model_type: str = "official",
    dtype: str = "auto",
    include_vision_tower: bool = True,
    vision_tower_name: str | None = None,
    bos_token: str | None = None,
    max_shard_size: str = "5GB",
    lora_alpha: float | None = None,
    vision_lora_alpha: float | None = None,
    weights: str = "master",
    jobs: int | None = None,
    max_memory: int | str = "256MB",
    executor: Executor | None = None,
    verify: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    stream_base: bool = False,
    card_template: PathOrText | None = None,
    include_xtuner_config: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    low_disk: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Converts the XTuner checkpoint at `checkpoint` into the folder `out`.

    The options are those of `xtuner2llava convert`. `out` appears as a whole when everything is
    written, flushed and, with `verify`, compared with its sources; or it does not appear. Memory
    does not depend on the model's size. `on_plan(plan)` is called before anything is written, and
    may raise to end it; `on_progress(stage, done, total)` counts bytes.

    All shards that are written at once share `max_memory` for their buffers; torch and Python take
    some 250 MB besides. With `executor`, its workers write the shards, each with that much: any
    `concurrent.futures.Executor` whose workers see the same paths, such as
    `distributed.Client(...).get_executor()` of Dask.

    With `push_to_hub`, it is then published there. With `low_disk` too, each shard is sent and
    removed before the next is written, `out` never appears, and one commit makes all of it visible
    at the end: an interrupted run leaves the repository as it was, and another sends what is
    missing.

    Raises `ConversionError`; its `faults` are all that was wrong at the stage that failed.
    """
    options = Options(
        llm=llm,
        vision=vision,
        xtuner_config=xtuner_config,
        mapping=mapping,
        format=format,
        model_type=model_type,
        dtype=dtype,
        include_vision_tower=include_vision_tower,
        vision_tower_name=vision_tower_name,
        bos_token=bos_token,
        max_shard_size=max_shard_size,
        lora_alpha=lora_alpha,
        vision_lora_alpha=vision_lora_alpha,
        weights=weights,
    )
    destination: Destination | None = None
    publishing = (push_to_hub, revision, commit_message)
    if private or low_disk or any(value is not None for value in publishing):
        from xtuner2llava import hub

        destination = hub.choose_destination(
            push_to_hub,
            private=private,
            revision=revision,
            commit_message=commit_message,
            low_disk=low_disk,
        )
    memory = parse_size(max_memory, "--max-memory")
    template = None if card_template is None else Template.read(card_template)
    timer = _Timer()
    with timer.stage("open"):
        opened = _open(checkpoint, options, stream_base)
    with timer.stage("plan"):
        planned = make_plan(opened, options)
        _check_ties(planned)
        # Before anything is written: what is wrong with a tokenizer may show only now.
        small = small_files(planned)
        if include_xtuner_config:
            small["xtuner_config.py"] = xtuner_config_file(opened, xtuner_config)
        card = model_card(planned, version(), options, verified=verify, template=template)
        small[CARD_NAME] = card.encode("utf-8")
        if destination is not None:
            hub.check_access(destination)
    if on_plan is not None:
        on_plan(planned)
    fingerprint = planned.shards.fingerprint(plan_identity(planned, version()))
    inputs = _inputs(opened)
    pushed: Pushed | None = None
    with ExitStack() as stack:
        folder = stack.enter_context(
            OutputFolder(out, fingerprint, overwrite=overwrite, resume=resume, protected=inputs)
        )
        upload: Upload | None = None
        if destination is not None and low_disk:
            upload = stack.enter_context(hub.Upload(destination))
            upload.check_card(card)
        with timer.stage("write"):
            written = write_shards(
                folder,
                planned.shards.shards,
                jobs=jobs,
                max_memory=memory,
                verify=verify,
                executor=executor,
                deliver=None if upload is None else hub.deliver_to(upload),
                on_progress=_named(on_progress, "write" if upload is None else "write and upload"),
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
                jobs=jobs,
                on_progress=on_progress,
            )
    return Report(
        out=None if low_disk else Path(out),
        plan=planned,
        files=dict(sorted(files.items())),
        blake3={name: digest for name, _, digest in shards},
        seconds=timer.seconds,
        verified=verify,
        resumed=tuple(shard.filename for shard in written.shards if shard.kept),
        nonfinite=nonfinite,
        next_steps=next_steps(planned, _last_name(out, pushed)),
        pushed=pushed,
    )


def push(
    out: str | PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Publishes `out`, a folder that `convert` wrote, as the model repository `repo_id`.

    It is checked first. The repository and the branch `revision` are made if need be; one commit
    makes everything visible. What the Hub has already is not sent again, so a call that failed can
    be repeated. Raises `ConversionError`: `VerificationError` before anything is sent, or
    `HubError`.
    """
    from xtuner2llava import hub

    destination = hub.Destination(repo_id, private, revision, commit_message)
    return hub.push_folder(Path(out), destination, jobs=jobs, on_progress=on_progress)


def plan(
    checkpoint: PathOrText,
    *,
    llm: PathOrText | None = None,
    vision: PathOrText | None = None,
    xtuner_config: PathOrText | None = None,
    mapping: PathOrText | None = None,
    format: str = "llava",
    model_type: str = "official",
    dtype: str = "auto",
    include_vision_tower: bool = True,
    vision_tower_name: str | None = None,
    bos_token: str | None = None,
    max_shard_size: str = "5GB",
    lora_alpha: float | None = None,
    vision_lora_alpha: float | None = None,
    weights: str = "master",
    stream_base: bool = False,
) -> Plan:
    """What `convert` would do with the same options; reads headers only and writes nothing.

    Raises `ConversionError`; its `faults` are all that keep the conversion from being exact.
    """
    options = Options(
        llm,
        vision,
        xtuner_config,
        mapping,
        format,
        model_type,
        dtype,
        include_vision_tower,
        vision_tower_name,
        bos_token,
        max_shard_size,
        lora_alpha,
        vision_lora_alpha,
        weights,
    )
    return make_plan(_open(checkpoint, options, stream_base), options)


def inspect(
    checkpoint: PathOrText,
    *,
    llm: PathOrText | None = None,
    vision: PathOrText | None = None,
    xtuner_config: PathOrText | None = None,
    mapping: PathOrText | None = None,
) -> Inspection:
    """What `checkpoint` is, and what it can become; reads headers only, downloads no weights.

    Raises `ConversionError` for what is no checkpoint of XTuner's LLaVA; what else keeps it from
    becoming a format stands in the inspection's targets.
    """
    from xtuner2llava.inspection import inspect_checkpoint

    options = Options(llm=llm, vision=vision, xtuner_config=xtuner_config, mapping=mapping)
    return inspect_checkpoint(_open(checkpoint, options, download=False), options)


def foresee_training(
    config: str | PathLike[str],
    *,
    llm: PathOrText | None = None,
    vision: PathOrText | None = None,
    mapping: PathOrText | None = None,
) -> Outlook:
    """What will come of a training with the XTuner config file `config`, which is never run.

    Raises `ConversionError` if it is no config of XTuner; all else that will be in the way stands
    in the outlook.
    """
    from xtuner2llava.outlook import foresee

    return foresee(Path(config), Options(llm=llm, vision=vision, mapping=mapping))


def _open(
    checkpoint: PathOrText, options: Options, stream_base: bool = False, *, download: bool = True
) -> Checkpoint:
    config = options.xtuner_config
    return open_checkpoint(
        str(checkpoint),
        replace(options.base_choice, stream=stream_base),
        xtuner_config=None if config is None else Path(config),
        weights=options.weights,
        base_weights=download,
    )


def _check_ties(planned: Plan) -> None:
    """Raises `PlanError` unless tensors that are left out for being tied are what they are tied to.

    It reads both; most checkpoints store them once, and then there is nothing to read.
    """
    for tie in planned.ties:
        index = first_difference(tie.tensor, tie.other)
        if index is not None:
            raise PlanError(
                f"the config ties it to {tie.same_as}, but they differ at byte {index:,}",
                where=tie.name,
                advice="Give --llm a folder whose config.json says tie_word_embeddings: false.",
            )


def _inputs(opened: Checkpoint) -> list[Path]:
    """What is read, and must survive `overwrite`."""
    parts = (opened.llm, opened.visual_encoder)
    return [opened.contents.path, *(part.folder for part in parts if part.folder is not None)]


def _last_name(out: str | PathLike[str], pushed: Pushed | None) -> str:
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
