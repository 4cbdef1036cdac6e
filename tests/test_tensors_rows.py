"""Rows cut, joined and rearranged: against dense torch, byte for byte, in blocks of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storing import stored
from xtuner2llava.tensors import (
    BY_NAME,
    FLOAT32,
    FLOAT64,
    Columns,
    FileRange,
    Fill,
    LazyTensor,
    Merge,
    Piece,
    Reshaped,
    Rows,
    SourceFile,
    Transpose,
    cast,
    concat,
    deinterleave,
    row_blocks,
    split,
    view_of_storage,
)
from xtuner2llava.tensors.files import read_ranges

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
ELEMENTS = 120
# A lazy tensor, and what it must be.
Pair = tuple[LazyTensor, torch.Tensor]


def bytes_of(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def whole(tensor: LazyTensor) -> torch.Tensor:
    return tensor.read(0, tensor.rows).reshape(tensor.shape)


class Storages:
    """One file with a storage of every dtype, each element different from its neighbours."""

    def __init__(self, path: Path) -> None:
        self.dense = {
            name: (torch.arange(ELEMENTS) % 97 - 13).to(getattr(torch, name)) for name in DTYPES
        }
        path.write_bytes(b"".join(map(bytes_of, self.dense.values())))
        file, offset = SourceFile.of(path), 0
        self.ranges: dict[str, FileRange] = {}
        for name, tensor in self.dense.items():
            self.ranges[name] = FileRange(file, offset, tensor.nbytes)
            offset += tensor.nbytes

    def view(self, name: str, shape: list[int], strides: list[int], offset: int) -> Pair:
        lazy = view_of_storage(
            f"a {name}", BY_NAME[name], tuple(shape), self.ranges[name], tuple(strides), offset
        )
        return lazy, self.dense[name].as_strided(shape, strides, offset)


@pytest.fixture(scope="module")
def storages(tmp_path_factory: pytest.TempPathFactory) -> Storages:
    return Storages(tmp_path_factory.mktemp("storages") / "all.bin")


def views(draw: st.DrawFn, storages: Storages) -> Pair:
    """A view as torch can make: a slice, transposed, expanded, empty, or a scalar."""
    name = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    strides = [draw(st.sampled_from((0, 1, 2, 3, 5, 6, 15))) for _ in shape]
    if draw(st.booleans()):  # row-major
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    last = sum(max(n - 1, 0) * stride for n, stride in zip(shape, strides, strict=True))
    offset = draw(st.integers(0, ELEMENTS - 1 - min(last, ELEMENTS - 1)))
    if last + offset >= ELEMENTS and math.prod(shape):
        return storages.view(name, [2], [1], 0)
    return storages.view(name, shape, strides, offset)


def pieces(draw: st.DrawFn, rows: int) -> list[int]:
    """Natural numbers that add up to `rows`."""
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=3)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]


def _split(draw: st.DrawFn, source: Pair) -> Pair:
    lazy, dense = source
    sizes = pieces(draw, lazy.rows)
    index = draw(st.integers(0, len(sizes) - 1))
    return split(lazy, sizes)[index], dense.split(sizes)[index]


def _concat(draw: st.DrawFn, source: Pair) -> Pair:
    parts = [source, _split(draw, source), source][: draw(st.integers(1, 3))]
    return concat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _padded(draw: st.DrawFn, source: Pair) -> Pair:
    lazy, dense = source
    rows = draw(st.integers(0, 3))
    fill = Fill(lazy.dtype, (rows, *lazy.row_shape), 1)
    joined = Rows([Piece(fill, 0, rows), Piece(lazy, 0, lazy.rows)])
    return joined, torch.cat([torch.ones((rows, *dense.shape[1:]), dtype=dense.dtype), dense])


def _deinterleaved(draw: st.DrawFn, source: Pair) -> Pair:
    lazy, dense = source
    groups = draw(st.sampled_from([n for n in range(1, 9) if lazy.rows % n == 0]))
    slots = pieces(draw, lazy.rows // groups)
    index = draw(st.integers(0, len(slots) - 1))
    grouped = dense.reshape(groups, lazy.rows // groups, *dense.shape[1:])
    expected = grouped.split(slots, 1)[index]
    return deinterleave(lazy, groups, slots)[index], expected.flatten(0, 1)


def _columns(draw: st.DrawFn, source: Pair) -> Pair:
    lazy, dense = source
    first, last = sorted(draw(st.tuples(*[st.integers(0, lazy.shape[1])] * 2)))
    return Columns(lazy, first, last), dense[:, first:last]


def _transposed(draw: st.DrawFn, source: Pair) -> Pair:
    return Transpose(source[0]), source[1].T


def _reshaped(draw: st.DrawFn, source: Pair) -> Pair:
    lazy, dense = source
    row_shape = (math.prod(lazy.row_shape),)
    return Reshaped(lazy, row_shape), dense.reshape(lazy.rows, *row_shape)


def _cast(draw: st.DrawFn, source: Pair) -> Pair:
    target = draw(st.sampled_from(("float64", "float32", "float16", "bfloat16")))
    return cast(source[0], BY_NAME[target]), source[1].to(getattr(torch, target))


@st.composite
def trees(draw: st.DrawFn, storages: Storages) -> Pair:
    """A lazy tensor made of up to four operations on a view."""
    source = views(draw, storages)
    for _ in range(draw(st.integers(0, 4))):
        dimensions = len(source[0].shape)
        known: list[Callable[[st.DrawFn, Pair], Pair]] = []
        if dimensions:
            known += [_split, _concat, _padded, _deinterleaved, _reshaped]
        if dimensions >= 2:
            known.append(_columns)
        if dimensions == 2:
            known.append(_transposed)
        if source[0].dtype.is_float:
            known.append(_cast)
        if known:
            source = draw(st.sampled_from(known))(draw, source)
    return source


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_tree_reads_as_torch_computes_it(storages: Storages, data: st.DataObject) -> None:
    lazy, dense = data.draw(trees(storages))
    expected = bytes_of(dense.clone(memory_format=torch.contiguous_format))
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


def test_a_view_that_is_not_row_major_is_no_range(storages: Storages) -> None:
    transposed, _ = storages.view("float32", [4, 6], [1, 4], 0)
    assert transposed.ranges() is None
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
        lambda w, v: Rows([Piece(w, 0, 1), Piece(cast(w, FLOAT64), 0, 1)]),
        lambda w, v: deinterleave(w, 3, [1]),
        lambda w, v: deinterleave(w, 0, [1]),
        lambda w, v: deinterleave(w, 2, [3, -1]),
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
    assert list(row_blocks(lazy, 1)) == [(row, row + 1) for row in range(10)]
    empty, _ = storages.view("float32", [10, 0], [1, 1], 0)
    assert list(row_blocks(empty, 50)) == []
