"""The folder against its checkpoint: the plan made again, and everything compared with it.

An error in the plan itself is made again too. `logits/` catches those: it runs the source model in
its own class.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import ConversionError
from xtuner2llava.metadata.small_files import small_files
from xtuner2llava.options import Options, VerifyOptions
from xtuner2llava.planning.plan import Plan, PlannedTensor
from xtuner2llava.planning.planner import make_plan
from xtuner2llava.planning.ties import first_difference
from xtuner2llava.sources import open_checkpoint
from xtuner2llava.storage.json_file import Json
from xtuner2llava.storage.safetensors_file import SafetensorsFile
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.tensors.files import FileRange
from xtuner2llava.verification.out_folder import INDEX, OutFolder
from xtuner2llava.verification.outcome import TENSORS, Check
from xtuner2llava.writing.blocks import blocks, position, working_bytes
from xtuner2llava.writing.budget import DEFAULT_BYTES, Budget
from xtuner2llava.writing.disk import read_all
from xtuner2llava.writing.shards import Entry
from xtuner2llava.writing.work import Work

if TYPE_CHECKING:
    import torch

BITS = "every tensor, bit for bit"
FILES = "small files as planned"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first element of a tensor that is not the planned one, and how many are not."""

    name: str
    index: tuple[int, ...]
    found: float
    expected: float
    count: int

    def __str__(self) -> str:
        return (
            f"{self.name}{list(self.index)} is {self.found:.9g}, expected {self.expected:.9g}; "
            f"{self.count:,} elements differ"
        )


def plan_again(checkpoint: str, options: VerifyOptions, out: OutFolder) -> Plan:
    """The plan of `checkpoint` with what `out` says of itself where `options` leave it open.

    Reads headers, small files and tied tensors. Raises `ConversionError`, as `convert` does.
    """
    config, recorded = out.layout.config, out.record.get("dtype")
    tower = config.get("mm_vision_tower")
    shared = {each.name for each in fields(Options)} & {each.name for each in fields(options)}
    given: dict[str, Any] = {name: getattr(options, name) for name in shared}
    given["format"] = out.layout.format
    given["model_type"] = "llava" if config.get("model_type") == "llava" else "official"
    if options.dtype == "auto" and isinstance(recorded, str):
        given["dtype"] = recorded
    if options.vision_tower_name is None and isinstance(tower, str):
        given["vision_tower_name"] = tower
    chosen = Options(**{name: value for name, value in given.items() if value is not None})
    opened = open_checkpoint(checkpoint, chosen)
    plan = make_plan(opened, chosen)
    # As `convert` does: what the config ties is compared, and written where it differs.
    untied = [t.name for t in plan.ties if first_difference(t.tensor, t.other) is not None]
    return make_plan(opened, chosen, untied) if untied else plan


def against_checks(
    out: OutFolder,
    plan: Plan,
    jobs: int | None,
    figures: dict[str, Json],
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Check]:
    """Compares the headers, then all tensors, then the small files; `figures` gets the numbers."""
    found = folder_tensors(out)
    faults = list(_header_faults(found, plan))
    fine = f"{len(plan.tensors)} tensors, by family {plan.mapping.family}"
    yield Check.of(TENSORS, faults, fine)
    common = [p for p in plan.tensors if p.name in found and _fits(found[p.name], p.tensor)]
    differences = compare(found, common, jobs=jobs, on_progress=on_progress)
    said = [str(difference) for difference in differences]
    kinds = Counter(planned.how.partition(" ")[0] for planned in common)
    copied, rounded, computed = (kinds[how] for how in ("copy", "cast", "compute"))
    fine = f"{copied} copied, {rounded} rounded once, {computed} computed"
    yield Check.of(BITS, said, fine)
    yield Check.of(FILES, *_small_files(out, plan))
    figures["tensors"] = {
        "copied": copied,
        "rounded": rounded,
        "computed": computed,
        "bytes": sum(planned.tensor.nbytes for planned in common),
        "differing": [*faults, *said],
    }


def folder_tensors(out: OutFolder) -> dict[str, LazyTensor]:
    """The tensors of the folder by name. Raises `CorruptFileError`."""
    found: dict[str, LazyTensor] = {}
    for file in out.shards:
        found |= SafetensorsFile(out.path / file).tensors
    return found


def compare(
    found: Mapping[str, LazyTensor],
    planned: list[PlannedTensor],
    *,
    jobs: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """What differs between the planned tensors and those of the folder, in the order of the plan.

    Reads and computes all sources again, `jobs` tensors at once, in the memory of `convert`.
    """
    work = Work(jobs, sum(p.tensor.nbytes for p in planned), on_progress)
    most = max((working_bytes(p.tensor) for p in planned), default=0)
    budget = Budget(max(DEFAULT_BYTES, most))

    def job(one: PlannedTensor) -> Difference | None:
        with budget.take(working_bytes(one.tensor), work.check):
            (place,) = found[one.name].ranges() or ()
            return _difference(one, place, work.advance)

    return [difference for difference in work.run(job, planned) if difference is not None]


def _difference(
    planned: PlannedTensor, place: FileRange, advance: Callable[[int], None]
) -> Difference | None:
    """Compares one tensor with the bytes at `place`, block by block.

    Which NaN a rounded NaN became depends on the processor, and on where a block ends.
    """
    import torch

    tensor = planned.tensor
    any_nan = tensor.ranges() is None
    entry = Entry(planned.name, tensor, place.offset)
    buffer, element, count = bytearray(), 0, 0
    first: tuple[int, float, float] | None = None
    with place.file.open() as descriptor:
        for expected in blocks(entry):
            if len(buffer) != len(expected):
                buffer = bytearray(len(expected))
            read_all(descriptor, memoryview(buffer), place.offset + element * tensor.dtype.itemsize)
            if buffer != expected:
                ours, theirs = (
                    torch.frombuffer(data, dtype=tensor.dtype.torch) for data in (buffer, expected)
                )
                wrong = _unequal(ours, theirs, any_nan=any_nan)
                count += len(wrong)
                if len(wrong) and first is None:
                    at = int(wrong[0])
                    first = element + at, float(ours[at]), float(theirs[at])
            element += len(expected) // tensor.dtype.itemsize
            advance(len(expected))
    if first is None:
        return None
    return Difference(planned.name, position(first[0], tensor.shape), first[1], first[2], count)


def _unequal(one: torch.Tensor, other: torch.Tensor, *, any_nan: bool) -> torch.Tensor:
    """The numbers of the elements whose bits differ."""
    import torch

    size = one.element_size()
    wrong = (one.view(torch.uint8) != other.view(torch.uint8)).view(-1, size).any(dim=1)
    if any_nan and one.is_floating_point():
        wrong &= ~(one.isnan() & other.isnan())
    return wrong.nonzero().flatten()


def _fits(found: LazyTensor, planned: LazyTensor) -> bool:
    return found.shape == planned.shape and found.dtype == planned.dtype


def _header_faults(found: Mapping[str, LazyTensor], plan: Plan) -> Iterator[str]:
    """Tensors that are missing, unexpected, or of another dtype or shape: before data is read."""
    planned = {p.name: p.tensor for p in plan.tensors}
    yield from (f"{name} is missing" for name in planned if name not in found)
    yield from (f"{name} is not in the plan" for name in found if name not in planned)
    for name, tensor in planned.items():
        if name in found and not _fits(found[name], tensor):
            there = found[name]
            yield (
                f"{name} is {there.dtype} {list(there.shape)}, "
                f"expected {tensor.dtype} {list(tensor.shape)}"
            )


def _small_files(out: OutFolder, plan: Plan) -> tuple[list[str], str]:
    """The config, the tokenizer and the processor against the plan's; the card may be edited.

    The index depends on the shard size, and is checked against the files instead.
    """
    try:
        planned = small_files(plan)
    except ConversionError as error:
        return [f"cannot be made again: {error}"], ""
    planned.pop(INDEX, None)
    faults = []
    for name, data in planned.items():
        path = out.path / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        # Sizes first: a file of gigabytes need not be read to know that it is another one.
        elif path.stat().st_size > 2 * len(data) + (1 << 20) or path.read_bytes() != data:
            faults.append(_first_fault(out, name, data))
    return faults, ", ".join(planned)


def _first_fault(out: OutFolder, name: str, data: bytes) -> str:
    """Where a file is not as planned: the JSON key, or the byte."""
    if name.endswith(".json"):
        try:
            found, planned = out.small_json(name), json.loads(data)
        except ConversionError as error:
            return f"{name}: {error.faults[0].what}"
        different = _different_value(found, planned, "")
        return f"{name}: {different}" if different else f"{name} is formatted otherwise"
    with (out.path / name).open("rb") as file:
        there = file.read(len(data) + 1)
    same = (n for n, (a, b) in enumerate(zip(there, data, strict=False)) if a != b)
    at = next(same, min(len(there), len(data)))
    return f"{name} differs from byte {at:,} on"


def _different_value(found: Json, planned: Json, where: str) -> str | None:
    """The first value of `found` that is not that of `planned`, with its keys."""
    if isinstance(found, dict) and isinstance(planned, dict):
        pairs = [(key, found.get(key), planned.get(key)) for key in {**planned, **found}]
    elif isinstance(found, list) and isinstance(planned, list) and len(found) == len(planned):
        pairs = [(str(n), *both) for n, both in enumerate(zip(found, planned, strict=True))]
    else:
        same = found == planned and type(found) is type(planned)
        return None if same else f"{where} is {_shown(found)}, planned is {_shown(planned)}"
    inner = (_different_value(a, b, f"{where}.{key}" if where else key) for key, a, b in pairs)
    return next((text for text in inner if text), None)


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
