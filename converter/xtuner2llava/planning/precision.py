"""The dtype of a plan, and what to tell the user about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from xtuner2llava.planning.findings import Findings
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import LazyTensor

KEEP = "keep"


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
