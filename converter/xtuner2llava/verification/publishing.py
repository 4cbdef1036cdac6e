"""Whether a converted folder may be published, and which of its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import Fault, OutputError, UsageError, VerificationError, raise_faults
from xtuner2llava.metadata import CARD_NAME
from xtuner2llava.options import VerifyOptions
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.verification.checks.names import other_class
from xtuner2llava.verification.checks.record import changed
from xtuner2llava.verification.outcome import FAILED
from xtuner2llava.verification.run import check_folder
from xtuner2llava.writing.out_record import RECORD_NAME, recorded_names

_ADVICE = "Convert again; of all files, only README.md may be edited."
# Files that no conversion wrote are not published, and README.md may be edited; the other small
# files are compared here, before any of them is parsed.
_NOT_REQUIRED = ("checksums of small files", "no other files")
_MAX_TEXT_BYTES = 64 << 20
# Hub tokens begin so (huggingface.co/docs/hub/security-tokens).
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True, slots=True)
class PublishableFiles:
    """The names of the files to publish: `shards`, and `others`, which are small.

    `notes` are for the user.
    """

    shards: tuple[str, ...]
    others: tuple[str, ...]
    notes: tuple[str, ...]


def publishable_files(
    folder: Path, name: str, advance: Callable[[int, int], None]
) -> PublishableFiles:
    """The files of `folder` to publish as `name`, if `verify` finds nothing wrong with it.

    README.md may have been edited since. `advance(done, total)` counts bytes of shards. Raises
    `UsageError` for a folder that no conversion wrote, `VerificationError` with all that is wrong.
    """
    if not (folder / RECORD_NAME).is_file():
        raise UsageError(
            f"has no {RECORD_NAME}",
            where=str(folder),
            advice="Give a folder that `xtuner2llava convert` wrote.",
        )
    record = read_json(folder / RECORD_NAME)
    recorded, files = recorded_names(record), record.get("files")
    small = files if isinstance(files, dict) else {}
    shards = tuple(sorted(recorded - {*small, RECORD_NAME}))
    if not shards or not small:
        raise UsageError(f"names no files in {RECORD_NAME}", where=str(folder))
    faults = [
        Fault(str(folder / shard), "is not there", _ADVICE)
        for shard in shards
        if not _is_plain(folder, shard)
    ]
    try:
        for each, digest in {CARD_NAME: None, RECORD_NAME: None, **small}.items():
            faults += _faults(folder, each, digest)
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"cannot be read ({error.strerror})", where=str(folder)) from error
    raise_faults(VerificationError, faults)
    options = VerifyOptions(on_progress=lambda stage, done, total: advance(done, total))
    checked, checks = check_folder(folder, options)
    faults = [
        Fault(f"{folder}, {check.name}", check.detail, _ADVICE)
        for check in checks
        if check.result == FAILED and check.name not in _NOT_REQUIRED
    ]
    raise_faults(VerificationError, faults)
    known = recorded | {CARD_NAME}
    others = tuple(sorted((known & present) - {*shards}))
    notes = []
    if checked is not None and (reasons := other_class(checked, name)):
        notes.append(
            f"LLaVA chooses the class by the name, and '{name}' {reasons}: give "
            "load_pretrained_model another model_name, as README.md does."
        )
    if unknown := sorted(present - known):
        notes.append(f"Not published, as no conversion wrote it: {', '.join(unknown[:8])}.")
    return PublishableFiles(shards, others, tuple(notes))


def _faults(folder: Path, name: str, recorded: Json) -> Iterator[Fault]:
    """What is wrong with a small file; the card and the record itself have no `recorded` sum."""
    where = str(folder / name)
    if not _is_plain(folder, name):
        if recorded is not None and name != CARD_NAME:
            yield Fault(where, "is not there", _ADVICE)
        return
    size = (folder / name).stat().st_size
    if size > _MAX_TEXT_BYTES:
        yield Fault(where, f"has {size:,} bytes, expected at most {_MAX_TEXT_BYTES:,}", _ADVICE)
        return
    if recorded is not None and name != CARD_NAME and (what := changed(folder, name, recorded)):
        yield Fault(where, what, _ADVICE)
    if _TOKEN.search((folder / name).read_bytes()):
        yield Fault(where, "holds what looks like a Hub token", "Take it out, and revoke it.")


def _is_plain(folder: Path, name: str) -> bool:
    path = folder / name
    return Path(name).name == name and path.is_file() and not path.is_symlink()
