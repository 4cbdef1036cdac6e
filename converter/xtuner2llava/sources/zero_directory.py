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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, UnsupportedError, raise_faults
from xtuner2llava.sources.artifact import Artifact, artifact_of_state
from xtuner2llava.storage.pickle_reader import Record, TensorReference, Value
from xtuner2llava.storage.small_file import inside, read_small
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import tensor_references, unread_weights
from xtuner2llava.tensors import FileRange, LazyTensor, Shape, Stored
from xtuner2llava.tensors.dtype import DType
from xtuner2llava.tensors.files import cut, read_ranges, require_member

_RANK_FILE = re.compile(
    r"(?:bf16_|fp16_)?(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<tensor_parallel>\d+)_"
    r"(?P<kind>model_states|optim_states)\.pt"
)
_STEP_CODES = {"float32": "<f", "float64": "<d", "int64": "<q"}
_COPY_ALL = "Copy the whole directory; every rank writes files of its own."
_COPY_AGAIN = "The files are of different checkpoints; copy the directory again."
MASTER, MODULE = "master", "module"
_MAX_TAG_BYTES = 1024


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
    model_files, optimizer_files = _rank_files(path)
    # Each rank records the shapes of all parameters, mostly in the same bytes.
    pickles: dict[bytes, Value] = {}
    models = [_RankFile.open(file, pickles) for file in model_files]
    optimizers = [_RankFile.open(file, pickles) for file in optimizer_files]
    first, ranks = models[0], len(optimizers) or len(models)
    if optimizers and weights == MASTER:
        stage = _check_ranks(path, models, optimizers)
        layout = f"DeepSpeed ZeRO-{stage} directory, {ranks} ranks, master weights"
        tensors = _Masters(path, models, optimizers, stage).tensors()
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

    def tensors(
        self, key: str, known: Mapping[str, LazyTensor] | None = None
    ) -> dict[str, LazyTensor]:
        """The tensors in the dict under `key`, but those that are `known`."""
        found = self.value.get(key)
        entries = found.items() if isinstance(found, dict) else ()
        return self.file.tensors(
            {
                name: reference
                for name, reference in entries
                if isinstance(name, str)
                and isinstance(reference, TensorReference)
                and name not in (known or {})
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

    @property
    def step(self) -> float | None:
        """The step at which the optimizer was saved, under the key of any stage."""
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            step: Value = self.optimizer.get(key)
            step = step.get("state") if isinstance(step, dict) else None
            step = next(iter(step.values()), None) if isinstance(step, dict) else None
            step = step.get("step") if isinstance(step, dict) else None
            if isinstance(step, (int, float)):
                return float(step)
            if isinstance(step, TensorReference) and math.prod(step.shape) == 1:
                tensor = self.file.tensors({"step": step})["step"]
                for piece in tensor.extents():
                    if piece.checkable is not None:
                        require_member(piece.file, piece.checkable)
                code = _STEP_CODES.get(tensor.dtype.name)
                data = bytes(read_ranges(tensor.ranges() or ()))
                return float(struct.unpack(code, data)[0]) if code else None
        return None


def _rank_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Model and optimizer files by rank; all that is missing or too much is one error."""
    faults: list[Fault] = []
    found: dict[str, dict[int, Path]] = {"model_states": {}, "optim_states": {}}
    for entry in sorted(path.iterdir()):
        match = _RANK_FILE.fullmatch(entry.name)
        if match is None:
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
        missing = sorted(set(range(max(files, default=-1) + 1)) - set(files))
        if missing:
            faults.append(Fault(str(path), f"the {kind} of ranks {missing} are missing", _COPY_ALL))
    if not found["model_states"]:
        advice = "These hold the parameters' names."
        faults.append(Fault(str(path), "has no *_model_states.pt", advice))
    raise_faults(CorruptFileError, faults)
    models, optimizers = ([files[rank] for rank in sorted(files)] for files in found.values())
    return models, optimizers


def _check_ranks(path: Path, models: Sequence[_RankFile], optimizers: Sequence[_RankFile]) -> int:
    """The ZeRO stage; raises if ranks are missing, or from other runs or steps than the rest."""
    stages = {_stage(rank.optimizer.get("zero_stage")) for rank in optimizers}
    counts = {_partitions(rank.optimizer.get("partition_count")) for rank in optimizers}
    stage, count = stages.pop(), counts.pop()
    if stages or counts or stage not in (1, 2, 3):
        raise CorruptFileError(
            "its ranks were written by trainings of different stage or world size",
            where=str(path),
            advice="A file of an older checkpoint lies among them; copy the directory again.",
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


def _stage(value: Value) -> int:
    if isinstance(value, Record) and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, int) else 0


def _partitions(value: Value) -> int:
    # One count a group for ZeRO-1 and 2, where groups of experts can have fewer.
    found = value if isinstance(value, list) else [value]
    return max((n for n in found if isinstance(n, int)), default=0)


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


class _Masters:
    """The master weights of all parameters, as ranges over the rank files."""

    def __init__(
        self,
        path: Path,
        models: Sequence[_RankFile],
        optimizers: Sequence[_RankFile],
        stage: int,
    ) -> None:
        self._path, self._models, self._stage = path, models, stage
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        self._groups = [rank.flat_groups(key) for rank in optimizers]
        dtypes = {tensor.dtype for rank in self._groups for tensor in rank}
        if len(dtypes) != 1 or len({len(rank) for rank in self._groups}) != 1:
            raise CorruptFileError("its ranks have different groups or dtypes", where=str(path))
        self._dtype: DType = dtypes.pop()
        self._tensors: dict[str, LazyTensor] = {}
        self._faults: list[Fault] = []
        # Parameters of which the ranks do not hold all elements.
        self._short: list[str] = []

    def tensors(self) -> dict[str, LazyTensor]:
        """Buffers, frozen and trained parameters, and shared ones under each of their names."""
        self._add_frozen()
        if self._stage == 3:
            self._add_cut_per_rank()
        else:
            self._add_cut_groups()
        if self._short:
            what = "has more elements than the ranks hold of it"
            self._faults.append(Fault.about(str(self._path), self._short, what, _COPY_AGAIN))
        raise_faults(CorruptFileError, self._faults)
        tensors = self._tensors
        shared = self._models[0].value.get("shared_params")
        for name, original in shared.items() if isinstance(shared, dict) else ():
            if isinstance(name, str) and isinstance(original, str) and original in tensors:
                tensors[name] = tensors[original]
        # What no optimizer has: buffers, and before DeepSpeed 0.9 the frozen parameters, of which
        # the module's 16 bits are all.
        others = self._models[0].tensors("module", tensors)
        empty = [name for name, tensor in others.items() if tensor.shape == (0,)]
        if empty:
            what = "is in the module, where ZeRO-3 keeps no weights, and in no optimizer state"
            raise UnsupportedError.from_faults([Fault.about(str(self._path), empty, what)])
        return {**others, **tensors}

    def _add_frozen(self) -> None:
        """Frozen parameters, if they were saved: whole (1, 2), or a part in each rank (3)."""
        ranks = self._models if self._stage == 3 else self._models[:1]
        fragments = [rank.tensors("frozen_param_fragments") for rank in ranks]
        absent: list[str] = []
        for name, shape in self._shapes(self._models[0].value.get("frozen_param_shapes")).items():
            parts = [rank[name] for rank in fragments if name in rank]
            if len(parts) != len(fragments):
                absent.append(name)
            else:
                ranges = [piece for part in parts for piece in part.ranges() or ()]
                self._add(name, shape, parts[0].dtype, ranges)
        if absent:
            what = "is frozen, and not in every rank"
            self._faults.append(Fault.about(str(self._path), absent, what))

    def _add_cut_groups(self) -> None:
        """ZeRO-1 and 2: each group's partitions, one after the other, hold its parameters."""
        groups = self._param_shapes()
        if len(groups) != len(self._groups[0]):
            raise CorruptFileError(
                f"names {len(groups)} parameter groups, its optimizer states have "
                f"{len(self._groups[0])}",
                where=str(self._path),
            )
        alignment = 2 * len(self._groups)
        for index, shapes in enumerate(groups):
            ranges = [piece for rank in self._groups for piece in rank[index].ranges() or ()]
            available = sum(rank[index].rows for rank in self._groups)
            used = sum(math.prod(shape) for shape in shapes.values())
            # DeepSpeed pads a group to a multiple of 2 x ranks (zero_to_fp32.py).
            if math.ceil(used / alignment) != math.ceil(available / alignment):
                what = f"group {index} has {available:,} elements, its parameters {used:,}"
                self._faults.append(Fault(str(self._path), what, _COPY_AGAIN))
                continue
            offset = 0
            for name, shape in shapes.items():
                self._add(name, shape, self._dtype, ranges, offset)
                offset += math.prod(shape)

    def _add_cut_per_rank(self) -> None:
        """ZeRO-3: each parameter has a part in every rank, at the same place in each."""
        by_rank = [[p for group in rank for p in group.ranges() or ()] for rank in self._groups]
        size, offset = self._dtype.itemsize, 0
        for shapes in self._param_shapes():
            for name, shape in shapes.items():
                part = math.ceil(math.prod(shape) / len(by_rank))
                pieces = [p for ranges in by_rank for p in cut(ranges, offset * size, part * size)]
                self._add(name, shape, self._dtype, pieces)
                offset += part
        padding = 2 * len(by_rank) * len(self._groups[0])
        for rank, groups in enumerate(self._groups):
            elements = sum(group.rows for group in groups)
            if not offset <= elements <= offset + padding:
                what = f"rank {rank} has {elements:,} elements, its parameters {offset:,}"
                self._faults.append(Fault(str(self._path), what, _COPY_AGAIN))

    def _add(
        self, name: str, shape: Shape, dtype: DType, ranges: Sequence[FileRange], offset: int = 0
    ) -> None:
        """Adds the tensor that starts at element `offset` of `ranges`."""
        pieces = cut(ranges, offset * dtype.itemsize, math.prod(shape) * dtype.itemsize)
        try:
            self._tensors[name] = Stored(name, dtype, shape, pieces)
        except ValueError:
            self._short.append(name)

    def _param_shapes(self) -> list[dict[str, Shape]]:
        found = self._models[0].value.get("param_shapes")
        groups = [self._shapes(group) for group in found] if isinstance(found, list) else []
        if not any(groups):
            raise CorruptFileError("has no param_shapes", where=str(self._models[0].path))
        return groups

    def _shapes(self, group: Value) -> dict[str, Shape]:
        """Names and shapes of one parameter group."""
        shapes: dict[str, Shape] = {}
        for name, value in group.items() if isinstance(group, dict) else ():
            if isinstance(name, str) and isinstance(value, (tuple, list)):
                shape = tuple(n for n in value if isinstance(n, int) and n >= 0)
                if len(shape) != len(value):
                    where = str(self._models[0].path)
                    raise CorruptFileError(f"{name} has a shape that makes no sense", where=where)
                shapes[name] = shape
        return shapes
