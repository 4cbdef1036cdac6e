"""`Merge`: a weight with its LoRA factors added, computed in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtuner2llava.tensors import thread_cache
from xtuner2llava.tensors.dtype import FLOAT64, DType
from xtuner2llava.tensors.lazy import Derived, LazyTensor

if TYPE_CHECKING:
    import torch


class Merge(LazyTensor):
    """`weight + scale * left @ right`, in float64; with a magnitude, as DoRA weighs it.

    `weight` has shape (rows, ...), `left` (rows, rank), `right` (rank, columns), where columns are
    all dimensions of `weight` but the first. `magnitude` has one element a row: each row of the sum
    is brought to that length (huggingface/peft `src/peft/tuners/lora/dora.py`). The caller rounds
    the result, once. Raises `ValueError` where shapes do not fit.

    In float32, the sum over the ranks has an error of its own, and a value near the middle of two
    neighbours is rounded to the wrong one: one float16 in 1,000 to 14,000, and up to most float32.
    Finding and fixing those costs more time than float64, which takes twice that of float32.
    """

    def __init__(
        self,
        weight: LazyTensor,
        left: LazyTensor,
        right: LazyTensor,
        scale: float,
        magnitude: LazyTensor | None = None,
    ) -> None:
        columns = math.prod(weight.row_shape)
        if (
            len(left.shape) != 2
            or len(right.shape) != 2
            or left.shape != (weight.rows, right.shape[0])
            or right.shape[1] != columns
        ):
            raise ValueError(
                f"factors of shapes {list(left.shape)} and {list(right.shape)} do not fit "
                f"a weight of shape {list(weight.shape)}"
            )
        if magnitude is not None and math.prod(magnitude.shape) != weight.rows:
            raise ValueError(f"a magnitude of shape {list(magnitude.shape)} for {weight.rows} rows")
        self.dtype, self.shape = FLOAT64, weight.shape
        self._weight, self._left, self._right = weight, left, right
        self._scale, self._magnitude = scale, magnitude

    @property
    def stored_dtype(self) -> DType:
        return self._weight.stored_dtype

    @property
    def row_cost(self) -> int:
        factor = self._left.row_cost + self._left.shape[1] * FLOAT64.itemsize
        return self.row_bytes + self._weight.row_cost + factor

    @property
    def fixed_cost(self) -> int:
        magnitude = 0 if self._magnitude is None else 2 * self.rows * FLOAT64.itemsize
        return magnitude + self._weight.fixed_cost

    @property
    def shared_cost(self) -> int:
        right = self._right.nbytes + math.prod(self._right.shape) * FLOAT64.itemsize
        return right + self._weight.shared_cost

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        import torch

        self._weight.read_into(start, stop, out)
        rows = out.view(stop - start, -1)
        left = self._left.read(start, stop).to(torch.float64)
        rows.addmm_(left, self._whole_right(), alpha=self._scale)
        if self._magnitude is not None:
            length = self._magnitude.read(0, self._magnitude.rows).to(torch.float64).flatten()
            norm = torch.linalg.vector_norm(rows, dim=1)
            rows.mul_((length[start:stop] / norm).unsqueeze(1))

    def leaves(self) -> Iterator[LazyTensor]:
        for part in (self._weight, self._left, self._right, self._magnitude):
            if part is not None:
                yield from part.leaves()

    def _whole_right(self) -> torch.Tensor:
        import torch

        right = self._right
        return thread_cache.get(right, lambda: right.read(0, right.rows).to(torch.float64))


class Reshaped(Derived):
    """The same elements in rows of another shape; the number of rows stays."""

    def __init__(self, source: LazyTensor, row_shape: tuple[int, ...]) -> None:
        if math.prod(row_shape) != math.prod(source.row_shape):
            raise ValueError(f"rows of shape {source.row_shape} are none of shape {row_shape}")
        super().__init__(source, source.dtype, (source.rows, *row_shape))

    @property
    def row_cost(self) -> int:
        return self._source.row_cost

    def read_into(self, start: int, stop: int, out: torch.Tensor) -> None:
        self._source.read_into(start, stop, out.view(stop - start, *self._source.row_shape))
