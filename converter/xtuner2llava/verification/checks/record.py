"""`conversion.json` against the files: every checksum, and no other files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import isfile
from pathlib import Path

from blake3 import blake3

from xtuner2llava.metadata.front_matter import CARD_NAME
from xtuner2llava.storage.json_file import Json, table
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.outcome import SKIPPED, Check, Finding, judge
from xtuner2llava.writing.out_record import RECORD_NAME

_BLOCK_BYTES = 512 << 10
# Files that a clone or a download from the Hub adds.
_OF_THE_HUB = (".gitattributes", ".gitignore")


def record_checks(
    out: ConvertedFolder,
    advance: Callable[[int], None],
    published: Mapping[str, str] | None = None,
) -> Iterator[Check]:
    """Checks of all files against `conversion.json`; reads everything once.

    `advance` counts the bytes that were read. Of a published model, `published` are the SHA-256 of
    large files that the Hub states; its tensors are not read. README.md may have been edited.
    """
    shards, files = out.record.get("shards"), out.record.get("files")
    if not isinstance(shards, list) or not isinstance(files, dict):
        yield Check("checksums", SKIPPED, f"{RECORD_NAME} has no list of shards and files")
        return
    # Each file is read once, however often it is named.
    listed = (entry if isinstance(entry, dict) else {} for entry in shards)
    entries = [*{str(entry.get("file")): entry for entry in listed}.values()]
    yield Check("checksums of shards", *_shards(out.path, entries, advance, published))
    wrong = {n: what for n, recorded in files.items() if (what := changed(out.path, n, recorded))}
    fine = f"{len(files)} files as written"
    # Users edit the card, and on the Hub they may delete it.
    if CARD_NAME in wrong and (published is not None or (out.path / CARD_NAME).is_file()):
        del wrong[CARD_NAME]
        fine = f"{len(files) - 1} files as written; {CARD_NAME} was edited since"
    faults = [f"{name} {what}" for name, what in wrong.items()]
    yield Check("checksums of small files", *judge(faults, fine))
    known = {*files, RECORD_NAME, *_OF_THE_HUB, *(str(entry.get("file")) for entry in entries)}
    others = [path.name for path in out.files() if path.name not in known]
    faults = [f"{name} is not named in {RECORD_NAME}" for name in others]
    yield Check("no other files", *judge(faults, f"{RECORD_NAME} names them all"))
    yield Check("record and config", *judge([*_contradictions(out)], "the record is of this model"))


def changed(
    folder: Path, name: str, recorded: Json, advance: Callable[[int], None] = lambda count: None
) -> str | None:
    """How the file `name` differs from what `conversion.json` says of it; None if it does not.

    Records of schema 1 have SHA-256 in place of BLAKE3, for small files as a bare digest.
    """
    values: Mapping[str, Json] = recorded if isinstance(recorded, dict) else {"sha256": recorded}
    if what := _misplaced(folder, name, values):
        return what
    kind = "blake3" if "blake3" in values else "sha256"
    digest = blake3() if kind == "blake3" else hashlib.sha256()
    with (folder / name).open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    if digest.hexdigest() == values.get(kind):
        return None
    return f"is not what was written: its {kind} is {digest.hexdigest()[:16]}..."


def _misplaced(folder: Path, name: str, values: Mapping[str, Json]) -> str | None:
    """What is wrong with the name, the presence or the size of a file."""
    if Path(name).name != name:
        return "is not a plain file name"
    if not isfile(folder / name):  # noqa: PTH113 - False for names that no file can have, too
        return "is not there"
    size = (folder / name).stat().st_size
    if "bytes" in values and size != values["bytes"]:
        return f"has {size:,} bytes, {RECORD_NAME} says {values['bytes']}"
    return None


def _shards(
    folder: Path,
    shards: Sequence[dict[str, Json]],
    advance: Callable[[int], None],
    published: Mapping[str, str] | None,
) -> Finding:
    faults = []
    uncompared = False
    for shard in shards:
        name = str(shard.get("file"))
        if published is None:
            what = changed(folder, name, shard, advance)
        else:
            what, digest = _misplaced(folder, name, shard), published.get(name)
            uncompared |= digest is None or "sha256" not in shard
            if what is None and not uncompared and digest != shard["sha256"]:
                what = f"is not what was written: the Hub's sha256 is {digest}"
        if what is not None:
            faults.append(f"{name} {what}")
    if uncompared and not faults:
        what = f"{RECORD_NAME} has BLAKE3, and the Hub states SHA-256"
        return SKIPPED, f"{what}: sizes are right; verify a download to compare content"
    files = f"{len(shards)} file{'s' * (len(shards) != 1)}"
    if published is not None:
        return judge(faults, f"{files} as written, the Hub states")
    total = sum((folder / str(s.get("file"))).stat().st_size for s in shards) if not faults else 0
    return judge(faults, f"{files}, {total:,} bytes, as written")


def _contradictions(out: ConvertedFolder) -> Iterator[str]:
    """Where the record and the config are of different models."""
    named = table(out.record, "mapping")
    if named.get("format") != out.format:
        yield f"the record says format {named.get('format')!r}, the folder is {out.format}"
    model_type, dtype = out.text.get("model_type"), out.record.get("dtype")
    if named.get("becomes") != model_type:
        yield f"the record says it became {named.get('becomes')!r}, the config {model_type!r}"
    if dtype not in ("keep", out.dtype):
        yield f"the record says dtype {dtype!r}, the config {out.dtype!r}"
