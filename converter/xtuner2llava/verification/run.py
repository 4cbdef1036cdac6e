"""`verify`: a converted folder, looked at by itself, against its checkpoint, and at work.

open     config, headers and the record of the conversion
look     weight files, config, tokenizer, names, checksums    checks/
against  the plan made again, every tensor compared           against.py
logits   both models run on one picture and prompt            logits/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import CheckpointError, ConversionError, UsageError
from xtuner2llava.hub.download import is_reference
from xtuner2llava.options import OnProgress, PathOrText, VerifyOptions
from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.checks.config_checks import config_checks
from xtuner2llava.verification.checks.folder_name import name_checks
from xtuner2llava.verification.checks.privacy import privacy_check
from xtuner2llava.verification.checks.record import record_checks
from xtuner2llava.verification.checks.structure import structure_checks
from xtuner2llava.verification.checks.tokenizer import tokenizer_checks
from xtuner2llava.verification.out_folder import OutFolder, open_out
from xtuner2llava.verification.outcome import (
    FAILED,
    REFERENCE,
    SKIPPED,
    TENSORS,
    Check,
    Verification,
)

if TYPE_CHECKING:
    from xtuner2llava.planning.plan import Plan


def verify_folder(out: PathOrText, options: VerifyOptions) -> Verification:
    """What is right and wrong with the folder `out`, see `api.verify`."""
    if options.logits and options.against is None and options.reference is None:
        raise UsageError(
            "needs the checkpoint whose logits the folder should have, or these logits",
            where="--logits",
            advice="Give --against CHECKPOINT, or --reference FILE.npz.",
        )
    repository = fspath(out)
    if "/" in repository and not Path(out).exists() and is_reference(repository):
        return _verify_published(repository, options)
    on_progress, against = options.on_progress, options.against
    folder, checks = open_out(Path(out))
    figures: dict[str, Json] = {}
    if folder is not None:
        checks += _by_itself(folder, on_progress)
        checks += _as_asked(folder, options)
    broken = any(check.result == FAILED for check in checks if check.name in _NEEDED)
    if folder is None or broken:
        why = "the folder is damaged, see above"
        asked = {TENSORS: against, REFERENCE: options.reference}
        checks += [Check(name, SKIPPED, why) for name, value in asked.items() if value is not None]
        return Verification(Path(out), tuple(checks), figures)
    plan: Plan | None = None
    if against is not None:
        from xtuner2llava.verification.against import plan_again

        plan = plan_again(fspath(against), options, folder)
        checks += _against(folder, plan, options, figures)
    if options.reference is not None:
        checks += _reference(folder, plan, options, figures)
    return Verification(Path(out), tuple(checks), figures)


def _verify_published(repository: str, options: VerifyOptions) -> Verification:
    """The same of a model on the Hub, as far as its small files and its headers tell."""
    given = {"--against": options.against, "--reference": options.reference}
    for flag, value in given.items():
        if value is not None:
            raise UsageError(
                f"reads every tensor, and {repository} is not a folder here",
                where=flag,
                advice=f"Download it (`hf download {repository}`), and give its folder.",
            )
    from xtuner2llava.hub.published import published_copy

    try:
        with published_copy(repository) as copy:
            folder, checks = open_out(copy.path)
            if folder is not None:
                checks += _by_itself(folder, options.on_progress, copy.sha256)
                checks += _as_asked(folder, options)
            return Verification(Path(repository), tuple(checks), {"commit": copy.commit})
    except CheckpointError as error:
        faults = [
            replace(fault, what=f"is not a folder here, and {fault.what}")
            if fault.where == repository
            else fault
            for fault in error.faults
        ]
        raise type(error).from_faults(faults) from error


# Without these being right, the tensors cannot be read.
_NEEDED = ("config.json", "safetensors headers")


def _by_itself(
    folder: OutFolder, on_progress: OnProgress | None, published: Mapping[str, str] | None = None
) -> list[Check]:
    total = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    checks = [*structure_checks(folder), *config_checks(folder), *tokenizer_checks(folder)]
    checks += [*name_checks(folder), privacy_check(folder)]
    return [*checks, *record_checks(folder, _counter(on_progress, "checksums", total), published)]


def _as_asked(folder: OutFolder, options: VerifyOptions) -> Iterator[Check]:
    """Whether the folder is what the options say, as far as they say it."""
    format, model_type = options.format, options.model_type
    tower = options.vision_tower_name
    faults = []
    if format is not None and format != folder.layout.format:
        faults.append(f"it is of format {folder.layout.format}, --format is {format}")
    said = folder.layout.config.get("model_type")
    if model_type is not None and folder.layout.format == "llava":
        plain = said == "llava"
        if plain != (model_type == "llava"):
            faults.append(f"its model_type is {said!r}, --model-type is {model_type}")
    named = folder.layout.config.get("mm_vision_tower")
    if tower is not None and folder.layout.format == "llava" and named != tower:
        faults.append(f"its mm_vision_tower is {named!r}, --vision-tower-name is {tower}")
    if faults:
        yield Check.of("as asked for", faults, "")


def _against(
    folder: OutFolder, plan: Plan, options: VerifyOptions, figures: dict[str, Json]
) -> Iterator[Check]:
    """The comparison with a checkpoint, of which `plan` was made."""
    from xtuner2llava.verification.against import against_checks

    on_progress = options.on_progress
    said = None if on_progress is None else _staged(on_progress, "compare")
    yield from against_checks(folder, plan, options.jobs, figures, said)
    if not options.logits:
        return
    from xtuner2llava.verification.logits import LOGITS, logits_checks

    try:
        yield from logits_checks(
            folder,
            plan,
            trust_remote_code=options.trust_remote_code,
            figures=figures,
            advance=_counter(on_progress, "logits", 0),
        )
    except ConversionError as error:
        yield Check.failed(LOGITS, error)


def _reference(
    folder: OutFolder, plan: Plan | None, options: VerifyOptions, figures: dict[str, Json]
) -> Iterator[Check]:
    """The comparison with given logits. Raises `UsageError` for a file that has none."""
    from xtuner2llava.verification.logits import folder_side, read_reference, reference_checks

    assert options.reference is not None  # noqa: S101 - the caller has looked
    reference = read_reference(Path(options.reference))
    try:
        side = folder_side(folder, None if plan is None else plan.checkpoint)
        advance = _counter(options.on_progress, "reference", 0)
        yield from reference_checks(side, reference, figures=figures, advance=advance)
    except ConversionError as error:
        yield Check.failed(REFERENCE, error)


def _staged(on_progress: OnProgress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(stage, done, total)


def _counter(on_progress: OnProgress | None, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(stage, done, max(total, done))

    return advance
