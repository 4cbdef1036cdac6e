"""`iter_N.pth/`, the directory that DeepSpeed ZeRO-1, 2 or 3 leaves: parameters as file ranges.

What was trained are the float32 master weights in the optimizer states. Their layout is that of
deepspeedai/DeepSpeed `deepspeed/utils/zero_to_fp32.py`, which assembles them in memory:

- ZeRO-1 and 2: each parameter group is one flat vector, cut into one partition a rank; parameters
  lie in it in the order of `param_shapes`, with padding at the end only.
- ZeRO-3: each parameter is cut into one part a rank, `ceil(numel / world_size)` elements with
  padding in the last; a rank's parts follow each other through its flat groups.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, UnsupportedError, raise_faults
from xtuner2llava.sources.artifact import Artifact, artifact_of_state
from xtuner2llava.storage.pickle_reader import Record, TensorReference, Value, as_dict
from xtuner2llava.storage.small_file import inside, read_small
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import tensor_references, unread_weights
from xtuner2llava.tensors.dtype import DType
from xtuner2llava.tensors.files import FileRange, cut, read_ranges, require_member
from xtuner2llava.tensors.lazy import LazyTensor, Shape
from xtuner2llava.tensors.stored import Stored

_RANK_FILE = re.compile(
    r"(?:bf16_|fp16_)?(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<tensor_parallel>\d+)_"
    r"(?P<kind>model_states|optim_states)\.pt"
)
_STEP_CODES = {"float32": "<f", "float64": "<d", "int64": "<q"}
_COPY_ALL = "Copy the whole directory; every rank writes files of its own."
_COPY_AGAIN = "The files are of different checkpoints; copy the directory again."
MASTER, MODULE = "master", "module"
_MAX_TAG_BYTES = 1024
_MAX_DIMENSIONS, _LARGEST_SIZE = 16, 1 << 62
_MISSING_SHOWN = 10


def zero_directory(path: Path) -> Path | None:
    """The DeepSpeed directory that `path` is, lies in, or names in its `latest` file."""
    if path.is_file():
        return path.parent if _RANK_FILE.fullmatch(path.name) else None
    if not path.is_dir():
        return None
    if any(_RANK_FILE.fullmatch(entry.name) for entry in path.iterdir()):
        return path
    latest = path / "latest"
    if not latest.is_file() or latest.stat().st_size >= _MAX_TAG_BYTES:
        return None
    tag = read_small(latest, _MAX_TAG_BYTES).decode("utf-8", "replace").strip()
    folder = inside(path, tag)
    if not folder.is_dir():
        raise CorruptFileError(f"names '{tag}', which is not there", where=str(latest))
    # A folder may name itself.
    return folder if (folder / "latest").exists() else zero_directory(folder)


def open_zero_directory(path: Path, weights: str = MASTER) -> Artifact:
    """The DeepSpeed directory `path`; headers only are read.

    `weights` chooses the float32 master weights, or with "module" the 16-bit weights that ZeRO-1
    and 2 keep beside them. Raises `CheckpointError` where ranks are missing or do not belong
    together.
    """
    # Each rank records the shapes of all parameters, mostly in the same bytes.
    pickles: dict[bytes, Value] = {}
    models, optimizers = (
        [_RankFile.open(file, pickles) for file in files] for files in _rank_files(path)
    )
    first, ranks = models[0], len(optimizers) or len(models)
    if optimizers and weights == MASTER:
        stage = _check_ranks(path, models, optimizers)
        layout = f"DeepSpeed ZeRO-{stage} directory, {ranks} ranks, master weights"
        tensors = _master_weights(path, models, optimizers, stage)
    else:
        layout = f"DeepSpeed directory, {ranks} ranks, 16-bit module weights"
        tensors = _module_weights(path, first, has_master=bool(optimizers))
    fingerprints = tuple(rank.file.fingerprint for rank in (*models, *optimizers))
    unread = unread_weights(path, None, fingerprints)
    return artifact_of_state(
        tensors,
        path,
        layout,
        fingerprints,
        meta=first.value.get("meta"),
        meta_file=first.path,
        notes=(f"{path.name} also holds {', '.join(unread)}, not read.",) if unread else (),
    )


@dataclass(frozen=True, slots=True)
class _RankFile:
    """An open file of one rank; its value is a dict with text keys."""

    path: Path
    file: TorchFile
    value: dict[str, Value]

    @classmethod
    def open(cls, path: Path, pickles: dict[bytes, Value]) -> _RankFile:
        opened = TorchFile(inside(path.parent, path.name), pickles)
        if not isinstance(opened.value, dict):
            raise CorruptFileError("is not a file of DeepSpeed", where=str(path))
        return cls(path, opened, {k: v for k, v in opened.value.items() if isinstance(k, str)})

    @property
    def optimizer(self) -> dict[Value, Value]:
        found = self.value.get("optimizer_state_dict")
        if not isinstance(found, dict):
            raise CorruptFileError("has no optimizer_state_dict", where=str(self.path))
        return found

    def tensors(self, key: str) -> dict[str, LazyTensor]:
        """The tensors in the dict under `key`."""
        return self.file.tensors(
            {
                name: reference
                for name, reference in as_dict(self.value.get(key)).items()
                if isinstance(name, str) and isinstance(reference, TensorReference)
            }
        )

    def flat_groups(self, key: str) -> list[LazyTensor]:
        """The flat tensors under `key` of the optimizer state, one a group."""
        found = self.optimizer.get(key)
        listed = found if isinstance(found, list) else []
        flat = {f"{key}[{i}]": r for i, r in enumerate(listed) if isinstance(r, TensorReference)}
        tensors = list(self.file.tensors(flat).values())
        if not tensors or len(flat) != len(listed) or any(t.ranges() is None for t in tensors):
            raise CorruptFileError(f"has no usable '{key}'", where=str(self.path))
        return tensors

    def shapes(self, group: Value) -> list[tuple[str, Shape]]:
        """Names and shapes of the parameters of a group."""
        shapes: list[tuple[str, Shape]] = []
        for name, value in as_dict(group).items():
            if isinstance(name, str) and isinstance(value, (tuple, list)):
                shape = tuple(n for n in value if isinstance(n, int) and 0 <= n < _LARGEST_SIZE)
                if len(shape) != len(value) or len(shape) > _MAX_DIMENSIONS:
                    what = f"{name} has a shape that makes no sense"
                    raise CorruptFileError(what, where=str(self.path))
                shapes.append((name, shape))
        return shapes

    @property
    def step(self) -> float | None:
        """The step at which the optimizer was saved, under the key of any stage."""
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            states = as_dict(as_dict(self.optimizer.get(key)).get("state"))
            match as_dict(next(iter(states.values()), None)).get("step"):
                case int() | float() as step:
                    return float(step)
                case TensorReference() as reference if math.prod(reference.shape) == 1:
                    tensor = self.file.tensors({"step": reference})["step"]
                    for piece in tensor.extents():
                        if piece.checkable is not None:
                            require_member(piece.file, piece.checkable)
                    code = _STEP_CODES.get(tensor.dtype.name)
                    data = bytes(read_ranges(tensor.ranges() or ()))
                    return float(struct.unpack(code, data)[0]) if code else None
        return None


def _largest(value: Value) -> int:
    """An integer, the largest of a list, or what a member of an enum was made of; else 0."""
    found = value.arguments if isinstance(value, Record) else value
    numbers = found if isinstance(found, (list, tuple)) else (found,)
    return max((n for n in numbers if isinstance(n, int)), default=0)


def _rank_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Model and optimizer files by rank; all that is missing or too much is one error."""
    faults: list[Fault] = []
    found: dict[str, dict[int, Path]] = {"model_states": {}, "optim_states": {}}
    for entry in sorted(path.iterdir()):
        if (match := _RANK_FILE.fullmatch(entry.name)) is None:
            continue
        if int(match["tensor_parallel"]) > 0:
            raise UnsupportedError(
                f"'{entry.name}' is of tensor-parallel rank {int(match['tensor_parallel'])}; "
                "XTuner's LLaVA is never trained tensor-parallel, and how its tensors were cut is "
                "not recorded",
                where=str(path),
            )
        files, rank = found[match["kind"]], int(match["rank"] or 0)
        if rank in files:
            what = f"two files for rank {rank}: '{entry.name}' and '{files[rank].name}'"
            faults.append(Fault(str(path), what))
        files[rank] = entry
    for kind, files in found.items():
        # A name may have any number in it: only the first gaps are counted out.
        expected = range(max(files, default=-1) + 1)
        missing = list(islice((rank for rank in expected if rank not in files), _MISSING_SHOWN))
        if missing:
            more = " and more" if expected.stop - len(files) > len(missing) else ""
            what = f"the {kind} of ranks {missing}{more} are missing"
            faults.append(Fault(str(path), what, _COPY_ALL))
    if not found["model_states"]:
        advice = "These hold the parameters' names."
        faults.append(Fault(str(path), "has no *_model_states.pt", advice))
    raise_faults(CorruptFileError, faults)
    models, optimizers = ([files[rank] for rank in sorted(files)] for files in found.values())
    return models, optimizers


def _check_ranks(path: Path, models: Sequence[_RankFile], optimizers: Sequence[_RankFile]) -> int:
    """The ZeRO stage; raises if ranks are missing, or from other runs or steps than the rest."""
    stages = {_largest(rank.optimizer.get("zero_stage")) for rank in optimizers}
    # One count a group for ZeRO-1 and 2, where groups of experts can have fewer.
    counts = {_largest(rank.optimizer.get("partition_count")) for rank in optimizers}
    stage, count = stages.pop(), counts.pop()
    if stages or counts:
        raise CorruptFileError(
            "its ranks were written by trainings of different stage or world size",
            where=str(path),
            advice="A file of an older checkpoint lies among them; copy the directory again.",
        )
    if stage not in (1, 2, 3):  # DeepSpeed's BF16_Optimizer, which is not of ZeRO, records none.
        raise UnsupportedError(
            "its optimizer states do not say that they are of ZeRO-1, 2 or 3",
            where=str(path),
            advice="`--weights module` converts the 16-bit weights that lie beside them.",
        )
    there = {"optimizer": len(optimizers)} | ({"model": len(models)} if stage == 3 else {})
    faults = [
        Fault(str(path), f"{count} ranks were trained, {kind} states of {n} are there", _COPY_ALL)
        for kind, n in there.items()
        if n != count
    ]
    faults += _stale(models, "global_steps", [model.value.get("global_steps") for model in models])
    faults += _stale(optimizers, "the optimizer's step", [rank.step for rank in optimizers])
    raise_faults(CorruptFileError, faults)
    return stage


def _stale(files: Sequence[_RankFile], what: str, values: Sequence[Value]) -> Iterator[Fault]:
    """Faults for files that disagree with the most frequent value."""
    comparable = [value if isinstance(value, (int, float)) else None for value in values]
    usual = max(comparable, key=comparable.count)
    for file, value in zip(files, comparable, strict=True):
        if value != usual:
            yield Fault(
                str(file.path),
                f"{what} is {value}, in most other ranks {usual}",
                "A file of another checkpoint lies among them; copy the directory again.",
            )


def _module_weights(path: Path, model: _RankFile, *, has_master: bool) -> dict[str, LazyTensor]:
    """The 16-bit weights of the module; ZeRO-3 has none, its tensors are empty."""
    references = tensor_references(model.value.get("module"), f"{model.path} (module)")
    tensors = model.file.tensors(references)
    if not tensors or any(tensor.shape == (0,) for tensor in tensors.values()):
        raise UnsupportedError(
            "ZeRO-3 keeps the weights only in its optimizer states"
            + (", and these are not here" if not has_master else ""),
            where=str(path),
            advice="Leave out `--weights module`." if has_master else "Copy the *_optim_states.pt.",
        )
    return tensors


# A parameter: its name, its shape, and the ranges that start with its elements.
_Parameter = tuple[str, Shape, DType, list[FileRange]]


def _master_weights(
    path: Path, models: Sequence[_RankFile], optimizers: Sequence[_RankFile], stage: int
) -> dict[str, LazyTensor]:
    """Buffers, frozen and trained parameters, and shared ones under each of their names."""
    where, first = str(path), models[0]
    faults: list[Fault] = []
    tensors: dict[str, LazyTensor] = {}
    short: list[str] = []
    ranks = models if stage == 3 else models[:1]
    for name, shape, dtype, ranges in (
        *_frozen(where, ranks, faults),
        *_trained(where, first, optimizers, stage, faults),
    ):
        try:
            pieces = cut(ranges, 0, math.prod(shape) * dtype.itemsize)
            tensors[name] = Stored(name, dtype, shape, pieces)
        except ValueError:
            short.append(name)
    if short:
        what = "has more elements than the ranks hold of it"
        faults.append(Fault.about(where, short, what, _COPY_AGAIN))
    raise_faults(CorruptFileError, faults)
    for alias, original in as_dict(first.value.get("shared_params")).items():
        if isinstance(alias, str) and isinstance(original, str) and original in tensors:
            tensors[alias] = tensors[original]
    # What no optimizer has: buffers, and before DeepSpeed 0.9 the frozen parameters, of which the
    # module's 16 bits are all.
    others = {n: t for n, t in first.tensors("module").items() if n not in tensors}
    empty = [name for name, tensor in others.items() if tensor.shape == (0,)]
    if empty:
        what = "is in the module, where ZeRO-3 keeps no weights, and in no optimizer state"
        raise UnsupportedError.from_faults([Fault.about(where, empty, what)])
    return {**others, **tensors}


def _frozen(where: str, ranks: Sequence[_RankFile], faults: list[Fault]) -> Iterator[_Parameter]:
    """Frozen parameters, if they were saved: whole (1, 2), or a part in each rank (3)."""
    fragments = [rank.tensors("frozen_param_fragments") for rank in ranks]
    absent: list[str] = []
    for name, shape in ranks[0].shapes(ranks[0].value.get("frozen_param_shapes")):
        parts = [rank[name] for rank in fragments if name in rank]
        if len(parts) == len(fragments):
            yield name, shape, parts[0].dtype, _ranges(parts)
        else:
            absent.append(name)
    if absent:
        faults.append(Fault.about(where, absent, "is frozen, and not in every rank"))


def _trained(
    where: str,
    model: _RankFile,
    optimizers: Sequence[_RankFile],
    stage: int,
    faults: list[Fault],
) -> Iterator[_Parameter]:
    """Trained parameters, each at one place in one flat vector, or in all of several.

    With ZeRO-1 and 2, a group's vector is its partitions of all ranks; with ZeRO-3, each rank has
    one, of its partitions of all groups.
    """
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    ranks = [rank.flat_groups(key) for rank in optimizers]
    dtypes = {tensor.dtype for groups in ranks for tensor in groups}
    if len(dtypes) != 1 or len({len(groups) for groups in ranks}) != 1:
        raise CorruptFileError("its ranks have different groups or dtypes", where=where)
    found = model.value.get("param_shapes")
    shapes = [model.shapes(group) for group in found] if isinstance(found, list) else []
    if not any(shapes):
        raise CorruptFileError("has no param_shapes", where=str(model.path))
    (dtype,) = dtypes
    by_group = list(zip(*ranks, strict=True))
    if stage == 3:
        vectors = {f"rank {index}": groups for index, groups in enumerate(ranks)}
        work = [([one for group in shapes for one in group], vectors)]
    elif len(shapes) == len(by_group):
        work = [
            (group, {f"group {index}": [*by_group[index]]}) for index, group in enumerate(shapes)
        ]
    else:
        raise CorruptFileError(
            f"names {len(shapes)} parameter groups, its optimizer states have {len(by_group)}",
            where=where,
        )
    # DeepSpeed pads a group to a multiple of 2 x ranks (zero_to_fp32.py).
    padding = 2 * len(ranks) * (len(by_group) if stage == 3 else 1)
    for parameters, vectors in work:
        left, offset = [_ranges(vector)[::-1] for vector in vectors.values()], 0
        for name, shape in parameters:
            part = -(-math.prod(shape) // len(left))
            size = part * dtype.itemsize
            yield name, shape, dtype, [piece for stack in left for piece in _taken(stack, size)]
            offset += part
        for title, vector in vectors.items():
            elements = sum(tensor.rows for tensor in vector)
            if not offset <= elements < offset + padding:
                what = f"{title} has {elements:,} elements, its parameters {offset:,}"
                faults.append(Fault(where, what, _COPY_AGAIN))


def _taken(stack: list[FileRange], length: int) -> list[FileRange]:
    """The next `length` bytes of ranges, of which the first is the last in `stack`; or all."""
    taken: list[FileRange] = []
    while length > 0 and stack:
        piece = stack.pop()
        taken += cut([piece], 0, length)
        stack += cut([piece], length, piece.length - length)
        length -= piece.length
    return taken


def _ranges(tensors: Sequence[LazyTensor]) -> list[FileRange]:
    return [piece for tensor in tensors for piece in tensor.ranges() or ()]
