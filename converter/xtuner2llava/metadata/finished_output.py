"""An OUT that is there already: this conversion finished, another one, or a damaged one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import OutputError
from xtuner2llava.metadata.front_matter import CARD_NAME
from xtuner2llava.metadata.record import describe, outcome, sources, tables
from xtuner2llava.planning.plan import Plan
from xtuner2llava.storage.json_file import Json
from xtuner2llava.writing.out_record import RECORD_NAME, differences, read_record


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A folder that holds a conversion: its files with their sizes, and its closed record."""

    files: Mapping[str, int]
    record: Mapping[str, Json]

    @property
    def blake3(self) -> dict[str, str]:
        """Those of the shards, as recorded."""
        return {
            str(each["file"]): str(each.get("blake3"))
            for each in tables(self.record.get("shards"))
            if "file" in each
        }

    @property
    def nonfinite(self) -> tuple[tuple[str, int, int], ...]:
        """Tensors with NaN or infinite values, and how many of each."""
        return tuple(
            (name, nan, infinite)
            for each in tables(self.record.get("nonfinite"))
            if isinstance(name := each.get("name"), str)
            and isinstance(nan := each.get("nan"), int)
            and isinstance(infinite := each.get("infinite"), int)
        )


def finished_output(out: Path, plan: Plan) -> FinishedOutput | None:
    """The conversion in `out` if it is the planned one; None if `out` holds no conversion.

    Names, sizes and small files are checked; shards are not read. Raises `OutputError` for another
    conversion, with what differs, and for a damaged one.
    """
    record = read_record(out)
    if record is None:
        return None
    shards = tables(record.get("shards"))
    sizes = {str(each["file"]): each.get("bytes") for each in shards if "file" in each}
    there, here = describe(record), describe(json.loads(plan.files[RECORD_NAME]))
    what = "" if outcome(there) == outcome(here) else differences(there, here)
    if not what and sizes != {shard.filename: shard.size for shard in plan.shards.shards}:
        what = differences(there, here) or "its shards are different"
    if not what:
        written = (out / RECORD_NAME).stat().st_mtime_ns
        newer = sorted(file.path.name for file in sources(plan) if file.mtime_ns > written)
        what = f"{newer[0]} was changed after that" if newer else ""
    what = what and f"was converted from other input or with other options: {what}"
    if not what and (damage := "; ".join(_damage(out, plan))):
        what = f"is this conversion, but damaged: {damage}"
    if what:
        advice = "Choose another OUT, or replace it with --overwrite."
        raise OutputError(what, where=str(out), advice=advice)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
    return FinishedOutput(files, record)


def _damage(out: Path, plan: Plan) -> Iterator[str]:
    """What is missing or has changed; README.md may have been edited."""
    sizes = {shard.filename: shard.size for shard in plan.shards.shards}
    for name in (*sizes, *plan.files):
        path = out / name
        if not path.is_file():
            yield f"{name} is missing"
        elif name in sizes and path.stat().st_size != sizes[name]:
            yield f"{name} has {path.stat().st_size:,} bytes, expected {sizes[name]:,}"
        elif name not in (*sizes, CARD_NAME, RECORD_NAME) and (
            path.stat().st_size != len(plan.files[name]) or path.read_bytes() != plan.files[name]
        ):
            yield f"{name} has changed"
