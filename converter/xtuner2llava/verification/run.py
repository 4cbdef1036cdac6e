"""`verify`: a converted folder by itself, against its checkpoint, and at work.

itself     weight files, config, tokenizer, names, checksums       checks/
against    the plan made again, every tensor compared              against.py
logits     both models run on one image and prompt                 logits/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import (
    CheckpointError,
    ConversionError,
    CorruptFileError,
    Fault,
    UsageError,
    raise_faults,
)
from xtuner2llava.hub.download import is_reference
from xtuner2llava.metadata.stages import Stages
from xtuner2llava.options import INPUT, OnProgress, PathOrText, SourceOptions, VerifyOptions, flag
from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.checks import config, names, structure
from xtuner2llava.verification.checks.privacy import privacy
from xtuner2llava.verification.checks.record import record_checks
from xtuner2llava.verification.checks.tokenizer import tokenizer_checks
from xtuner2llava.verification.folder import ConvertedFolder, open_folder
from xtuner2llava.verification.outcome import (
    FAILED,
    REFERENCE,
    SKIPPED,
    TENSORS,
    Check,
    Finding,
    Verification,
    judge,
)
from xtuner2llava.writing.out_record import RECORD_NAME

if TYPE_CHECKING:
    from xtuner2llava.planning.plan import Plan

_CONFIG, _HEADERS = "config.json", "safetensors headers"
# A check that does not apply to a folder finds None.
_CHECKS: Mapping[str, Callable[[ConvertedFolder], Finding | None]] = {
    _HEADERS: structure.headers,
    "index and files": structure.index,
    "tensors of the LLM": structure.language_model,
    "tensors of the vision tower": structure.tower,
    "tensors of the projector": structure.projector,
    "config keys": config.keys,
    "vocabulary size": config.vocabulary,
    "tied embeddings": config.tie,
    "dtype": config.dtype,
    "vision tower in the folder": config.tower,
    "generation config": config.generation,
    "image processor": config.image_processor,
}
# Those that are skipped where a header cannot be read.
_OF_TENSORS = (
    structure.language_model, structure.tower, structure.projector, config.vocabulary, config.tie,
    config.dtype, config.tower, config.image_processor,
)  # fmt: skip
_TEXT_CHECKS: Mapping[str, Callable[[ConvertedFolder], Finding | None]] = {
    "folder name": names.folder_name,
    "mm_vision_tower": names.vision_tower,
    "no local paths": privacy,
}


def verify_folder(out: PathOrText, options: VerifyOptions) -> Verification:
    """What is right and wrong with the folder `out`, see `api.verify`."""
    if options.logits and options.against is None and options.reference is None:
        raise UsageError(
            "needs the checkpoint whose logits the folder should have, or these logits",
            where="--logits",
            advice="Give --against CHECKPOINT, or --reference FILE.npz.",
        )
    if options.against is None:
        given = (f.name for f in fields(SourceOptions) if f.metadata["group"] == INPUT
                 and getattr(options, f.name) != f.default)  # fmt: skip
        what = "says how a checkpoint is read, and without --against none is"
        raise_faults(UsageError, [Fault(flag(name), what) for name in given])
    repository = fspath(out)
    if "/" in repository and not Path(out).exists() and is_reference(repository):
        return _verify_published(repository, options)
    stages = Stages()
    with stages.stage("look") as stage:
        folder, checks = check_folder(Path(out), options)
        stage.nbytes = _weight_bytes(Path(out))
    figures: dict[str, Json] = {}
    broken = {c.name for c in checks if c.result == FAILED} & {_CONFIG, _HEADERS}
    if folder is None or broken:
        why = "the folder is damaged, see above"
        asked = {TENSORS: options.against, REFERENCE: options.reference}
        checks += [Check(name, SKIPPED, why) for name, value in asked.items() if value is not None]
        return Verification(Path(out), tuple(checks), figures)
    plan: Plan | None = None
    if options.against is not None:
        from xtuner2llava.verification.against import against_checks, plan_again

        with stages.stage("plan"):
            plan = plan_again(fspath(options.against), options, folder)
        with stages.stage("compare") as stage:
            checks += against_checks(folder, plan, options, figures)
            stage.nbytes = plan.nbytes
    if options.reference is not None or (plan is not None and options.logits):
        from xtuner2llava.verification.logits import run_checks

        counter = partial(byte_counter, options.on_progress)
        with stages.stage("logits"):
            checks += run_checks(folder, plan, options, figures, counter)
    return Verification(Path(out), tuple(checks), figures)


def check_folder(
    path: Path, options: VerifyOptions, published: Mapping[str, str] | None = None
) -> tuple[ConvertedFolder | None, list[Check]]:
    """The folder, and all checks of it by itself; None if its config cannot be read.

    `published` are the SHA-256 of large files where `path` is a copy of a published model.
    """
    try:
        folder = open_folder(path)
    except CorruptFileError as error:
        return None, [Check.failed(_CONFIG, error)]
    checks = []
    if RECORD_NAME in folder.damage:
        checks.append(Check(RECORD_NAME, *judge(folder.damage[RECORD_NAME], "")))
    checks += _made(_CHECKS, folder)
    checks += [*tokenizer_checks(folder), *_made(_TEXT_CHECKS, folder)]
    counter = byte_counter(options.on_progress, "checksums", _weight_bytes(path))
    checks += [*record_checks(folder, counter, published), *_as_asked(folder, options)]
    return folder, checks


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _made(
    table: Mapping[str, Callable[[ConvertedFolder], Finding | None]], folder: ConvertedFolder
) -> Iterator[Check]:
    unread = folder.damage.keys() - {RECORD_NAME}
    for name, look in table.items():
        try:
            skip = unread and look in _OF_TENSORS
            finding = (SKIPPED, f"{min(unread)} cannot be read") if skip else look(folder)
        except ConversionError as error:
            yield Check.failed(name, error)
        else:
            if finding is not None:
                yield Check(name, *finding)


def _as_asked(folder: ConvertedFolder, options: VerifyOptions) -> Iterator[Check]:
    """Whether the folder is what the options ask for."""
    faults = []
    if options.format not in (None, folder.format):
        faults.append(f"it is of format {folder.format}, --format is {options.format}")
    if folder.format == "llava":
        model_type = folder.config.get("model_type")
        kind = "llava" if model_type == "llava" else "official"
        if options.model_type not in (None, kind):
            faults.append(f"its model_type is {model_type!r}, --model-type is {options.model_type}")
        tower, wanted = folder.config.get("mm_vision_tower"), options.vision_tower_name
        if wanted not in (None, tower):
            faults.append(f"its mm_vision_tower is {tower!r}, --vision-tower-name is {wanted}")
    if faults:
        yield Check("as asked for", *judge(faults, ""))


def _verify_published(repository: str, options: VerifyOptions) -> Verification:
    """The checks of a model on the Hub, from its small files and its headers."""
    given = {"--against": options.against, "--reference": options.reference}
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"reads every tensor, and {repository} is not a folder here",
                where=name,
                advice=f"Download it (`hf download {repository}`), and give its folder.",
            )
    from xtuner2llava.hub.published import published_copy

    try:
        with published_copy(repository) as copy:
            _, checks = check_folder(copy.path, options, copy.sha256)
            return Verification(Path(repository), tuple(checks), {"commit": copy.commit})
    except CheckpointError as error:
        faults = [
            replace(fault, what=f"is not a folder here, and {fault.what}")
            if fault.where == repository
            else fault
            for fault in error.faults
        ]
        raise type(error).from_faults(faults) from error


def byte_counter(
    on_progress: OnProgress | None, stage: str, total: int = 0
) -> Callable[[int], None]:
    """Adds up bytes, and reports their sum as the progress of `stage`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(stage, done, max(total, done))

    return advance
