"""Rows cut, joined and rearranged: against dense torch, byte for byte, in blocks of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storages import Storages, pieces, trees
from storing import bytes_of, stored
from xtuner2llava.tensors.computed import Columns, Transpose, cast
from xtuner2llava.tensors.dtype import BY_NAME, FLOAT32, FLOAT64
from xtuner2llava.tensors.files import FileRange, SourceFile, read_ranges
from xtuner2llava.tensors.lazy import LazyTensor, row_blocks
from xtuner2llava.tensors.lora import Merge, Reshaped
from xtuner2llava.tensors.rows import Piece, Rows, concat, deinterleave, split, unstack
from xtuner2llava.tensors.stored import view_of_storage


def whole(tensor: LazyTensor) -> torch.Tensor:
    return tensor.read(0, tensor.rows).reshape(tensor.shape)


@pytest.fixture(scope="module")
def storages(tmp_path_factory: pytest.TempPathFactory) -> Storages:
    return Storages(tmp_path_factory.mktemp("storages") / "all.bin")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_tree_reads_as_torch_computes_it(storages: Storages, data: st.DataObject) -> None:
    lazy, dense = data.draw(trees(storages))
    expected = bytes_of(dense)
    assert (lazy.shape, str(lazy.dtype)) == (tuple(dense.shape), str(dense.dtype)[6:])
    assert lazy.nbytes == len(expected)
    assert bytes_of(whole(lazy)) == expected

    blocks, start = [], 0
    for size in pieces(data.draw, lazy.rows):
        block = lazy.read(start, start + size)
        assert block.shape == (size, *lazy.row_shape)
        blocks.append(bytes_of(block))
        start += size
    assert b"".join(blocks) == expected

    flat = lazy.flat()
    memory = data.draw(st.integers(1, 200))
    parts = [bytes_of(flat.read(*block)) for block in row_blocks(flat, memory)]
    assert b"".join(parts) == expected

    ranges = lazy.ranges()
    assert ranges is None or bytes(read_ranges(ranges)) == expected


def test_rows_of_ranges_stay_ranges_and_neighbours_become_one(storages: Storages) -> None:
    lazy, _ = storages.view("float32", [6, 4], [4, 1], 8)
    start = storages.ranges["float32"].offset + 8 * 4
    parts = split(lazy, [1, 2, 3])
    assert [[(r.offset - start, r.length) for r in part.ranges() or ()] for part in parts] == [
        [(0, 16)],
        [(16, 32)],
        [(48, 48)],
    ]
    assert concat(parts).ranges() == lazy.ranges()
    first, second = deinterleave(lazy, 2, [1, 2])
    assert [(r.offset - start, r.length) for r in first.ranges() or ()] == [(0, 16), (48, 16)]
    assert [(r.offset - start, r.length) for r in second.ranges() or ()] == [(16, 32), (64, 32)]


def test_each_of_stacked_tensors_is_one_range(storages: Storages) -> None:
    lazy, dense = storages.view("float32", [3, 2, 4], [8, 4, 1], 8)
    start = storages.ranges["float32"].offset + 8 * 4
    members = unstack(lazy, 3)
    for index, member in enumerate(members):
        assert [(r.offset - start, r.length) for r in member.ranges() or ()] == [(32 * index, 32)]
        assert torch.equal(whole(member), dense[index])
        assert list(member.leaves()) == [lazy]
    first = split(members[2], [1, 1])[1].ranges() or ()
    assert [(r.offset - start, r.length) for r in first] == [(80, 16)]


def test_a_view_that_is_not_row_major_is_no_range(storages: Storages) -> None:
    transposed, _ = storages.view("float32", [4, 6], [1, 4], 0)
    assert transposed.ranges() is None
    (touched,) = transposed.extents()
    assert touched.length == 120 * 4  # the whole storage
    # One row's stride says nothing, and it still is a range.
    assert storages.view("float32", [1, 6], [77, 1], 0)[0].ranges() is not None


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "text"),
    [
        ([2, 3], [3, 1], 115, "its last element is number 120 of a storage that has 120"),
        ([2], [-1], 5, "make no sense"),
        ([-2], [1], 0, "make no sense"),
        ([2], [1], -1, "make no sense"),
        ([2, 2], [1], 0, "make no sense"),
        ([10**30], [10**30], 0, "its last element is number"),
    ],
)
def test_a_view_that_leaves_its_storage_is_refused(
    storages: Storages, shape: list[int], strides: list[int], offset: int, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        view_of_storage(
            "w", FLOAT32, tuple(shape), storages.ranges["float32"], tuple(strides), offset
        )


def test_elements_far_apart_are_read_in_pieces(tmp_path: Path) -> None:
    # Two columns of a matrix whose rows are 8 MiB: each lies further away than one read may span.
    path = tmp_path / "sparse.bin"
    width = 2 << 20
    with path.open("wb") as stream:
        for row in range(3):
            stream.seek(4 * row * width)
            stream.write(bytes_of(torch.tensor([row + 0.5, row + 0.25])))
        stream.truncate(4 * 3 * width)
    storage = FileRange(SourceFile.of(path), 0, 4 * 3 * width)
    lazy = view_of_storage("w", FLOAT32, (3, 2), storage, (width, 1), 0)
    assert whole(lazy).tolist() == [[0.5, 0.25], [1.5, 1.25], [2.5, 2.25]]
    columns = view_of_storage("w", FLOAT32, (2, 3), storage, (1, width), 0)
    assert whole(columns).tolist() == [[0.5, 1.5, 2.5], [0.25, 1.25, 2.25]]


@pytest.mark.parametrize(
    "make",
    [
        lambda w, v: split(w, [1, 2]),
        lambda w, v: split(w, [5, -1]),
        lambda w, v: concat([w, v]),
        lambda w, v: Rows([Piece(w, 0, 5)]),
        lambda w, v: Rows([Piece(w, 2, 1)]),
        lambda w, v: Rows([Piece(w, -1, 1)]),
        lambda w, v: Rows([Piece(w, 0, 1), Piece(cast(w, FLOAT64), 0, 1)]),
        lambda w, v: deinterleave(w, 3, [1]),
        lambda w, v: deinterleave(w, 0, [1]),
        lambda w, v: deinterleave(w, 2, [3, -1]),
        lambda w, v: unstack(w, 3),
        lambda w, v: unstack(v, 2),
        lambda w, v: Columns(w, 1, 4),
        lambda w, v: Columns(w, 2, 1),
        lambda w, v: Columns(v, 0, 1),
        lambda w, v: Transpose(v),
        lambda w, v: Reshaped(w, (4,)),
    ],
)
def test_what_does_not_fit_is_refused(
    storages: Storages, make: Callable[[LazyTensor, LazyTensor], object]
) -> None:
    matrix, vector = (
        storages.view("float32", s, t, 0)[0] for s, t in (([4, 3], [3, 1]), ([4], [1]))
    )
    with pytest.raises(ValueError, match=r"shape|rows|columns|dtypes"):
        make(matrix, vector)


def test_a_computed_part_joins_stored_ones(tmp_path: Path) -> None:
    # As where only q_proj of a fused attention weight was adapted.
    plain = stored(tmp_path, "k", torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    left, right = (stored(tmp_path, n, torch.ones(s)) for n, s in (("B", (1, 1)), ("A", (1, 2))))
    merged = Merge(plain, left, right, 1e-9)
    joined = concat([plain, merged])
    assert (joined.dtype, joined.stored_dtype) == (FLOAT64, BY_NAME["bfloat16"])
    assert whole(joined).tolist() == [[1.0, 2.0], [1.0 + 1e-9, 2.0 + 1e-9]]
    other = stored(tmp_path, "v", torch.ones(1, 2))
    with pytest.raises(ValueError, match="parts of dtypes bfloat16 and float32"):
        concat([merged, other])


def test_blocks_cover_all_rows_within_the_memory_allowed(storages: Storages) -> None:
    lazy, _ = storages.view("float32", [10, 3], [3, 1], 0)  # 12 bytes a row
    assert list(row_blocks(lazy, 50)) == [(0, 4), (4, 8), (8, 10)]
    assert list(row_blocks(lazy, 75)) == [(0, 5), (5, 10)]  # Six would do, but not for equal ones.
    assert list(row_blocks(lazy, 1)) == [(row, row + 1) for row in range(10)]
    empty, _ = storages.view("float32", [10, 0], [1, 1], 0)
    assert list(row_blocks(empty, 50)) == []
