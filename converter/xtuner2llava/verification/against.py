"""The folder against its checkpoint: the plan made again, and everything compared with it.

An error in the plan itself is made again too. `logits/` catches those: it runs the trained model
in its own class.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import ConversionError
from xtuner2llava.options import Dtype, Options, VerifyOptions, choices
from xtuner2llava.planning.plan import Plan, PlannedTensor
from xtuner2llava.planning.planner import make_plan
from xtuner2llava.planning.redaction import redact_name
from xtuner2llava.planning.vision_tower import is_absolute
from xtuner2llava.sources.checkpoint import open_checkpoint
from xtuner2llava.storage.json_file import Json, parse_json
from xtuner2llava.tensors.files import FileRange
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.outcome import TENSORS, Check, judge
from xtuner2llava.writing.blocks import blocks, position, working_memory
from xtuner2llava.writing.jobs import OnBytes, Work, fitting_jobs
from xtuner2llava.writing.shards import INDEX_NAME, Entry
from xtuner2llava.writing.verify import WrittenFile

if TYPE_CHECKING:
    import torch

BITS = "every tensor, bit for bit"
FILES = "small files as planned"


def plan_again(checkpoint: str, options: VerifyOptions, out: ConvertedFolder) -> Plan:
    """The plan of `checkpoint`, with the format and dtype of `out` where `options` leave them open.

    What `out` says and `convert` does not write is not taken: that is for the checks to find.
    Reads headers, small files and tied tensors. Raises `ConversionError`, as `convert` does.
    """
    config, recorded = out.config, out.record.get("dtype")
    tower = config.get("mm_vision_tower")
    if isinstance(tower, str) and is_absolute(tower):  # As users set it for their machine.
        tower = redact_name(tower.replace("\0", ""))
    shared = {each.name for each in fields(Options)} & {each.name for each in fields(options)}
    given: dict[str, Any] = {name: getattr(options, name) for name in shared}
    given["format"] = out.format
    given["model_type"] = "llava" if config.get("model_type") == "llava" else "official"
    if options.dtype == "auto" and recorded in choices(Dtype):
        given["dtype"] = recorded
    if options.vision_tower_name is None and isinstance(tower, str) and tower.strip():
        given["vision_tower_name"] = tower
    chosen = Options(**{name: value for name, value in given.items() if value is not None})
    return make_plan(open_checkpoint(checkpoint, chosen), chosen)


def against_checks(
    out: ConvertedFolder, plan: Plan, options: VerifyOptions, figures: dict[str, Json]
) -> Iterator[Check]:
    """Compares the headers, then all tensors, then the small files; `figures` gets the numbers."""
    on_progress = options.on_progress
    report = None if on_progress is None else partial(on_progress, "compare")
    found = out.tensors
    faults = [*_header_faults(found, plan)]
    fine = f"{len(plan.tensors)} tensors, by family {plan.mapping.family}"
    yield Check(TENSORS, *judge(faults, fine))
    common = [p for p in plan.tensors if p.name in found and _fits(found[p.name], p.tensor)]
    differing = compare(found, common, jobs=options.jobs, on_progress=report)
    kinds = Counter(planned.how.partition(" ")[0] for planned in common)
    copied, rounded, computed = (kinds[how] for how in ("copy", "cast", "compute"))
    fine = f"{copied} copied, {rounded} rounded once, {computed} computed"
    yield Check(BITS, *judge(differing, fine))
    figures["tensors"] = {
        "copied": copied,
        "rounded": rounded,
        "computed": computed,
        "bytes": sum(planned.tensor.nbytes for planned in common),
        "differing": [*faults, *differing],
    }
    # The index depends on the shard size, and is checked against the shards.
    files = {name: data for name, data in plan.files.items() if name != INDEX_NAME}
    try:
        faults = [f for name, data in files.items() if (f := _file_fault(out, name, data))]
        yield Check(FILES, *judge(faults, ", ".join(files)))
    except ConversionError as error:
        yield Check.failed(FILES, error)


def compare(
    found: Mapping[str, LazyTensor],
    planned: list[PlannedTensor],
    *,
    jobs: int | None = None,
    on_progress: OnBytes | None = None,
) -> list[str]:
    """What differs between the planned tensors and those of the folder, in the order of the plan.

    Reads and computes all sources again, `jobs` tensors at once, in the memory of `convert`.
    """
    # A job is a whole tensor, so that any number of others follow it.
    needs = [replace(working_memory(p.tensor), blocks=1) for p in planned]
    work = Work(fitting_jobs(needs, jobs), sum(p.tensor.nbytes for p in planned), on_progress)

    def job(one: PlannedTensor) -> str | None:
        (place,) = found[one.name].ranges() or ()
        return _difference(one, place, work.advance)

    return [difference for difference in work.run(job, planned) if difference is not None]


def _difference(
    planned: PlannedTensor, place: FileRange, advance: Callable[[int], None]
) -> str | None:
    """The first element at `place` that is not the planned one, and how many are not.

    Which NaN a rounded NaN became depends on the processor, and on where a block ends.
    """
    import torch

    name, tensor = planned.name, planned.tensor
    first, count, offset = "", 0, place.offset
    with place.file.open() as descriptor:
        file = WrittenFile(place.file.path, descriptor)
        for expected in blocks(Entry(name, tensor, place.offset)):
            found = file.read(offset, len(expected))
            if found != expected:
                ours, theirs = (
                    torch.frombuffer(data, dtype=tensor.dtype.torch) for data in (found, expected)
                )
                wrong = _unequal(ours, theirs, any_nan=tensor.ranges() is None)
                count += len(wrong)
                if len(wrong) and not first:
                    at = int(wrong[0])
                    element = (offset - place.offset) // tensor.dtype.itemsize + at
                    values = f"is {float(ours[at]):.9g}, expected {float(theirs[at]):.9g}"
                    first = f"{name}{list(position(element, tensor.shape))} {values}"
            offset += len(expected)
            advance(len(expected))
    return f"{first}; {count:,} elements differ" if first else None


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


def _file_fault(out: ConvertedFolder, name: str, data: bytes) -> str | None:
    """Where a small file is not as planned: the JSON key, or the byte. The card may be edited."""
    path = out.path / name
    if not path.is_file():
        return f"{name} is missing"
    with path.open("rb") as file:
        # It may have gigabytes.
        found = file.read(2 * len(data) + (1 << 20))
    if found == data:
        return None
    if name.endswith(".json"):
        different = _first_difference(parse_json(found, name), json.loads(data))
        if different is None:
            return f"{name} differs in its formatting"
        key, there, planned = different
        return f"{name}: {key} is {there}, planned is {planned}"
    pairs = enumerate(zip(found, data, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(found), len(data)))
    return f"{name} differs from byte {at:,} on"


def _first_difference(there: Json, planned: Json, where: str = "") -> tuple[str, str, str] | None:
    """The keys that lead to the first different value, and both values as short JSON text."""
    pairs: Iterator[tuple[object, tuple[Json, Json]]] = iter(())
    if isinstance(there, dict) and isinstance(planned, dict):
        pairs = ((key, (there.get(key), planned.get(key))) for key in {**planned, **there})
    elif isinstance(there, list) and isinstance(planned, list):
        pairs = enumerate(zip_longest(there, planned))
    elif there != planned or type(there) is not type(planned):
        texts = (json.dumps(value, ensure_ascii=False) for value in (there, planned))
        one, other = (text if len(text) <= 60 else f"{text[:57]}..." for text in texts)
        return where, one, other
    prefix = f"{where}." if where else ""
    inside = (_first_difference(*pair, f"{prefix}{key}") for key, pair in pairs)
    return next(filter(None, inside), None)
