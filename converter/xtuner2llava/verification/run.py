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
    ConversionError,
    CorruptFileError,
    Fault,
    UsageError,
    raise_faults,
)
from xtuner2llava.hub.download import is_reference
from xtuner2llava.metadata.stages import Stages
from xtuner2llava.options import INPUT, PathOrText, SourceOptions, VerifyOptions, flag
from xtuner2llava.sources.artifact import VISUAL_ENCODER
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.tokenizer import read_tokenizer
from xtuner2llava.verification.checks import config, names, structure, tokenizer
from xtuner2llava.verification.checks.record import record_checks
from xtuner2llava.verification.folder import ConvertedFolder, UnreadableWeights, open_folder
from xtuner2llava.verification.outcome import (
    FAILED,
    LOGITS,
    REFERENCE,
    SKIPPED,
    TENSORS,
    Check,
    Finding,
    Verification,
    judge,
)
from xtuner2llava.verification.plain_model import NewerModelType
from xtuner2llava.writing.jobs import OnBytes
from xtuner2llava.writing.out_record import RECORD_NAME

if TYPE_CHECKING:
    import torch

    from xtuner2llava.planning.plan import Plan
    from xtuner2llava.verification.logits.streamed import ModelInput

    _Reference = tuple[ModelInput, torch.Tensor]

_HEADERS, _ASKED = "safetensors headers", "as asked for"
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
    "tokenizer": tokenizer.loads,
    "bos of the tokenizer": tokenizer.bos,
    "folder name": names.folder_name,
    "mm_vision_tower": names.vision_tower,
    "no local paths": names.privacy,
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
    if options.trust_remote_code and not (options.logits and options.against is not None):
        what = "is for --logits with --against, which are not both given"
        raise UsageError(what, where="--trust-remote-code")
    path, repository = Path(out), fspath(out)
    if "/" in repository and not path.exists() and is_reference(repository):
        return _verify_published(repository, options)
    return _verify(path, options)


def _verify(
    path: Path, options: VerifyOptions, published: Mapping[str, str] | None = None
) -> Verification:
    stages, figures = Stages(), dict[str, Json]()
    asked = {TENSORS: options.against, REFERENCE: options.reference}
    why = "the folder is damaged, see above"
    skipped = [Check(name, SKIPPED, why) for name, value in asked.items() if value is not None]
    try:
        folder = open_folder(path)
    except CorruptFileError as error:
        return Verification(path, (Check.failed("config.json", error), *skipped))
    # What is missing of these is said before the folder's gigabytes are read.
    plan, reference = None, None
    if options.against is not None:
        from xtuner2llava.verification.against import plan_again

        with stages.stage("plan"):
            plan = plan_again(fspath(options.against), options, folder)
    if options.reference is not None:
        from xtuner2llava.verification.logits.reference import read_reference

        reference = read_reference(Path(options.reference))
    with stages.stage("look") as stage:
        checks = check_folder(folder, _reporter(options, "checksums"), published)
        stage.nbytes = _weight_bytes(path)
    checks += _checked(_ASKED, _asked(folder, options))
    if any(check.name == _HEADERS and check.result == FAILED for check in checks):
        checks += skipped
    else:
        checks += _check_at_work(folder, options, plan, reference, stages, figures)
    return Verification(path, tuple(checks), figures)


def check_folder(
    folder: ConvertedFolder, report: OnBytes | None, published: Mapping[str, str] | None = None
) -> list[Check]:
    """All checks of a folder by itself.

    `report` is called with the bytes that are read, and in all. `published` are the SHA-256 of
    large files where it is a copy of a published model.
    """
    checks = []
    if folder.record_damage:
        checks.append(Check(RECORD_NAME, *judge(folder.record_damage, "")))
    for name, look in _CHECKS.items():
        checks += _checked(name, _row(name, look, folder))
    advance = _byte_counter(report, _weight_bytes(folder.path))
    return [*checks, *record_checks(folder, advance, published)]


def _check_at_work(
    folder: ConvertedFolder,
    options: VerifyOptions,
    plan: Plan | None,
    reference: _Reference | None,
    stages: Stages,
    figures: dict[str, Json],
) -> Iterator[Check]:
    """The checks with a checkpoint or a reference, where they are given."""
    if plan is not None:
        from xtuner2llava.verification.against import against_checks

        with stages.stage("compare") as stage:
            yield from against_checks(folder, plan, options, figures)
            stage.nbytes = plan.nbytes
    if not options.logits and reference is None:
        return
    from xtuner2llava.verification.logits.reference import reference_checks
    from xtuner2llava.verification.logits.trained import logits_checks

    with stages.stage("logits"):
        if plan is not None and options.logits:
            advance, trust = _byte_counter(_reporter(options, "logits")), options.trust_remote_code
            yield from _checked(LOGITS, logits_checks(folder, plan, trust, figures, advance))
        if reference is not None:
            checkpoint = None if plan is None else plan.checkpoint
            advance = _byte_counter(_reporter(options, "reference"))
            run = reference_checks(folder, checkpoint, reference, figures, advance)
            yield from _checked(REFERENCE, run)


def _row(
    name: str, look: Callable[[ConvertedFolder], Finding | None], folder: ConvertedFolder
) -> Iterator[Check]:
    if finding := look(folder):
        yield Check(name, *finding)


def _checked(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """`checks`; one called `name` if an error ends them."""
    try:
        yield from checks
    except (UnreadableWeights, NewerModelType) as error:
        yield Check(name, SKIPPED, str(error))
    except ConversionError as error:
        yield Check.failed(name, error)


def _asked(folder: ConvertedFolder, options: VerifyOptions) -> Iterator[Check]:
    """Whether the folder is what the options ask for."""
    faults = []
    if options.format not in (None, folder.format):
        faults.append(f"it is of format {folder.format}, --format is {options.format}")
    if folder.format == "llava":
        kind, tower = folder.config.get("model_type"), folder.config.get("mm_vision_tower")
        if options.model_type not in (None, "llava" if kind == "llava" else "official"):
            faults.append(f"its model_type is {kind!r}, --model-type is {options.model_type}")
        if (wanted := options.vision_tower_name) not in (None, tower):
            faults.append(f"its mm_vision_tower is {tower!r}, --vision-tower-name is {wanted}")
    if (dtype := folder.record.get("dtype", folder.dtype)) != options.dtype != "auto":
        faults.append(f"its dtype is {dtype}, --dtype is {options.dtype}")
    if not options.include_vision_tower and folder.part(VISUAL_ENCODER):
        faults.append("the vision tower is in it, --no-include-vision-tower leaves it out")
    bos = None if options.bos_token is None else read_tokenizer(folder.path).special("bos_token")
    if bos != options.bos_token:
        faults.append(f"its bos token is {bos!r}, --bos-token is {options.bos_token}")
    if faults:
        yield Check(_ASKED, *judge(faults, ""))


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
    from xtuner2llava.hub.errors import not_here
    from xtuner2llava.hub.published import published_copy

    with not_here(repository), published_copy(repository) as copy:
        found = _verify(copy.path, options, copy.sha256)
        return replace(found, out=Path(repository), figures={"commit": copy.commit})


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors") if file.is_file())


def _reporter(options: VerifyOptions, stage: str) -> OnBytes | None:
    return options.on_progress and partial(options.on_progress, stage)


def _byte_counter(report: OnBytes | None, total: int = 0) -> Callable[[int], None]:
    """Adds up bytes, and reports their sum."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(done, max(total, done))

    return advance
