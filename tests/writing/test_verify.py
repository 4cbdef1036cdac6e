"""Verification finds what differs, and says where."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storing import stored
from xtuner2llava.errors import VerificationError
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT16, FLOAT32
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.writing import blocks, disk, verify
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import Shard, ShardPlan, plan_shards
from xtuner2llava.writing.verify import verify_shard
from xtuner2llava.writing.writer import write_shards

BLOCK_BYTES = 512 << 10
END_OF_FIRST_BLOCK = list(divmod(BLOCK_BYTES // 4 - 1, 200_000))  # of `a`
END_OF_C = 1_200_000 % (BLOCK_BYTES // 2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture
def plan(tmp_path: Path) -> ShardPlan:
    """Copied `a` and `b`, of equal shape, and cast `c`, in two shards; each of several blocks."""
    sources = tmp_path / "sources"
    sources.mkdir()
    numbers = torch.arange(600_000.0).reshape(3, 200_000)
    tensors: dict[str, LazyTensor] = {
        "a": stored(sources, "a", numbers),
        "b": stored(sources, "b", -numbers),
        "c": cast(stored(sources, "c", numbers / 4096), FLOAT16),
    }
    return plan_shards(tensors, 4_800_000)


@pytest.fixture
def written(plan: ShardPlan, tmp_path: Path) -> Path:
    with OutputFolder(tmp_path / "out", "") as folder:
        write_shards(folder, plan.shards)
        return folder.publish()


def verify_all(folder: Path, plan: ShardPlan) -> None:
    for shard in plan.shards:
        verify_shard(folder / shard.filename, shard)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def entry_offset(shard: Shard, name: str) -> int:
    return next(entry.offset for entry in shard.entries if entry.name == name)


def test_what_was_written_is_found_right(plan: ShardPlan, written: Path) -> None:
    verify_all(written, plan)


def test_a_flipped_bit_of_a_copied_tensor(plan: ShardPlan, written: Path) -> None:
    shard = plan.shards[0]
    offset = entry_offset(shard, "b") + (200_000 + 65_537) * 4 + 2
    flip(written / shard.filename, offset)
    with pytest.raises(VerificationError) as caught:
        verify_all(written, plan)
    (fault,) = caught.value.faults
    assert fault.where == f"{written / shard.filename}: b"
    # -265537 is c881a820 as float32, little-endian: 20a881c8.
    assert fault.what == (
        f"element [1, 65537] (byte {offset:,} of the file) is 20a880c8, expected 20a881c8"
    )


def test_a_flipped_bit_of_a_computed_tensor(plan: ShardPlan, written: Path) -> None:
    shard = plan.shards[1]
    offset = entry_offset(shard, "c") + 2 * 599_999
    flip(written / shard.filename, offset)
    with pytest.raises(
        VerificationError, match=r"model-00002-of-00002.safetensors: c: element \[2, 199999\]"
    ):
        verify_all(written, plan)


def test_the_first_fault_of_the_first_shard_is_told(plan: ShardPlan, written: Path) -> None:
    first, second = plan.shards
    flip(written / second.filename, second.size - 1)
    flip(written / first.filename, first.size - 1)
    flip(written / first.filename, entry_offset(first, "a"))
    with pytest.raises(VerificationError, match=r"00001-of-00002.safetensors: a: element \[0, 0\]"):
        verify_all(written, plan)


def test_swapped_tensors_of_one_shape(plan: ShardPlan, written: Path) -> None:
    shard = plan.shards[0]
    path = written / shard.filename
    data = path.read_bytes()
    a, b = entry_offset(shard, "a"), entry_offset(shard, "b")
    path.write_bytes(data[:a] + data[b:] + data[a:b])
    # The first elements are 0 and -0: the tensors are told apart even there.
    with pytest.raises(
        VerificationError, match=r": a: element \[0, 0\].* is 00000080, expected 00000000"
    ):
        verify_all(written, plan)


def test_a_truncated_file(plan: ShardPlan, written: Path) -> None:
    shard = plan.shards[1]
    os.truncate(written / shard.filename, shard.size - 1)
    with pytest.raises(
        VerificationError, match=f"has {shard.size - 1:,} bytes, expected {shard.size:,}"
    ):
        verify_all(written, plan)


def test_another_header_of_the_same_length(plan: ShardPlan, written: Path) -> None:
    path = written / plan.shards[0].filename
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(VerificationError, match="its header is not the one planned"):
        verify_all(written, plan)


def damaged_writes(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Lets the disk flip the last bit of every block of `length` bytes."""
    write_all = disk.write_all

    def damage(descriptor: int, data: memoryview, offset: int) -> None:
        if len(data) == length:
            data = memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        write_all(descriptor, data, offset)

    monkeypatch.setattr(verify, "write_all", damage)
    monkeypatch.delattr(os, "copy_file_range")


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (BLOCK_BYTES, f": a: element {END_OF_FIRST_BLOCK} "),  # the blocks of a copied tensor
        (END_OF_C, ": c: element [2, 199999] "),  # the last block of the rounded one
    ],
)
def test_a_disk_that_writes_wrong_bytes_is_found_before_out_appears(
    length: int,
    expected: str,
    plan: ShardPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damaged_writes(monkeypatch, length)
    with (
        pytest.raises(VerificationError, match=re.escape(expected)),
        OutputFolder(tmp_path / "out", "") as folder,
    ):
        write_shards(folder, plan.shards, jobs=1)
        folder.publish()
    assert not (tmp_path / "out").exists()


def test_without_verification_the_same_disk_is_believed(
    plan: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_writes(monkeypatch, END_OF_C)
    with OutputFolder(tmp_path / "out", "") as folder:
        write_shards(folder, plan.shards, verify=False)
        folder.publish()
    with pytest.raises(VerificationError, match="expected"):
        verify_all(tmp_path / "out", plan)


class Unsteady(LazyTensor):
    """Computes something else every time: what a machine with bad memory does."""

    dtype, shape = FLOAT32, (2,)

    def __init__(self) -> None:
        self._calls = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        self._calls += 1
        return torch.full((stop - start,), float(self._calls))

    def leaves(self) -> Iterator[LazyTensor]:
        return iter(())


def test_a_computed_tensor_is_compared_with_what_was_in_memory(tmp_path: Path) -> None:
    plan = plan_shards({"w": Unsteady()})
    with OutputFolder(tmp_path / "out", "") as folder:
        write_shards(folder, plan.shards)  # Not computed again, so not found to differ.
        out = folder.publish()
    with pytest.raises(VerificationError, match=r": w: element \[0\]"):
        verify_all(out, plan)
