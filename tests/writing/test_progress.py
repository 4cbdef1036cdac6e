"""An interrupted run goes on inside a shard, from where the file is still what was recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner2llava.errors import VerificationError
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import tensor_references
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT16, FLOAT32
from xtuner2llava.tensors.files import FileRange
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.rows import split
from xtuner2llava.tensors.stored import Stored
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.nonfinite import NonFinite
from xtuner2llava.writing.shards import plan_shards
from xtuner2llava.writing.writer import Written, write_shards

NAMES = "abcdefgh"
ROWS = 1000


class Interrupted(Stored):
    """A tensor during whose copy Ctrl-C comes."""

    def ranges(self) -> tuple[FileRange, ...]:
        import threading

        if threading.current_thread() is not threading.main_thread():
            raise KeyboardInterrupt
        return super().ranges()

    def flat(self) -> Interrupted:
        return self


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, LazyTensor]:
    """Eight of 100 kB each in one file of torch.save, of one storage; `b` and `c` are rounded."""
    values = torch.randn(8 * ROWS, 25, generator=torch.Generator().manual_seed(0))
    values[3, 3] = torch.inf
    path = tmp_path / "sources.pth"
    torch.save({"w": values}, path)
    file = TorchFile(path)
    whole = file.tensors(tensor_references(file.value, ""))["w"]
    found = dict(zip(NAMES, split(whole, [ROWS] * 8), strict=True))
    return {n: cast(t, FLOAT16) if n in "bc" else t for n, t in found.items()}


def write(out: Path, tensors: dict[str, LazyTensor], **options: Any) -> Written:
    with OutputFolder(out, "same") as folder:
        written = write_shards(folder, plan_shards(tensors).shards, **options)
        folder.publish()
    return written


def interrupt(out: Path, tensors: dict[str, LazyTensor], at: str, **options: Any) -> Path:
    """Leaves a run that was interrupted at that tensor; returns its record."""
    before = tensors[at]
    stored = before.unrounded() or before
    stopped = Interrupted(at, FLOAT32, stored.shape, stored.ranges() or ())
    with pytest.raises(KeyboardInterrupt):
        write(out, {**tensors, at: cast(stopped, before.dtype)}, **options)
    return out.with_name("out.partial") / ".xtuner2llava/records/model.safetensors.json"


def offset_of(tensors: dict[str, LazyTensor], name: str) -> int:
    (shard,) = plan_shards(tensors).shards
    return next(entry.offset for entry in shard.entries if entry.name == name)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where in OUT something was copied to."""
    places: list[int] = []
    copy = os.copy_file_range

    def noted(source: int, target: int, count: int, start: int, offset: int) -> int:
        places.append(offset)
        return copy(source, target, count, start, offset)

    monkeypatch.setattr(os, "copy_file_range", noted)
    return places


def test_what_was_written_is_not_written_again(
    tensors: dict[str, LazyTensor], tmp_path: Path, copied: list[int]
) -> None:
    write(tmp_path / "expected", tensors)
    expected = (tmp_path / "expected/model.safetensors").read_bytes()
    # float32 comes before float16: a, d to h, b, c.
    for at in "dfhbc":
        record = interrupt(tmp_path / "out", tensors, at)
        kept = offset_of(tensors, at)
        assert json.loads(record.read_bytes())["size"] == kept
    copied.clear()
    written = write(tmp_path / "out", tensors)
    assert copied == []  # All that is left is rounded.
    assert [shard.kept_bytes for shard in written.shards] == [kept]
    assert written.nonfinite == (NonFinite("a", 0, 1),)  # Found by the first run.
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def cut_short(path: Path, record: Path) -> None:
    os.truncate(path, json.loads(record.read_bytes())["size"] - 1)


def change_a_byte(path: Path, record: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


def remove(path: Path, record: Path) -> None:
    path.unlink()


def edit(**values: Any) -> Callable[[Path, Path], None]:
    def change(path: Path, record: Path) -> None:
        record.write_text(json.dumps({**json.loads(record.read_bytes()), **values}))

    return change


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "short": cut_short,
    "another byte": change_a_byte,
    "gone": remove,
    "no record": lambda path, record: record.unlink(),
    "half a record": lambda path, record: os.truncate(record, 50),
    "another place": edit(size=5000),
    "not a size": edit(size="x"),
    "beyond the end": edit(size=10**9),
    "without verification": edit(verified=False),
    "no sums": edit(sums=None),
    "not sums": edit(sums=[[1, 2]]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_recorded_is_written_anew(
    damage: str, tensors: dict[str, LazyTensor], tmp_path: Path, copied: list[int]
) -> None:
    record = interrupt(tmp_path / "out", tensors, "f")
    DAMAGES[damage](tmp_path / "out.partial/model.safetensors", record)
    copied.clear()
    written = write(tmp_path / "out", tensors)
    assert [shard.kept_bytes for shard in written.shards] == [0]
    assert min(copied) == offset_of(tensors, "a")
    write(tmp_path / "expected", tensors)
    expected = (tmp_path / "expected/model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected


def test_a_run_without_verification_goes_on_without(
    tensors: dict[str, LazyTensor], tmp_path: Path
) -> None:
    interrupt(tmp_path / "out", tensors, "f", verify=False)
    written = write(tmp_path / "out", tensors, verify=False)
    assert [shard.kept_bytes for shard in written.shards] == [offset_of(tensors, "f")]


def test_the_sums_of_what_was_read_before_count(
    tensors: dict[str, LazyTensor], tmp_path: Path
) -> None:
    """The entry is complete only with what the first run read, as it was then."""
    record = interrupt(tmp_path / "out", tensors, "f")
    values = json.loads(record.read_bytes())
    values["sums"][0][-1] ^= 1
    record.write_text(json.dumps(values))
    with pytest.raises(VerificationError, match="does not match its CRC-32; in it: w"):
        write(tmp_path / "out", tensors)
    assert not (tmp_path / "out").exists()
