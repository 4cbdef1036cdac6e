"""The tensors of a plan under the format's names, in the dtype to write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.apply import Dropped, Origin
from xtuner2llava.mapping.format import Format
from xtuner2llava.planning.plan import Findings, PlannedTensor
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import BY_NAME
from xtuner2llava.tensors.files import FileRange
from xtuner2llava.tensors.lazy import LazyTensor

KEEP = "keep"


def place(
    components: Mapping[str, Mapping[str, LazyTensor]],
    origins: Mapping[str, Mapping[str, Origin]],
    format_: Format,
    environment: Mapping[str, object],
    dtype: str,
) -> tuple[list[PlannedTensor], list[tuple[str, Dropped]]]:
    """All tensors by component under the format's names and in `dtype`, as they are written.

    `origins` are, by component, of tensors that rules of a family have made before. Raises
    `MappingError` with all that does not fit.
    """
    planned: dict[str, PlannedTensor] = {}
    dropped: list[tuple[str, Dropped]] = []
    faults: list[Fault] = []
    for component, tensors in components.items():
        try:
            applied = format_.apply(component, environment, tensors)
        except MappingError as error:
            faults.extend(error.faults)
            continue
        dropped.extend((component, each) for each in applied.dropped)
        for name, tensor in applied.outputs.items():
            made = applied.origins[name]
            if name in planned:
                faults.append(Fault(made.where, f"{name} is made twice"))
            origin = origins.get(component, {}).get(made.sources[0], made)
            rule = f"{origin.verb} {origin.where}"
            to_write = _in_dtype(tensor, dtype)
            how = "copy" if to_write is tensor else f"cast from {tensor.dtype}"
            how = "compute" if tensor.ranges() is None else how
            planned[name] = PlannedTensor(name, component, to_write, origin.sources, rule, how)
    raise_faults(MappingError, faults)
    return list(planned.values()), dropped


def dtype_to_write(
    asked: str, config: Mapping[str, Json], llm: Iterable[LazyTensor], findings: Findings
) -> str:
    """The dtype to write, or "keep"; "auto" is the base LLM's `torch_dtype`."""
    if asked != "auto":
        return asked
    named = config.get("torch_dtype")
    if named in ("float16", "bfloat16", "float32"):
        chosen = str(named)
    else:
        chosen = "float16"
        findings.note(
            f"The LLM's config says torch_dtype {named!r}; float16 is written, as LLaVA loads."
        )
    stored = {t.stored_dtype.name for t in llm if t.stored_dtype.is_float}
    if chosen == "bfloat16" and stored == {"float32"}:
        findings.note(
            "The weights are float32 and are rounded to bfloat16, the base's dtype. LLaVA "
            "itself loads as float16. --dtype float16 rounds once for that, instead of twice."
        )
    if len(stored) == 1 and chosen not in stored and "float32" not in stored:
        findings.note(
            f"The LLM is stored as {stored.pop()} and is rounded to {chosen}, the dtype of "
            "the given base. --dtype keep leaves it as it is."
        )
    return chosen


def config_dtype(dtype: str, llm: Iterable[LazyTensor]) -> str:
    """`torch_dtype` of config.json: of mixed dtypes, the one that most bytes have."""
    if dtype != KEEP:
        return dtype
    sizes: Counter[str] = Counter()
    for tensor in llm:
        sizes[tensor.stored_dtype.name] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _in_dtype(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """The tensor in the dtype to write; integers stay what they are."""
    if not tensor.dtype.is_float:
        return tensor
    return cast(tensor, tensor.stored_dtype if dtype == KEEP else BY_NAME[dtype])


def unchecked_note(tensors: Iterable[PlannedTensor]) -> str | None:
    """What is read from files of torch.save that carry zeros in place of CRC-32 sums, if any is."""
    pieces: set[FileRange] = set()
    count = 0
    for planned in tensors:
        extents = planned.tensor.extents()
        found = [each for each in extents if each.member is not None and not each.checkable]
        pieces.update(found)
        count += bool(found)
    if not pieces:
        return None
    names = sorted({piece.file.path.name for piece in pieces})
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    carry = "carries" if len(names) == 1 else "carry"
    return (
        f"Not checked for damage: {count:,} tensors, {sum(p.length for p in pieces):,} bytes of "
        f"{', '.join(names[:3])}{more}, which {carry} no CRC-32."
    )
