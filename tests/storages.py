"""Lazy tensors made at random of views of a file, each with the dense tensor that it must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st

from storing import bytes_of
from xtuner2llava.tensors.computed import Columns, Fill, Transpose, cast
from xtuner2llava.tensors.dtype import BY_NAME
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.lora import Reshaped
from xtuner2llava.tensors.rows import Piece, Rows, concat, deinterleave, split, unstack
from xtuner2llava.tensors.stored import view_of_storage

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
ELEMENTS = 120
# A lazy tensor, and what it must be.
Pair = tuple[LazyTensor, torch.Tensor]


class Storages:
    """One file with a storage of every dtype, of 120 elements, by default unlike their neighbours.

    Integers are made of what is finite in `values`.
    """

    def __init__(self, path: Path, values: torch.Tensor | None = None) -> None:
        values = torch.arange(ELEMENTS) % 97 - 13.0 if values is None else values
        whole = values.nan_to_num(0, 0, 0)
        self.dense = {}
        for name in DTYPES:
            dtype: torch.dtype = getattr(torch, name)
            self.dense[name] = (values if dtype.is_floating_point else whole).to(dtype)
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


def views(draw: st.DrawFn, storages: Storages, dtypes: Sequence[str], least: int) -> Pair:
    """A view as torch can make: a slice, transposed, expanded, empty, or a scalar."""
    name = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(least, 5), min_size=least, max_size=3))
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


def _unstacked(draw: st.DrawFn, source: Pair) -> Pair:
    lazy, dense = source
    index = draw(st.integers(0, lazy.rows - 1))
    return unstack(lazy, lazy.rows)[index], dense[index]


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
def trees(
    draw: st.DrawFn, storages: Storages, dtypes: Sequence[str] = DTYPES, least: int = 0
) -> Pair:
    """A lazy tensor made of up to four operations on a view.

    The view is of one of `dtypes`, and has at least so many dimensions, and so long ones.
    """
    source = views(draw, storages, dtypes, least)
    for _ in range(draw(st.integers(0, 4))):
        dimensions = len(source[0].shape)
        known: list[Callable[[st.DrawFn, Pair], Pair]] = []
        if dimensions:
            known += [_split, _concat, _padded, _deinterleaved, _reshaped]
        if dimensions >= 2:
            known.append(_columns)
            if source[0].rows:
                known.append(_unstacked)
        if dimensions == 2:
            known.append(_transposed)
        if source[0].dtype.is_float:
            known.append(_cast)
        if known:
            source = draw(st.sampled_from(known))(draw, source)
    return source
