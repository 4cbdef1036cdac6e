"""What each verb of the mapping language means, spelled out again with torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xtuner2llava.verification.recomputed.arithmetic import whole_number
from xtuner2llava.verification.recomputed.weight import Block, Weight, rearranged

if TYPE_CHECKING:
    import torch

_TINY = 16 * 2.0**-24  # how far float32 is from a normalised row, generously


@dataclass(frozen=True, slots=True)
class Rule:
    """One verb with literal names; `table` is the rule as the file has it."""

    verb: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    table: Mapping[str, Any]
    names: Mapping[str, object]


def _rename(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    return [sources[0]]


def _split(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    """Runs of rows, or of columns with `dim: 1`."""
    (source,) = sources
    dim = rule.table.get("dim", 0)
    sizes = [whole_number(size, rule.names) for size in rule.table["sizes"]]
    if sum(sizes) != source.shape[dim]:
        raise ValueError(f"{sizes} do not add up to {source.shape[dim]}")
    parts = []
    for index, size in enumerate(sizes):
        shape = (*source.shape[:dim], size, *source.shape[dim + 1 :])
        parts.append(rearranged(sources, shape, _part(sizes, dim, index)))
    return parts


def _part(
    sizes: list[int], dim: int, index: int
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    return lambda tensors: tensors[0].narrow(dim, sum(sizes[:index]), sizes[index])


def _concat(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    import torch

    shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
    return [rearranged(sources, shape, lambda tensors: torch.cat(list(tensors)))]


def _deinterleave(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    """Rows viewed as (groups, rows of a group); each slot is a run of rows of every group."""
    (source,) = sources
    groups = whole_number(rule.table["groups"], rule.names)
    slots = [whole_number(slot, rule.names) for slot in rule.table["slots"]]
    if groups * sum(slots) != source.shape[0]:
        raise ValueError(f"{groups} groups of {slots} rows do not make {source.shape[0]}")
    return [
        rearranged(
            sources, (groups * size, *source.shape[1:]), _slot(groups, sum(slots[:index]), size)
        )
        for index, size in enumerate(slots)
    ]


def _slot(groups: int, first: int, size: int) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    def change(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
        return grouped[:, first : first + size].reshape(-1, *tensor.shape[1:])

    return change


def _unstack(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    """Each entry of the first dimension, cut into runs of rows where there are `sizes`."""
    (source,) = sources
    _, rows, *rest = source.shape
    sizes = [whole_number(size, rule.names) for size in rule.table.get("sizes", [rows])]
    ((_, count),) = rule.table["for"].items()
    if whole_number(count, rule.names) != source.shape[0] or sum(sizes) != rows:
        raise ValueError(f"{count} times {sizes} rows are not the shape {source.shape}")
    return [
        rearranged(sources, (size, *rest), _member(index, sum(sizes[:part]), size))
        for index in range(source.shape[0])
        for part, size in enumerate(sizes)
    ]


def _member(index: int, first: int, size: int) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    return lambda tensors: tensors[0][index, first : first + size]


def _transpose(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    rows, columns = sources[0].shape
    return [rearranged(sources, (columns, rows), lambda tensors: tensors[0].T)]


def _normalize(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    """Each row divided by its length, which counts as at least 1e-12, in float64."""
    (source,) = sources

    def read(start: int, stop: int) -> Block:
        block = source.read(start, stop)
        rows = block.value.double()
        length = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        value = rows / length
        bound = _TINY * value.abs()
        if block.bound is not None:
            off = block.bound.norm(dim=1, keepdim=True)
            bound = bound + (block.bound + value.abs() * off) / length
        return Block(value, bound)

    return [Weight(source.shape, source.dtype, True, read)]


def _resize(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    """Zero rows added; rows cut only with `lossy: true`."""
    import torch

    (source,) = sources
    count = whole_number(rule.table["rows"], rule.names)
    if count < source.count and rule.table.get("lossy") is not True:
        raise ValueError(f"{count} rows would cut some of {source.count}")

    def read(start: int, stop: int) -> Block:
        there = source.read(min(start, source.count), min(stop, source.count))
        more = max(0, stop - max(start, source.count))

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor.new_zeros((more, *source.shape[1:]))])

        return there.map(padded)

    return [Weight((count, *source.shape[1:]), source.dtype, source.computed, read)]


def _fill(rule: Rule, sources: Sequence[Weight]) -> list[Weight]:
    import torch

    shape = tuple(whole_number(size, rule.names) for size in rule.table["shape"])
    value = float(rule.table.get("value", 0))

    def read(start: int, stop: int) -> Block:
        return Block(torch.full((stop - start, *shape[1:]), value))

    if math.prod(shape) < 0:
        raise ValueError(f"shape {shape}")
    return [Weight(shape, torch.float32, False, read)]


VERBS: Mapping[str, Callable[[Rule, Sequence[Weight]], list[Weight]]] = {
    "rename": _rename,
    "split": _split,
    "concat": _concat,
    "deinterleave": _deinterleave,
    "unstack": _unstack,
    "transpose": _transpose,
    "normalize": _normalize,
    "resize": _resize,
    "fill": _fill,
}
