"""An OUT that is there already: this conversion finished, another one, or a damaged one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import OutputError
from xtuner2llava.metadata.card import CARD_NAME
from xtuner2llava.metadata.record import describe, outcome, sources
from xtuner2llava.planning.plan import Plan
from xtuner2llava.storage.json_file import Json
from xtuner2llava.writing import Written
from xtuner2llava.writing.out_record import RECORD_NAME, differences, read_record


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A folder that holds a conversion; `blake3` are those of its shards, as recorded."""

    files: Mapping[str, int]
    blake3: Mapping[str, str]
    nonfinite: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, written: Written, files: Mapping[str, bytes]) -> FinishedOutput:
        """What was just written: the shards, and the small `files`."""
        return cls(
            {shard.filename: shard.size for shard in written.shards}
            | {name: len(data) for name, data in files.items()},
            {shard.filename: shard.blake3 for shard in written.shards},
            tuple((each.name, each.nan, each.infinite) for each in written.nonfinite),
        )


def finished_output(out: Path, plan: Plan) -> FinishedOutput | None:
    """The conversion in `out` if it is the planned one; None if `out` holds no conversion.

    Names, sizes and small files are checked; shards are not read. Raises `OutputError` for another
    conversion, with what differs, and for a damaged one.
    """
    record = read_record(out)
    if record is None:
        return None
    shards = {
        str(entry["file"]): (entry.get("bytes"), str(entry.get("blake3")))
        for entry in _listed(record, "shards")
        if "file" in entry
    }
    sizes = {name: size for name, (size, _) in shards.items()}
    there, here = describe(record), describe(json.loads(plan.files[RECORD_NAME]))
    what = "" if outcome(there) == outcome(here) else differences(there, here)
    if not what and sizes != {shard.filename: shard.size for shard in plan.shards.shards}:
        what = differences(there, here) or "its shards are different"
    if not what:
        written = (out / RECORD_NAME).stat().st_mtime_ns
        newer = sorted(file.path.name for file in sources(plan) if file.mtime_ns > written)
        what = f"{newer[0]} was changed after that" if newer else ""
    if what:
        raise OutputError(
            f"was converted from other input or with other options: {what}",
            where=str(out),
            advice="Choose another OUT, or replace it with --overwrite.",
        )
    damage = "; ".join(_damage(out, plan))
    if damage:
        raise OutputError(
            f"is this conversion, but damaged: {damage}",
            where=str(out),
            advice="Choose another OUT, or replace it with --overwrite.",
        )
    nonfinite = (
        (entry.get("name"), entry.get("nan"), entry.get("infinite"))
        for entry in _listed(record, "nonfinite")
    )
    return FinishedOutput(
        {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()},
        {name: digest for name, (_, digest) in shards.items()},
        tuple(
            (name, nan, infinite)
            for name, nan, infinite in nonfinite
            if isinstance(name, str) and isinstance(nan, int) and isinstance(infinite, int)
        ),
    )


def _damage(out: Path, plan: Plan) -> Iterator[str]:
    """What is missing or has changed; README.md may have been edited."""
    sizes = {shard.filename: shard.size for shard in plan.shards.shards}
    for name, size in {**sizes, **{name: len(data) for name, data in plan.files.items()}}.items():
        path = out / name
        if not path.is_file():
            yield f"{name} is missing"
        elif name in sizes and path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size:,} bytes, expected {size:,}"
        elif name not in (*sizes, CARD_NAME, RECORD_NAME) and (
            path.stat().st_size != size or path.read_bytes() != plan.files[name]
        ):
            yield f"{name} has changed"


def _listed(record: Mapping[str, Json], key: str) -> list[dict[str, Json]]:
    listed = record.get(key)
    return [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
