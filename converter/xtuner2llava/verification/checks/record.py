"""`conversion.json` against the files: every checksum, and nothing that it does not name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blake3 import blake3

from xtuner2llava.metadata import CARD_NAME
from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import SKIPPED, Check
from xtuner2llava.writing.out_record import RECORD_NAME

_BLOCK_BYTES = 512 << 10
# What a clone or a download from the Hub adds.
_FOREIGN = (".gitattributes", ".gitignore")


def record_checks(
    out: OutFolder,
    advance: Callable[[int], None],
    published: Mapping[str, str] | None = None,
) -> Iterator[Check]:
    """Checks of all files against `conversion.json`; reads everything once.

    `advance` is told the bytes that were read. Of a published model, `published` are the SHA-256
    that the Hub states of large files; its tensors are not read, and its card may be edited there.
    """
    shards = out.record.get("shards")
    files = out.record.get("files")
    if not isinstance(shards, list) or not isinstance(files, dict):
        yield Check("checksums", SKIPPED, f"{RECORD_NAME} has no list of shards and files")
        return
    yield (
        _shards(out.path, shards, advance)
        if published is None
        else _published_shards(out.path, shards, published)
    )
    faults = []
    for name, recorded in files.items():
        if published is not None and name == CARD_NAME:
            continue
        path = out.path / name
        if Path(name).name != name:
            faults.append(f"{name!r} is no plain file name")
        elif not path.is_file():
            faults.append(f"{name} is not there")
        elif change := difference(path, recorded):
            faults.append(f"{name} {change}")
    whole = "" if published is None else f", {CARD_NAME} aside"
    fine = f"{len(files)} files are as written{whole}"
    yield Check.of("checksums of small files", faults, fine)
    known = {
        *files,
        RECORD_NAME,
        *(s["file"] for s in shards if isinstance(s, dict) and "file" in s),
    }
    strange = [p.name for p in out.files() if p.name not in known and p.name not in _FOREIGN]
    said = [f"{name} is not named in {RECORD_NAME}" for name in strange]
    yield Check.of("no other files", said, f"{RECORD_NAME} names them all")
    yield Check.of("record and config", list(_contradictions(out)), "the record is of this model")


def difference(
    path: Path, recorded: Json, advance: Callable[[int], None] = lambda count: None
) -> str | None:
    """How the file at `path` differs from what `conversion.json` says of it; None if it does not.

    Records of schema 1 have SHA-256 in place of BLAKE3, for small files as a bare digest.
    """
    values: Mapping[str, Json] = recorded if isinstance(recorded, dict) else {"sha256": recorded}
    name = "blake3" if "blake3" in values else "sha256"
    digest = blake3() if name == "blake3" else hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    if digest.hexdigest() == values.get(name):
        return None
    return f"is not what was written: its {name} is {digest.hexdigest()}"


def _shards(folder: Path, shards: list[Json], advance: Callable[[int], None]) -> Check:
    faults = []
    total = 0
    for name, shard, fault in _sized(folder, shards):
        if fault is not None:
            faults.append(fault)
        elif change := difference(folder / name, dict(shard), advance):
            faults.append(f"{name} {change}")
        else:
            total += (folder / name).stat().st_size
    fine = f"{len(shards)} files, {total:,} bytes, are as written"
    return Check.of("checksums of shards", faults, fine)


def _published_shards(folder: Path, shards: list[Json], stated: Mapping[str, str]) -> Check:
    """As `_shards`, where the Hub states checksums and the files themselves are not here."""
    title = "checksums of shards"
    sized = list(_sized(folder, shards))
    faults = [fault for _, _, fault in sized if fault is not None]
    written = {name: shard.get("sha256") for name, shard, _ in sized if "sha256" in shard}
    for name, digest in written.items():
        if name in stated and stated[name] != digest:
            faults.append(f"{name} is not what was written: the Hub's sha256 is {stated[name]}")
    if faults or (sized and written.keys() == {name for name, _, _ in sized} <= stated.keys()):
        return Check.of(title, faults, f"{len(shards)} files are as written, the Hub states")
    what = f"{RECORD_NAME} has BLAKE3, and the Hub states SHA-256"
    return Check(title, SKIPPED, f"{what}: sizes are right; verify a download to compare content")


def _sized(
    folder: Path, shards: list[Json]
) -> Iterator[tuple[str, Mapping[str, Json], str | None]]:
    """Each shard of the record, and what is wrong with its name or its size."""
    for shard in shards:
        values: Mapping[str, Json] = shard if isinstance(shard, dict) else {}
        name, size = values.get("file"), values.get("bytes")
        if not isinstance(name, str) or Path(name).name != name:
            yield "", values, f"{RECORD_NAME} names the shard {name!r}"
            continue
        path = folder / name
        fault = None
        if not path.is_file():
            fault = f"{name} is not there"
        elif path.stat().st_size != size:
            fault = f"{name} has {path.stat().st_size:,} bytes, {RECORD_NAME} says {size}"
        yield name, values, fault


def _contradictions(out: OutFolder) -> Iterator[str]:
    """Where the record and the folder speak of different models."""
    mapping = out.record.get("mapping")
    named: Mapping[str, Json] = mapping if isinstance(mapping, dict) else {}
    if named.get("format") != out.layout.format:
        yield f"the record says format {named.get('format')!r}, the folder is {out.layout.format}"
    if named.get("becomes") != out.layout.text.get("model_type"):
        model_type = out.layout.text.get("model_type")
        yield f"the record says it became {named.get('becomes')!r}, the config {model_type!r}"
    dtype = out.record.get("dtype")
    if dtype != "keep" and dtype != out.layout.dtype:
        yield f"the record says dtype {dtype!r}, the config {out.layout.dtype!r}"
