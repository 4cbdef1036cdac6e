"""`iter_N.pth/`, the directory that DeepSpeed ZeRO-1, 2 or 3 leaves: parameters as file ranges.

The trained truth are the float32 master weights in the optimizer states. How they are laid out is
read off deepspeedai/DeepSpeed `deepspeed/utils/zero_to_fp32.py`, which gathers them in memory:

- ZeRO-1 and 2: each parameter group is one flat vector, cut into one partition a rank; parameters
  stand in it in the order of `param_shapes`, with padding at the end only.
- ZeRO-3: each parameter is cut into one part a rank, `ceil(numel / world_size)` elements with
  padding in the last; a rank's parts follow each other through its flat groups.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, UnsupportedError, raise_faults
from xtuner2llava.sources.artifact import Artifact, artifact_of_state
from xtuner2llava.sources.pth_file import config_text, iteration
from xtuner2llava.storage.pickle_reader import Record, TensorReference, Value
from xtuner2llava.storage.small_file import inside, read_small
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import Fingerprint, tensor_references, unread_weights
from xtuner2llava.tensors import FileRange, LazyTensor, Shape, Stored
from xtuner2llava.tensors.dtype import DType
from xtuner2llava.tensors.files import cut, read_ranges, require_member

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MASTER, MODULE = "master", "module"
_MAX_TAG_BYTES = 1024


def zero_directory(path: Path) -> Path | None:
    """The DeepSpeed directory that `path` is, lies in, or names in its `latest` file."""
    if path.is_file():
        named = _MODEL.fullmatch(path.name) or _OPTIMIZER.fullmatch(path.name)
        return path.parent if named else None
    if not path.is_dir():
        return None
    names = [entry.name for entry in path.iterdir()]
    if any(_MODEL.fullmatch(name) or _OPTIMIZER.fullmatch(name) for name in names):
        return path
    latest = path / "latest"
    if latest.is_file() and latest.stat().st_size < _MAX_TAG_BYTES:
        tag = read_small(latest, _MAX_TAG_BYTES).decode("utf-8", "replace").strip()
        folder = inside(path, tag)
        if folder.is_dir():
            return zero_directory(folder) if not (folder / "latest").exists() else folder
        raise CorruptFileError(f"names '{tag}', which is not there", where=str(latest))
    return None


def open_zero_directory(path: Path, weights: str = MASTER) -> Artifact:
    """The DeepSpeed directory `path`; headers only are read.

    `weights` chooses the float32 master weights, or with "module" the 16-bit weights that ZeRO-1
    and 2 keep beside them. Raises `CheckpointError` where ranks are missing or do not belong
    together.
    """
    model_files, optimizer_files = _rank_files(path)
    models = [_RankFile.open(file) for file in model_files]
    optimizers = [_RankFile.open(file) for file in optimizer_files]
    first = models[0]
    layout = f"DeepSpeed directory, {len(optimizers) or len(models)} ranks"
    if not optimizers or weights == MODULE:
        tensors = _module_weights(path, first, has_master=bool(optimizers))
        layout += ", 16-bit module weights"
    else:
        stage = _check_ranks(path, models, optimizers)
        layout = f"DeepSpeed ZeRO-{stage} directory, {len(optimizers)} ranks, master weights"
        masters = _Masters(path, models, optimizers, stage)
        tensors = masters.tensors()
    meta = first.value.get("meta")
    fingerprints = tuple(file.fingerprint for file in (*models, *optimizers))
    unread = unread_weights(path, None, fingerprints)
    return artifact_of_state(
        tensors,
        path,
        layout,
        fingerprints,
        config=config_text(meta, first.path),
        iteration=iteration(meta),
        notes=(f"{path.name} also holds {', '.join(unread)}, not read.",) if unread else (),
    )


@dataclass(frozen=True, slots=True)
class _RankFile:
    """An open file of one rank; its value is a dict with text keys."""

    path: Path
    file: TorchFile
    value: dict[str, Value]

    @classmethod
    def open(cls, path: Path) -> _RankFile:
        opened = TorchFile(inside(path.parent, path.name))
        if not isinstance(opened.value, dict):
            raise CorruptFileError("is no file of DeepSpeed", where=str(path))
        return cls(path, opened, {k: v for k, v in opened.value.items() if isinstance(k, str)})

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.path.name, self.file.file.size, self.file.digest)

    @property
    def optimizer(self) -> dict[Value, Value]:
        found = self.value.get("optimizer_state_dict")
        if not isinstance(found, dict):
            raise CorruptFileError("has no optimizer_state_dict", where=str(self.path))
        return found

    def group_tensors(self, key: str) -> list[LazyTensor]:
        """The flat tensors under `key` of the optimizer state, one a group."""
        found = self.optimizer.get(key)
        references = found if isinstance(found, list) else []
        named = {f"{key}[{i}]": r for i, r in enumerate(references)}
        flat = {n: r for n, r in named.items() if isinstance(r, TensorReference)}
        tensors = list(self.file.tensors(flat).values())
        if not tensors or len(flat) != len(named) or any(t.ranges() is None for t in tensors):
            raise CorruptFileError(f"has no usable '{key}'", where=str(self.path))
        return tensors


def _rank_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Model and optimizer files by rank; all that is missing or too much is one error."""
    faults: list[Fault] = []
    found: dict[str, dict[int, Path]] = {"model_states": {}, "optim_states": {}}
    for entry in sorted(path.iterdir()):
        match = _MODEL.fullmatch(entry.name) or _OPTIMIZER.fullmatch(entry.name)
        if match is None:
            continue
        if int(match[2]) > 0:
            raise UnsupportedError(
                f"'{entry.name}' is of tensor-parallel rank {int(match[2])}; XTuner's LLaVA is "
                "never trained tensor-parallel, and how its tensors were cut is not recorded",
                where=str(path),
            )
        kind = "model_states" if "model_states" in entry.name else "optim_states"
        rank = int(match[1] or 0)
        if rank in found[kind]:
            faults.append(Fault(str(path), f"two files for rank {rank}: '{entry.name}' and "
                                           f"'{found[kind][rank].name}'"))  # fmt: skip
        found[kind][rank] = entry
    for kind, files in found.items():
        missing = sorted(set(range(max(files, default=-1) + 1)) - set(files))
        if missing:
            faults.append(
                Fault(str(path), f"the {kind} of ranks {missing} are missing",
                      "Copy the whole directory; every rank writes files of its own.")
            )  # fmt: skip
    if not found["model_states"]:
        faults.append(
            Fault(str(path), "has no *_model_states.pt", "These hold the parameters' names.")
        )
    raise_faults(CorruptFileError, faults)
    return [[files[rank] for rank in sorted(files)] for files in found.values()]  # type: ignore[return-value]


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
    faults: list[Fault] = []
    advice = "Copy the whole directory; every rank writes files of its own."
    if count != len(optimizers):
        faults.append(
            Fault(str(path), f"{count} ranks were trained, optimizer states of {len(optimizers)} "
                             "are there", advice)
        )  # fmt: skip
    if stage == 3 and len(models) != count:
        faults.append(
            Fault(str(path), f"{count} ranks were trained, model states of {len(models)} are there",
                  advice)
        )  # fmt: skip
    faults.extend(_stale(models, "global_steps", [m.value.get("global_steps") for m in models]))
    faults.extend(_stale(optimizers, "the optimizer's step", [_step(o) for o in optimizers]))
    raise_faults(CorruptFileError, faults)
    return stage


def _stale(files: Sequence[_RankFile], what: str, values: Sequence[Value]) -> list[Fault]:
    """Faults for files that disagree with the most frequent value."""
    comparable = [value if isinstance(value, (int, float)) else None for value in values]
    if len(set(comparable)) <= 1:
        return []
    usual = max(comparable, key=comparable.count)
    return [
        Fault(
            str(file.path),
            f"{what} is {value}, in most other ranks {usual}",
            "A file of another checkpoint lies among them; copy the directory again.",
        )
        for file, value in zip(files, comparable, strict=True)
        if value != usual
    ]


def _stage(value: Value) -> int:
    if isinstance(value, Record) and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, int) else 0


def _partitions(value: Value) -> int:
    # One count a group for ZeRO-1 and 2, where groups of experts can have fewer.
    found = value if isinstance(value, list) else [value]
    return max((n for n in found if isinstance(n, int)), default=0)


def _step(rank: _RankFile) -> float | None:
    """The step at which a rank's optimizer was saved, wherever this stage keeps it."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        state = rank.optimizer.get(key)
        state = state.get("state") if isinstance(state, dict) else None
        entry = next(iter(state.values()), None) if isinstance(state, dict) else None
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, (int, float)):
            return float(step)
        if isinstance(step, TensorReference) and math.prod(step.shape) == 1:
            tensor = rank.file.tensors({"step": step})["step"]
            for piece in tensor.extents():
                if piece.checkable is not None:
                    require_member(piece.file, piece.checkable)
            data = bytes(read_ranges(tensor.ranges() or ()))
            codes = {"float32": "<f", "float64": "<d", "int64": "<q"}
            code = codes.get(tensor.dtype.name)
            return float(struct.unpack(code, data)[0]) if code else None
    return None


def _module_weights(path: Path, model: _RankFile, *, has_master: bool) -> dict[str, LazyTensor]:
    """The 16-bit weights of the module; ZeRO-3 has none, its tensors are empty."""
    module = model.value.get("module")
    tensors = model.file.tensors(tensor_references(module, f"{model.path} (module)"))
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,)]
    if empty or not tensors:
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
        self._groups = [rank.group_tensors(key) for rank in optimizers]
        dtypes = {tensor.dtype for rank in self._groups for tensor in rank}
        if len(dtypes) != 1 or len({len(rank) for rank in self._groups}) != 1:
            raise CorruptFileError("its ranks have different groups or dtypes", where=str(path))
        self._dtype: DType = dtypes.pop()

    def tensors(self) -> dict[str, LazyTensor]:
        """Buffers, frozen and trained parameters, and shared ones under each of their names."""
        model = self._models[0]
        tensors = self._frozen()
        tensors.update(self._cut_per_rank() if self._stage == 3 else self._cut_groups())
        shared = model.value.get("shared_params")
        for name, original in shared.items() if isinstance(shared, dict) else ():
            if isinstance(name, str) and isinstance(original, str) and original in tensors:
                tensors[name] = tensors[original]
        return {**self._only_in_module(tensors), **tensors}

    def _only_in_module(self, known: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """What no optimizer has: buffers, and what older versions of DeepSpeed keep of the frozen.

        Before 0.9, frozen parameters stand in the module alone; their 16 bits are all of them.
        """
        model = self._models[0]
        module = model.value.get("module")
        found = model.file.tensors(
            {
                name: reference
                for name, reference in (module.items() if isinstance(module, dict) else ())
                if isinstance(name, str)
                and isinstance(reference, TensorReference)
                and name not in known
            }
        )
        empty = [name for name, tensor in found.items() if tensor.shape == (0,)]
        if empty:
            what = "is in the module, where ZeRO-3 keeps no weights, and in no optimizer state"
            raise_faults(UnsupportedError, [Fault.about(str(self._path), empty, what)])
        return found

    def _frozen(self) -> dict[str, LazyTensor]:
        """Frozen parameters, if they were saved: whole (1, 2), or a part in each rank (3)."""
        first = self._models[0]
        shapes = _shapes(first.value.get("frozen_param_shapes"), str(first.path))
        fragments: list[dict[str, LazyTensor]] = []
        for model in self._models if self._stage == 3 else self._models[:1]:
            found = model.value.get("frozen_param_fragments")
            references = found.items() if isinstance(found, dict) else ()
            fragments.append(
                model.file.tensors(
                    {
                        str(name): reference
                        for name, reference in references
                        if isinstance(reference, TensorReference)
                    }
                )
            )
        tensors: dict[str, LazyTensor] = {}
        faults: list[Fault] = []
        for name, shape in shapes.items():
            parts = [rank[name] for rank in fragments if name in rank]
            if len(parts) != len(fragments):
                faults.append(Fault(str(self._path), f"frozen {name} is not in every rank"))
                continue
            ranges = [piece for part in parts for piece in part.ranges() or ()]
            dtype = parts[0].dtype
            self._add(tensors, faults, name, shape, dtype, ranges, 0)
        raise_faults(CorruptFileError, faults)
        return tensors

    def _cut_groups(self) -> dict[str, LazyTensor]:
        """ZeRO-1 and 2: each group's partitions, one after the other, hold its parameters."""
        groups = self._param_shapes()
        if len(groups) != len(self._groups[0]):
            raise CorruptFileError(
                f"names {len(groups)} parameter groups, its optimizer states have "
                f"{len(self._groups[0])}",
                where=str(self._path),
            )
        tensors: dict[str, LazyTensor] = {}
        faults: list[Fault] = []
        alignment = 2 * len(self._groups)
        for index, shapes in enumerate(groups):
            ranges = [piece for rank in self._groups for piece in rank[index].ranges() or ()]
            available = sum(rank[index].rows for rank in self._groups)
            used = sum(math.prod(shape) for shape in shapes.values())
            # DeepSpeed pads a group to a multiple of 2 x ranks (zero_to_fp32.py).
            if math.ceil(used / alignment) != math.ceil(available / alignment):
                faults.append(
                    Fault(
                        str(self._path),
                        f"group {index} has {available:,} elements, its parameters {used:,}",
                        "The files are of different checkpoints; copy the directory again.",
                    )
                )
                continue
            offset = 0
            for name, shape in shapes.items():
                self._add(tensors, faults, name, shape, self._dtype, ranges, offset)
                offset += math.prod(shape)
        raise_faults(CorruptFileError, faults)
        return tensors

    def _cut_per_rank(self) -> dict[str, LazyTensor]:
        """ZeRO-3: each parameter has a part in every rank, at the same place in each."""
        by_rank = [[p for group in rank for p in group.ranges() or ()] for rank in self._groups]
        available = [sum(group.rows for group in rank) for rank in self._groups]
        size = self._dtype.itemsize
        tensors: dict[str, LazyTensor] = {}
        faults: list[Fault] = []
        offset = 0
        for shapes in self._param_shapes():
            for name, shape in shapes.items():
                part = math.ceil(math.prod(shape) / len(by_rank))
                pieces = [
                    piece for ranges in by_rank for piece in cut(ranges, offset * size, part * size)
                ]
                self._add(tensors, faults, name, shape, self._dtype, pieces, 0)
                offset += part
        for rank, elements in enumerate(available):
            if not offset <= elements <= offset + 2 * len(by_rank) * len(self._groups[0]):
                faults.append(
                    Fault(
                        str(self._path),
                        f"rank {rank} has {elements:,} elements, its parameters {offset:,}",
                        "The files are of different checkpoints; copy the directory again.",
                    )
                )
        raise_faults(CorruptFileError, faults)
        return tensors

    def _param_shapes(self) -> list[dict[str, Shape]]:
        where = str(self._models[0].path)
        found = self._models[0].value.get("param_shapes")
        groups = [_shapes(group, where) for group in found] if isinstance(found, list) else []
        if not any(groups):
            raise CorruptFileError("has no param_shapes", where=where)
        return groups

    @staticmethod
    def _add(
        tensors: dict[str, LazyTensor],
        faults: list[Fault],
        name: str,
        shape: Shape,
        dtype: DType,
        ranges: Sequence[FileRange],
        offset: int,
    ) -> None:
        """Adds the tensor whose elements start at element `offset` of `ranges`."""
        size = dtype.itemsize
        try:
            tensors[name] = Stored(
                name, dtype, shape, cut(ranges, offset * size, math.prod(shape) * size)
            )
        except ValueError as error:
            faults.append(Fault("DeepSpeed directory", str(error)))


def _shapes(value: Value, where: str) -> dict[str, Shape]:
    """Names and shapes of one parameter group; `where` is the file that says so."""
    found: Mapping[Value, Value] = value if isinstance(value, dict) else {}
    shapes: dict[str, Shape] = {}
    for name, value in found.items():
        numbers = value if isinstance(value, (tuple, list)) else None
        if not isinstance(name, str) or numbers is None:
            continue
        shape = tuple(n for n in numbers if isinstance(n, int) and n >= 0)
        if len(shape) != len(numbers):
            raise CorruptFileError(f"{name} has a shape that makes no sense", where=where)
        shapes[name] = shape
    return shapes
