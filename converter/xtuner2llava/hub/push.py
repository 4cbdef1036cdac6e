"""`push`, and publishing what a conversion has just written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from xtuner2llava.errors import (
    ConversionError,
    Fault,
    OutputError,
    UsageError,
    VerificationError,
    raise_faults,
)
from xtuner2llava.hub.errors import hub_errors, require_token
from xtuner2llava.hub.upload import Pushed, open_upload
from xtuner2llava.metadata.front_matter import CARD_NAME
from xtuner2llava.options import ConvertOptions, PushOptions
from xtuner2llava.storage.json_file import Json, read_json, table
from xtuner2llava.verification.checks.names import other_class
from xtuner2llava.verification.checks.record import changed
from xtuner2llava.verification.folder import open_folder
from xtuner2llava.verification.outcome import FAILED
from xtuner2llava.verification.run import check_folder
from xtuner2llava.writing.jobs import Work
from xtuner2llava.writing.out_record import RECORD_NAME, recorded_names

_ADVICE = "Convert again; of all files, only README.md may be edited."
# Files that no conversion wrote are not published, and README.md may be edited; the other small
# files are compared here, before any of them is parsed.
_NOT_REQUIRED = ("checksums of small files", "no other files")
_MAX_TEXT_BYTES = 64 << 20
# Hub tokens begin so (huggingface.co/docs/hub/security-tokens).
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def check_destination(options: ConvertOptions) -> None:
    """Raises before hours of work where the conversion cannot be published as it is asked to be.

    A `UsageError`, or a `HubError` if there is no valid token or no such name can be.
    """
    if options.push_to_hub is None:
        given = {
            "--private": options.private,
            "--revision": options.revision is not None,
            "--commit-message": options.commit_message is not None,
            "--low-disk": options.low_disk,
        }
        if names := [name for name, is_given in given.items() if is_given]:
            raise UsageError(
                f"{' and '.join(names)} without a repository to publish to",
                where="--push-to-hub",
                advice="Give --push-to-hub owner/name too.",
            )
        return
    with hub_errors(options.push_to_hub):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        validate_repo_id(options.push_to_hub)
        require_token()
        HfApi().whoami()


def push_folder(folder: Path, repo_id: str, options: PushOptions) -> Pushed:
    """Publishes `folder`, which `convert` wrote, if `verify` finds nothing wrong with it.

    README.md may have been edited since. Raises `UsageError` for a folder that no conversion wrote,
    `VerificationError` with all that is wrong before anything is sent, `HubError` if the Hub
    refuses; then the repository is what it was, and another call sends what is missing.
    """
    shards, small = _recorded(folder)
    present = _check_files(folder, shards, small)
    report = options.on_progress and partial(options.on_progress, "check")
    converted = open_folder(folder)
    faults = [
        Fault(f"{folder}, {check.name}", check.detail, _ADVICE)
        for check in check_folder(converted, report)
        if check.result == FAILED and check.name not in _NOT_REQUIRED
    ]
    raise_faults(VerificationError, faults)
    notes = []
    name = repo_id.rpartition("/")[2]
    if reasons := other_class(converted, name):
        notes.append(
            f"LLaVA chooses the class by the name, and '{name}' {reasons}: give "
            "load_pretrained_model another model_name, as README.md does."
        )
    others = {*small, CARD_NAME, RECORD_NAME} & present
    if unknown := sorted(present - others - {*shards}):
        notes.append(f"Not published, as no conversion wrote it: {', '.join(unknown[:8])}.")
    pushed = _publish(folder, shards, sorted(others), repo_id, options)
    return replace(pushed, notes=(*pushed.notes, *notes))


def push_written(folder: Path, shards: Sequence[str], options: ConvertOptions) -> Pushed:
    """Publishes `folder`, which was just written; `shards` are the names of its weight files.

    An error says that `folder` is complete and how to go on.
    """
    repo_id = str(options.push_to_hub)
    others = sorted(path.name for path in folder.iterdir() if path.name not in shards)
    try:
        return _publish(folder, shards, others, repo_id, options)
    except ConversionError as error:
        rest = Fault(
            str(folder),
            "is complete, but not published",
            f"Go on with `xtuner2llava push {folder} {repo_id}`.",
        )
        raise type(error).from_faults([*error.faults, rest]) from error


def _publish(
    folder: Path, shards: Sequence[str], others: Sequence[str], repo_id: str, options: PushOptions
) -> Pushed:
    with open_upload(repo_id, options) as upload:
        sizes = {name: (folder / name).stat().st_size for name in shards}
        watch = options.on_progress and partial(options.on_progress, "upload")
        work = Work(options.jobs, sum(sizes.values()), watch)

        def send(name: str) -> None:
            upload.send(folder / name, name)
            work.advance(sizes[name])

        work.run(send, list(sizes))
        return upload.commit(folder, others)


def _recorded(folder: Path) -> tuple[list[str], dict[str, Json]]:
    """The names of the shards in the record of `folder`, and what it says of each small file."""
    if not (folder / RECORD_NAME).is_file():
        raise UsageError(
            f"has no {RECORD_NAME}",
            where=str(folder),
            advice="Give a folder that `xtuner2llava convert` wrote.",
        )
    record = read_json(folder / RECORD_NAME)
    small = table(record, "files")
    shards = sorted(recorded_names(record) - {*small, RECORD_NAME})
    if not shards or not small:
        what = f"its {RECORD_NAME} names no files, or some that are not in the folder"
        raise UsageError(what, where=str(folder), advice="Convert again.")
    return shards, small


def _check_files(folder: Path, shards: Sequence[str], small: dict[str, Json]) -> set[str]:
    """The names in `folder`. Raises `VerificationError` unless its files can be looked into."""
    missing = [shard for shard in shards if not _is_plain(folder, shard)]
    faults = [Fault(str(folder / shard), "is not there", _ADVICE) for shard in missing]
    try:
        for name, recorded in {**small, CARD_NAME: None, RECORD_NAME: None}.items():
            faults += _faults(folder, name, recorded)
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"cannot be read ({error.strerror})", where=str(folder)) from error
    raise_faults(VerificationError, faults)
    return present


def _faults(folder: Path, name: str, recorded: Json) -> Iterator[Fault]:
    """What is wrong with a small file; the card and the record itself have no `recorded` sum."""
    path, where = folder / name, str(folder / name)
    if not _is_plain(folder, name):
        if recorded is not None:
            yield Fault(where, "is not there", _ADVICE)
    elif (size := path.stat().st_size) > _MAX_TEXT_BYTES:
        yield Fault(where, f"has {size:,} bytes, expected at most {_MAX_TEXT_BYTES:,}", _ADVICE)
    else:
        if recorded is not None and (what := changed(folder, name, recorded)):
            yield Fault(where, what, _ADVICE)
        if _TOKEN.search(path.read_bytes()):
            yield Fault(where, "holds what looks like a Hub token", "Take it out, and revoke it.")


def _is_plain(folder: Path, name: str) -> bool:
    path = folder / name
    return Path(name).name == name and path.is_file() and not path.is_symlink()
