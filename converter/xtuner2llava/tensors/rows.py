"""Tensors made of rows of other tensors: still only ranges where their parts are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import FLOAT64, DType
from xtuner2llava.tensors.files import FileRange, cut, join
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.stored import Stored

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `[start, stop)` of `source`."""

    source: LazyTensor
    start: int
    stop: int


class Rows(LazyTensor):
    """The rows of `pieces`, one after the other.

    One class for splitting, concatenating, de-interleaving and padding. Raises `ValueError` where
    the pieces do not fit together.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        first = pieces[0].source
        self.dtype = first.dtype
        self.shape = (sum(piece.stop - piece.start for piece in pieces), *first.row_shape)
        for piece in pieces:
            if piece.source.dtype != first.dtype:
                raise ValueError(f"parts of dtypes {first.dtype} and {piece.source.dtype}")
            if piece.source.row_shape != first.row_shape or not piece.source.shape:
                raise ValueError(f"parts of shapes {first.shape} and {piece.source.shape}")
            if not 0 <= piece.start <= piece.stop <= piece.source.rows:
                raise ValueError(
                    f"rows {piece.start} to {piece.stop} of a tensor with {piece.source.rows}"
                )
        self._pieces = tuple(pieces)

    @property
    def row_cost(self) -> int:
        return self.row_bytes + max(piece.source.row_cost for piece in self._pieces)

    @property
    def fixed_cost(self) -> int:
        return max(piece.source.fixed_cost for piece in self._pieces)

    @property
    def shared_cost(self) -> int:
        return sum({id(p.source): p.source.shared_cost for p in self._pieces}.values())

    @property
    def stored_dtype(self) -> DType:
        return self._pieces[0].source.stored_dtype

    def ranges(self) -> tuple[FileRange, ...] | None:
        found: list[FileRange] = []
        for piece in self._pieces:
            ranges = piece.source.ranges()
            if ranges is None:
                return None
            length = (piece.stop - piece.start) * self.row_bytes
            found.extend(cut(ranges, piece.start * self.row_bytes, length))
        return join(found)

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        for source, low, high, place in self._parts(start, stop):
            source.read_into(low, high, out[place : place + high - low])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[LazyTensor, int, int, int]]:
        """Whose rows `[start, stop)` are: (source, its rows from, to, their place in the block)."""
        position = 0
        for piece in self._pieces:
            rows = piece.stop - piece.start
            low, high = max(start - position, 0), min(stop - position, rows)
            if low < high:
                place = position + low - start
                yield piece.source, piece.start + low, piece.start + high, place
            position += rows

    def leaves(self) -> Iterator[LazyTensor]:
        seen: set[int] = set()
        for piece in self._pieces:
            if id(piece.source) not in seen:
                seen.add(id(piece.source))
                yield from piece.source.leaves()


def split(source: LazyTensor, sizes: Sequence[int]) -> list[LazyTensor]:
    """`source` cut into parts of `sizes` rows. Raises `ValueError` if they are not all its rows."""
    if not source.shape or sum(sizes) != source.rows or min(sizes) < 0:
        raise ValueError(f"sizes {list(sizes)} do not add up to the rows of shape {source.shape}")
    parts: list[LazyTensor] = []
    start = 0
    for size in sizes:
        parts.append(Rows([Piece(source, start, start + size)]))
        start += size
    return parts


def concat(sources: Sequence[LazyTensor]) -> LazyTensor:
    """The rows of all `sources` in order, in float64 where one of them is computed.

    Raises `ValueError` if they were not stored in one dtype.
    """
    kinds = {source.stored_dtype for source in sources}
    if len(kinds) > 1:
        raise ValueError(f"parts of dtypes {' and '.join(sorted(map(str, kinds)))}")
    if any(source.dtype == FLOAT64 for source in sources):
        sources = [cast(source, FLOAT64) for source in sources]
    return Rows([Piece(source, 0, source.rows) for source in sources])


def deinterleave(source: LazyTensor, groups: int, slots: Sequence[int]) -> list[LazyTensor]:
    """One tensor a slot: in each of `groups` equal groups of rows, slot i has `slots[i]` rows.

    So InternLM2's `wqkv` has, per key-value head, q_per_kv · head_dim rows of queries, then
    head_dim rows of keys and of values (InternLM/xtuner `modeling_internlm2.py`).
    """
    group_rows = sum(slots)
    if groups < 1 or min(slots) < 0 or groups * group_rows != source.rows:
        raise ValueError(
            f"{groups} groups of {group_rows} rows are not the rows of shape {source.shape}"
        )
    outputs: list[LazyTensor] = []
    before = 0
    for size in slots:
        starts = (group * group_rows + before for group in range(groups))
        outputs.append(Rows([Piece(source, start, start + size) for start in starts]))
        before += size
    return outputs


class Member(LazyTensor):
    """`source[index]`: one of the tensors that are stacked along the first dimension.

    Where `source` is ranges, so is each member, since the first dimension is the outermost.
    """

    def __init__(self, source: LazyTensor, index: int) -> None:
        if not 0 <= index < source.rows or len(source.shape) < 2:
            raise ValueError(f"number {index} of a tensor of shape {source.shape}")
        self._source, self._index = source, index
        self.dtype, self.shape = source.dtype, source.row_shape

    @property
    def fixed_cost(self) -> int:
        """A member that is not ranges is read whole."""
        return self._source.fixed_cost + self._source.row_cost

    @property
    def shared_cost(self) -> int:
        return self._source.shared_cost

    @property
    def stored_dtype(self) -> DType:
        return self._source.stored_dtype

    def ranges(self) -> tuple[FileRange, ...] | None:
        ranges = self._source.ranges()
        return ranges and cut(ranges, self._index * self.nbytes, self.nbytes)

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        ranges = self.ranges()
        if ranges is None:
            out.copy_(self._source.read(self._index, self._index + 1)[0, start:stop])
        else:
            Stored("", self.dtype, self.shape, ranges).read_into(start, stop, out)

    def leaves(self) -> Iterator[LazyTensor]:
        return self._source.leaves()


def unstack(source: LazyTensor, count: int) -> list[LazyTensor]:
    """The `count` tensors that `source` stacks along its first dimension.

    So some mixtures of experts store all experts of a layer, as [experts, out, in]. Raises
    `ValueError` where `source` is not `count` tensors.
    """
    if len(source.shape) < 2 or source.rows != count:
        raise ValueError(f"shape {list(source.shape)} is not {count} tensors, stacked")
    return [Member(source, index) for index in range(count)]
