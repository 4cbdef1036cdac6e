"""The folder to verify, as far as small files and headers tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import ConversionError, UsageError
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.verification.layout import Layout, read_layout
from xtuner2llava.verification.outcome import Check
from xtuner2llava.verification.shard_header import HeaderEntry, ShardHeader, read_shard_header
from xtuner2llava.writing.out_record import RECORD_NAME

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class OutFolder:
    """A folder whose config could be read; `shards` are all its safetensors files by name."""

    path: Path
    layout: Layout
    shards: Mapping[str, ShardHeader]
    record: Mapping[str, Json]

    @property
    def tensors(self) -> dict[str, HeaderEntry]:
        """All tensors by name."""
        return {n: entry for shard in self.shards.values() for n, entry in shard.tensors.items()}

    def component(self, component: str) -> dict[str, tuple[str, HeaderEntry]]:
        """The tensors of a component by their names there, each with its name in the file."""
        found: dict[str, tuple[str, HeaderEntry]] = {}
        for name, entry in self.tensors.items():
            place = self.layout.place(name)
            if place is not None and place[0] == component:
                found[place[1]] = (name, entry)
        return found

    def small_json(self, name: str) -> dict[str, Json]:
        """The object in the file `name`; empty if there is no such file.

        Raises `CorruptFileError` where it is none.
        """
        return read_json(self.path / name) if (self.path / name).is_file() else {}

    def files(self) -> Iterator[Path]:
        """All files, sorted by name; folders inside are not looked into."""
        yield from sorted(path for path in self.path.iterdir() if path.is_file())


def open_out(path: Path) -> tuple[OutFolder | None, list[Check]]:
    """The folder, and a check for each file without which nothing else can be checked.

    Raises `UsageError` if `path` is no folder.
    """
    if not path.is_dir():
        raise UsageError(
            "is no folder", where=str(path), advice="Give what `xtuner2llava convert` wrote."
        )
    checks: list[Check] = []
    layout: Layout | None = None
    record: dict[str, Json] = {}
    try:
        config = read_json(path / "config.json")
        layout = read_layout(config, "config.json")
    except ConversionError as error:
        checks.append(Check.failed("config.json", error))
    try:
        record = read_json(path / RECORD_NAME)
    except ConversionError as error:
        checks.append(Check.failed(RECORD_NAME, error))
    if layout is None:
        return None, checks
    shards = {file.name: read_shard_header(file) for file in sorted(path.glob("*.safetensors"))}
    return OutFolder(path, layout, shards, record), checks
