"""`conversion.json` against the files: every checksum, and nothing that it does not name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blake3 import blake3

from xtuner2llava.sources.json_file import Json
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import SKIPPED, Check
from xtuner2llava.writing.out_record import RECORD_NAME

_BLOCK_BYTES = 512 << 10
# What a clone or a download from the Hub adds.
_FOREIGN = (".gitattributes", ".gitignore")


def record_checks(out: OutFolder, advance: Callable[[int], None]) -> Iterator[Check]:
    """Checks of all files against `conversion.json`; reads everything once.

    `advance` is told the bytes that were read.
    """
    shards = out.record.get("shards")
    files = out.record.get("files")
    if not isinstance(shards, list) or not isinstance(files, dict):
        yield Check("checksums", SKIPPED, f"{RECORD_NAME} has no list of shards and files")
        return
    yield _shards(out.path, shards, advance)
    faults = []
    for name, recorded in files.items():
        path = out.path / name
        if Path(name).name != name:
            faults.append(f"{name!r} is no plain file name")
        elif not path.is_file():
            faults.append(f"{name} is not there")
        elif change := difference(path, recorded):
            faults.append(f"{name} {change}")
    fine = f"{len(files)} files are as written"
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
    for shard in shards:
        values: Mapping[str, Json] = shard if isinstance(shard, dict) else {}
        name, size = values.get("file"), values.get("bytes")
        if not isinstance(name, str) or Path(name).name != name:
            faults.append(f"{RECORD_NAME} names the shard {name!r}")
            continue
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is not there")
        elif path.stat().st_size != size:
            faults.append(f"{name} has {path.stat().st_size:,} bytes, {RECORD_NAME} says {size}")
        elif change := difference(path, shard, advance):
            faults.append(f"{name} {change}")
        else:
            total += path.stat().st_size
    fine = f"{len(shards)} files, {total:,} bytes, are as written"
    return Check.of("checksums of shards", faults, fine)


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
