"""What a converted folder holds, checked before it is published."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import Fault, OutputError, UsageError, VerificationError, raise_faults
from xtuner2llava.metadata import CARD_NAME
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.writing.out_record import RECORD_NAME, recorded_names

_ADVICE = "Convert again; of all files, only README.md may be edited."
# Checks of `verify` that are made here in another way: README.md may be edited, files that no
# conversion wrote are not published, and it is the repository's name that counts.
_NOT_OURS = ("checksums of small files", "no other files", "folder name")
_MAX_TEXT_BYTES = 64 << 20
# Hub tokens begin so (huggingface.co/docs/hub/security-tokens).
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True, slots=True)
class PublishableFolder:
    """The files to publish, by name; `others` are small.

    `unknown` are files that no conversion wrote.
    """

    folder: Path
    shards: tuple[str, ...]
    others: tuple[str, ...]
    unknown: tuple[str, ...]


def check_folder(folder: Path, advance: Callable[[int, int], None]) -> PublishableFolder:
    """The files of `folder`, if `verify` finds nothing wrong with it.

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
    faults: list[Fault] = []
    try:
        faults += _differences(folder, shards, small)
        faults += _tokens(folder, (*small, RECORD_NAME))
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"cannot be read ({error.strerror})", where=str(folder)) from error
    if not faults:
        faults += _verification_faults(folder, advance)
    raise_faults(VerificationError, faults)
    known = recorded | {CARD_NAME}
    others = tuple(sorted((known & present) - {*shards}))
    return PublishableFolder(folder, shards, others, tuple(sorted(present - known)))


def _verification_faults(folder: Path, advance: Callable[[int, int], None]) -> list[Fault]:
    """What `verify` finds wrong; it also compares the shards with their checksums."""
    from xtuner2llava.options import VerifyOptions
    from xtuner2llava.verification import verify_folder
    from xtuner2llava.verification.outcome import FAILED

    watched = VerifyOptions(on_progress=lambda stage, done, total: advance(done, total))
    found = verify_folder(folder, watched)
    return [
        Fault(f"{folder}, {check.name}", check.detail, _ADVICE)
        for check in found.with_result(FAILED)
        if check.name not in _NOT_OURS
    ]


def _differences(folder: Path, shards: tuple[str, ...], small: dict[str, Json]) -> list[Fault]:
    """What is missing, and small files that are other than what was written."""
    from xtuner2llava.verification.checks.record import difference

    faults = [
        Fault(str(folder / name), "is not there", _ADVICE)
        for name in (*shards, *small)
        if name != CARD_NAME and not _is_ours(folder, name)
    ]
    for name, recorded in {CARD_NAME: None, **small}.items():
        if not _is_ours(folder, name):
            continue
        size = (folder / name).stat().st_size
        if size > _MAX_TEXT_BYTES:
            what = f"has {size:,} bytes, expected at most {_MAX_TEXT_BYTES:,}"
            faults.append(Fault(str(folder / name), what, _ADVICE))
            continue
        if name == CARD_NAME:
            continue
        if change := difference(folder / name, recorded):
            faults.append(Fault(str(folder / name), change, _ADVICE))
    return faults


def _is_ours(folder: Path, name: str) -> bool:
    path = folder / name
    return Path(name).name == name and path.is_file() and not path.is_symlink()


def _tokens(folder: Path, names: tuple[str, ...]) -> list[Fault]:
    """Secrets in small files."""
    faults = []
    for name in dict.fromkeys((*names, CARD_NAME)):
        path = folder / name
        # Larger ones are faults already.
        if not _is_ours(folder, name) or path.stat().st_size > _MAX_TEXT_BYTES:
            continue
        if _TOKEN.search(path.read_bytes()):
            faults.append(
                Fault(str(path), "holds what looks like a Hub token", "Take it out, and revoke it.")
            )
    return faults
