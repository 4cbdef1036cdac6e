"""An OUT that is there already: this conversion finished, another one, or a damaged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from xtuner2llava.errors import OutputError
from xtuner2llava.metadata import CARD_NAME
from xtuner2llava.metadata.provenance import describe, outcome, sources
from xtuner2llava.planning.plan import Plan
from xtuner2llava.storage.json_file import Json
from xtuner2llava.writing.out_record import RECORD_NAME, differences, read_record


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A folder that holds a conversion; `blake3` are those of its shards, as recorded."""

    files: Mapping[str, int]
    blake3: Mapping[str, str]
    nonfinite: tuple[tuple[str, int, int], ...]


def finished_output(out: Path, plan: Plan, expected: Mapping[str, Json]) -> FinishedOutput | None:
    """The conversion in `out` if it is the one that is asked for; None if there is none at all.

    `expected` is its `conversion.json` without shards. Names, sizes and small files are checked;
    shards are not read. Raises `OutputError` for another conversion, with what differs, and for a
    damaged one.
    """
    record = read_record(out)
    if record is None:
        return None
    found = _Record(record)
    there, here = describe(found.values), describe(expected)
    what = "" if outcome(there) == outcome(here) else differences(there, here)
    if not what and found.sizes != {shard.filename: shard.size for shard in plan.shards.shards}:
        what = differences(there, here) or "its shards are others"
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
    damage = "; ".join(found.damage(out))
    if damage:
        raise OutputError(
            f"is this conversion, but damaged: {damage}",
            where=str(out),
            advice="Choose another OUT, or replace it with --overwrite.",
        )
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
    return FinishedOutput(files, found.blake3, found.nonfinite)


class _Record:
    """A `conversion.json`, of which nothing is taken for granted."""

    def __init__(self, values: Mapping[str, Json]) -> None:
        self.values = values
        self.sizes: dict[str, int] = {}
        self.blake3: dict[str, str] = {}
        for entry in self._listed("shards"):
            name, size, digest = entry.get("file"), entry.get("bytes"), entry.get("blake3")
            if isinstance(name, str) and isinstance(size, int) and isinstance(digest, str):
                self.sizes[name], self.blake3[name] = size, digest
        self.nonfinite = tuple(
            (name, nan, infinite)
            for entry in self._listed("nonfinite")
            if isinstance(name := entry.get("name"), str)
            and isinstance(nan := entry.get("nan"), int)
            and isinstance(infinite := entry.get("infinite"), int)
        )

    def damage(self, out: Path) -> Iterator[str]:
        """What is missing or has changed; README.md may have been edited."""
        for name, size in self.sizes.items():
            path = out / name
            if not path.is_file():
                yield f"{name} is missing"
            elif path.stat().st_size != size:
                yield f"{name} has {path.stat().st_size:,} bytes, expected {size:,}"
        small = self.values.get("files")
        for name, data in small.items() if isinstance(small, dict) else ():
            path = out / name
            if not path.is_file():
                yield f"{name} is missing"
            elif name != CARD_NAME and data != {"blake3": blake3(path.read_bytes()).hexdigest()}:
                yield f"{name} has changed"

    def _listed(self, key: str) -> list[dict[str, Json]]:
        listed = self.values.get(key)
        return [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
