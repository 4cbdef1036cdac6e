"""Parameters of a DeepSpeed directory, put together in memory, one at a time.

After deepspeedai/DeepSpeed `deepspeed/utils/zero_to_fp32.py`: with ZeRO-1 and 2, the parameters of
a group stand one after the other in the ranks' partitions laid end to end; with ZeRO-3, each is
divided over the ranks, and every rank's parts stand one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.verification.recomputed.files import FileTensor, TorchFiles, Value, state_dict

if TYPE_CHECKING:
    import torch

    _Elements: TypeAlias = Callable[[int, int], list[torch.Tensor]]

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank")


def is_zero_directory(path: Path) -> bool:
    """Whether `path` is a directory with the states of a DeepSpeed model."""
    return path.is_dir() and any(path.glob("*_model_states.pt"))


def open_zero(
    path: Path, files: TorchFiles, *, masters: bool
) -> tuple[dict[str, FileTensor], Mapping[str, Any]]:
    """All parameters, and the `meta` of the checkpoint.

    `masters` are the float32 weights of the optimizer; without, the 16-bit ones of the module.
    """
    models = _by_rank(path, "*_model_states.pt")
    optimizers = _by_rank(path, "*_optim_states.pt") if masters else []
    states = [_dict(files.open(file)) for file in (*models, *optimizers)]
    model, ranks = states[0], [_dict(s.get("optimizer_state_dict")) for s in states[len(models) :]]
    module = state_dict(model.get("module"), str(models[0]))
    meta = _dict(model.get("meta"))
    if not ranks:
        return module, meta
    buffers = model.get("buffer_names")
    tensors = {n: module[n] for n in buffers if n in module} if isinstance(buffers, list) else {}
    groups = [_shapes(group) for group in model.get("param_shapes") or []]
    frozen = _shapes(model.get("frozen_param_shapes"))
    fragments = [_dict(state.get("frozen_param_fragments")) for state in states[: len(models)]]
    if ranks[0].get("zero_stage") == 3:
        flats = [_Flat(_tensors(rank.get("fp32_flat_groups"), path)) for rank in ranks]
        tensors |= _divided({n: shape for group in groups for n, shape in group.items()}, flats)
        for name, shape in frozen.items():
            parts = [_Flat([_vector(rank[name])]) for rank in fragments]
            tensors |= _divided({name: shape}, parts)
    else:
        key = "single_partition_of_fp32_groups"
        partitions = [_tensors(rank.get(key), path) for rank in ranks]
        for number, group in enumerate(groups):
            tensors |= _laid_out(group, _Flat([rank[number] for rank in partitions]))
        tensors |= {name: fragments[0][name] for name in frozen}
    for name, original in _dict(model.get("shared_params")).items():
        if original in tensors:
            tensors[name] = tensors[original]
    return tensors, meta


class _Flat:
    """Vectors laid end to end."""

    def __init__(self, parts: Sequence[FileTensor]) -> None:
        self.parts = parts
        self.count = sum(part.count for part in parts)

    def elements(self, start: int, stop: int) -> list[torch.Tensor]:
        """Elements `[start, stop)`, in as many pieces as they lie in."""
        found = []
        for part in self.parts:
            if start < part.count and stop > 0:
                found.append(part.rows(max(start, 0), min(stop, part.count)))
            start, stop = start - part.count, stop - part.count
        return found


def _laid_out(group: Mapping[str, tuple[int, ...]], flat: _Flat) -> dict[str, FileTensor]:
    """ZeRO-1 and 2: the parameters of a group, one after the other."""
    tensors = {}
    offset = 0
    for name, shape in group.items():
        tensors[name] = _parameter(shape, flat, _shifted(flat, offset))
        offset += math.prod(shape)
    if offset > flat.count:
        raise CorruptFileError(f"a group has {flat.count:,} elements, its parameters {offset:,}")
    return tensors


def _shifted(flat: _Flat, offset: int) -> _Elements:
    return lambda start, stop: flat.elements(offset + start, offset + stop)


def _divided(
    shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[_Flat]
) -> dict[str, FileTensor]:
    """ZeRO-3: rank r has elements [r * part, (r + 1) * part) of each parameter."""
    tensors = {}
    offset = 0
    for name, shape in shapes.items():
        part = math.ceil(math.prod(shape) / len(ranks))
        tensors[name] = _parameter(shape, ranks[0], _gathered(ranks, offset, part))
        offset += part
    if offset > min(rank.count for rank in ranks):
        raise CorruptFileError(f"its ranks have too few elements, {offset:,} are needed")
    return tensors


def _gathered(ranks: Sequence[_Flat], offset: int, part: int) -> _Elements:
    def elements(start: int, stop: int) -> list[torch.Tensor]:
        found = []
        for number, rank in enumerate(ranks):
            first = number * part
            low, high = max(start, first), min(stop, first + part)
            if low < high:
                found += rank.elements(offset + low - first, offset + high - first)
        return found

    return elements


def _parameter(shape: tuple[int, ...], flat: _Flat, elements: _Elements) -> FileTensor:
    row = math.prod(shape[1:])

    def rows(start: int, stop: int) -> torch.Tensor:
        import torch

        found = torch.cat([*elements(start * row, stop * row), torch.empty(0, dtype=dtype)])
        return found.reshape(stop - start, *shape[1:]) if shape else found.reshape(())

    dtype = flat.parts[0].dtype
    return FileTensor(shape, dtype, rows)


def _vector(tensor: FileTensor) -> FileTensor:
    """All elements of a tensor as one dimension."""
    count = math.prod(tensor.shape)
    return FileTensor((count,), tensor.dtype, lambda a, b: tensor.whole().flatten()[a:b].clone())


def _by_rank(path: Path, pattern: str) -> list[Path]:
    def rank(file: Path) -> int:
        match = _RANK.search(file.name)
        return int(match[1]) if match else 0

    return sorted(path.glob(pattern), key=rank)


def _dict(value: Value) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _tensors(value: Value, path: Path) -> list[FileTensor]:
    found = [item for item in value if isinstance(item, FileTensor)] if value else []  # type: ignore[union-attr]
    if not found:
        raise CorruptFileError("a rank has no float32 weights", where=str(path))
    return found


def _shapes(value: Value) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in _dict(value).items()}
