"""How a model's stored values become the float32 that it is run with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtuner2llava.tensors import BY_NAME, LazyTensor, cast, row_blocks

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 16 << 20
# The bits of a value, its leading one included.
_DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24}


@dataclass(frozen=True, slots=True)
class Reading:
    """Values as stored; rounded to `dtype` first; or `moved` as one more rounding would.

    `dtype` is torch's name, or "keep" for the stored dtype. `moved` adds to each value a random
    part of half a unit in its last place, the same in every run.
    """

    dtype: str | None = None
    moved: bool = False

    def rows(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` of `tensor` in float32, in memory of their own."""
        import torch

        if self.dtype is not None and tensor.dtype.is_float:
            keep = self.dtype == "keep"
            tensor = cast(tensor, tensor.stored_dtype if keep else BY_NAME[self.dtype])
        values = tensor.read(start, stop).float()
        digits = _DIGITS.get(tensor.dtype.name)
        if self.moved and digits is not None:
            generator = torch.Generator().manual_seed(start)
            part = torch.rand(values.shape, generator=generator) * 2 - 1
            _, exponent = torch.frexp(values)
            values += torch.ldexp(part, exponent - digits - 1)
        return values

    def whole(self, tensor: LazyTensor) -> torch.Tensor:
        """All of `tensor` in float32, read in blocks."""
        import torch

        result = torch.empty(tensor.shape, dtype=torch.float32)
        by_row = result.view(tensor.rows, *tensor.row_shape)
        for start, stop in row_blocks(tensor, _BLOCK_BYTES):
            by_row[start:stop] = self.rows(tensor, start, stop)
        return result
