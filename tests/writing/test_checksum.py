"""Checksum and verification are of what was written, however far behind their threads are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from storing import stored
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import BFLOAT16, FLOAT16, FLOAT32, DType
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.writing import shard_file
from xtuner2llava.writing.disk import BLOCK_BYTES
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import Entry, plan_shards
from xtuner2llava.writing.verify import WrittenFile
from xtuner2llava.writing.writer import write_shards

BLOCK = BLOCK_BYTES // 4
CASTS = [
    (FLOAT32, FLOAT32),
    (FLOAT32, FLOAT16),
    (FLOAT32, BFLOAT16),
    (BFLOAT16, FLOAT32),
    (BFLOAT16, FLOAT16),
]


class Slow:
    """BLAKE3 on a machine that takes long for it."""

    def __init__(self, data: bytes = b"") -> None:
        self._digest = blake3(data)

    def update(self, data: memoryview) -> None:
        time.sleep(0.002)
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        [BLOCK] * 12,  # whole blocks, as most weights of real models are
        [2 * BLOCK] * 8,
        [BLOCK + 1] * 8,
        [5, BLOCK, 0, BLOCK - 1, 3 * BLOCK] * 4,
    ],
)
def test_it_is_that_of_the_file(
    sizes: list[int], verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sources").mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, LazyTensor] = {}
    for number, size in enumerate(sizes):
        values = torch.randn(size, generator=generator)
        tensor = stored(tmp_path / "sources", f"t{number}", values)
        tensors[f"t{number:02}"] = tensor if number % 4 else cast(tensor, FLOAT16)
    plan = plan_shards(tensors, 3 * BLOCK_BYTES * len(sizes) // 4)
    monkeypatch.setattr(shard_file, "blake3", Slow)
    with OutputFolder(tmp_path / "out", "") as folder:
        written = write_shards(folder, plan.shards, verify=verify)
        out = folder.publish()
    assert len(written.shards) == len(plan.shards)
    for shard in written.shards:
        assert shard.blake3 == blake3((out / shard.filename).read_bytes()).hexdigest()


def test_what_is_rounded_stays_until_it_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the memory that it was rounded into."""
    (tmp_path / "sources").mkdir()
    values = torch.randn(24 * BLOCK, generator=torch.Generator().manual_seed(0))
    tensor = cast(stored(tmp_path / "sources", "t", values), FLOAT16)
    compare = WrittenFile.require_same

    def slowly(file: WrittenFile, entry: Entry, offset: int, expected: memoryview) -> None:
        time.sleep(0.01)
        compare(file, entry, offset, expected)

    monkeypatch.setattr(WrittenFile, "require_same", slowly)
    with OutputFolder(tmp_path / "out", "") as folder:
        write_shards(folder, plan_shards({"t": tensor}).shards)
        out = folder.publish()
    assert torch.equal(load_file(out / "model.safetensors")["t"], values.half())


@pytest.mark.parametrize("size", [0, 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 8 * BLOCK])
@pytest.mark.parametrize(("source", "target"), [pair for pair in CASTS if pair[0] != pair[1]])
def test_threads_do_not_overwrite_each_others_blocks(
    size: int, source: DType, target: DType, tmp_path: Path
) -> None:
    (tmp_path / "sources").mkdir()
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(source.torch)
    tensor = cast(stored(tmp_path / "sources", "t", values), target)
    with OutputFolder(tmp_path / "out", "") as folder:
        write_shards(folder, plan_shards({"t": tensor}).shards, jobs=4)
        out = folder.publish()
    assert torch.equal(load_file(out / "model.safetensors")["t"], values.to(target.torch))
