"""Tensors of the folder against what they must be: bit for bit, or in units of the last place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xtuner2llava.sources.json_file import Json
from xtuner2llava.verification.recomputed.files import FileTensor
from xtuner2llava.verification.recomputed.weight import Block, Weight

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Comparison:
    """What was compared so far.

    `faults` name each tensor that differs, with its first differing index. `max_ulp` is the largest
    error of a computed tensor in units of the last place of what was written, and `off` how many of
    all `computed_elements` are not their float64 value rounded.
    """

    equal: int = 0
    rounded: int = 0
    computed: int = 0
    nbytes: int = 0
    faults: list[str] = field(default_factory=list)
    computed_faults: list[str] = field(default_factory=list)
    max_ulp: float = 0.0
    max_ulp_in: str = ""
    off: int = 0
    computed_elements: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether everything is the nearest value to what was trained."""
        return not self.faults and not self.computed_faults and not self.off

    def to_dict(self) -> dict[str, Json]:
        return {
            "copied": self.equal,
            "rounded": self.rounded,
            "computed": self.computed,
            "bytes": self.nbytes,
            "differing": [*self.faults, *self.computed_faults],
            "max_ulp": self.max_ulp,
            "max_ulp_in": self.max_ulp_in,
            "computed_elements": self.computed_elements,
            "not_nearest": self.off,
        }

    def add(
        self,
        name: str,
        found: FileTensor,
        weight: Weight,
        dtype: torch.dtype,
        advance: Callable[[int], None],
    ) -> None:
        """Compares the tensor `found` of the folder with `weight` in `dtype`."""
        problems = self.computed_faults if weight.computed else self.faults
        if found.shape != weight.shape or found.dtype != dtype:
            problems.append(
                f"{name} is {found.dtype} {list(found.shape)}, expected {dtype} "
                f"{list(weight.shape)}"
            )
            return
        differing, first = 0, ""
        for start, stop in weight.blocks():
            block, written = weight.read(start, stop), found.rows(start, stop)
            if weight.computed:
                wrong = self._close(name, written, block)
            else:
                expected = block.value.to(dtype)
                wrong = _unequal(written, expected)
                if weight.dtype != dtype:
                    # Which NaN a NaN is rounded to depends on the processor and the block's end.
                    wrong &= ~(written.isnan() & expected.isnan())
            count = int(wrong.sum())
            if count and not differing:
                first = _first(wrong, written, block, dtype, start)
            differing += count
            self.nbytes += written.nbytes
            advance(written.nbytes)
        if differing:
            problems.append(f"{name}{first}; {differing:,} elements differ")
        elif weight.computed:
            self.computed += 1
        elif weight.dtype == dtype:
            self.equal += 1
        else:
            self.rounded += 1

    def _close(self, name: str, written: torch.Tensor, block: Block) -> torch.Tensor:
        """Where `written` is further from float64 than half a unit and float32 arithmetic allow."""
        import torch

        exact = block.value
        unit = unit_in_the_last_place(exact, written.dtype)
        error = (written.double() - exact).abs()
        both_nan = written.isnan() & exact.isnan()
        error = torch.where(both_nan, torch.zeros_like(error), error)
        units = error / unit
        worst = float(units.max()) if units.numel() else 0.0
        if worst > self.max_ulp or worst != worst:
            self.max_ulp, self.max_ulp_in = worst, name
        self.off += int(((written != exact.to(written.dtype)) & ~both_nan).sum())
        self.computed_elements += units.numel()
        bound = block.bound if block.bound is not None else torch.zeros_like(exact)
        return ~(error <= 0.5 * unit * (1 + 2.0**-20) + bound)


def unit_in_the_last_place(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at float64 `values`."""
    import torch

    digits, smallest = {
        torch.float16: (11, 2.0**-24),
        torch.bfloat16: (8, 2.0**-133),
        torch.float32: (24, 2.0**-149),
        torch.float64: (53, 2.0**-1074),
    }[dtype]
    _, exponent = torch.frexp(values.abs())
    unit = torch.ldexp(torch.ones_like(values), exponent - digits)
    return torch.where(values == 0, smallest, unit).clamp_min(smallest)


def _unequal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one dtype have different bits."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    integer = integers[one.element_size()]
    return one.contiguous().view(integer) != other.contiguous().view(integer)


def _first(
    wrong: torch.Tensor, written: torch.Tensor, block: Block, dtype: torch.dtype, start: int
) -> str:
    """Index and values of the first wrong element, `start` rows further down."""
    index = [int(n) for n in wrong.nonzero()[0]]
    place = tuple(index)
    shown = [start + index[0], *index[1:]] if index else []
    expected = block.value[place].to(dtype) if block.bound is None else block.value[place]
    return f"{shown} is {float(written[place]):.9g}, expected {float(expected):.9g}"


def names_fault(
    found: Mapping[tuple[str, str], str], wanted: Mapping[tuple[str, str], object]
) -> list[str]:
    """Tensors that the folder lacks, or has beyond what the checkpoint makes, by component."""
    missing = [f"{part}: {name} is missing" for part, name in wanted if (part, name) not in found]
    more = [f"{real} is not made of the checkpoint" for key, real in found.items()
            if key not in wanted]  # fmt: skip
    return missing + more
