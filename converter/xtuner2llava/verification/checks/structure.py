"""Whether the weight files are whole: index, headers, and the tensors that the classes have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from xtuner2llava.errors import ConversionError
from xtuner2llava.verification.layout import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.verification.out_folder import INDEX, OutFolder
from xtuner2llava.verification.outcome import SKIPPED, Check
from xtuner2llava.verification.plain_model import (
    language_model_shapes,
    tower_config_of_shapes,
    tower_shapes,
)
from xtuner2llava.verification.shard_header import HeaderEntry

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def structure_checks(out: OutFolder) -> Iterator[Check]:
    """Checks of the weight files; headers only are read, and the classes built without memory."""
    headers = [fault for shard in out.shards.values() for fault in shard.faults]
    count = len(out.shards)
    yield Check.of("safetensors headers", headers, f"{count} files, no holes, ordered, padded")
    yield _index(out)
    yield _language_model(out)
    yield _tower(out)
    yield _projector(out)


def _index(out: OutFolder) -> Check:
    """The index against the files, both ways; without an index there is one file."""
    name = "index and files"
    try:
        faults = list(_index_faults(out))
    except ConversionError as error:
        return Check.failed(name, error)
    tensors = len(out.tensors)
    return Check.of(name, faults, f"{tensors} tensors in {len(out.shards)} files, each once")


def _index_faults(out: OutFolder) -> Iterator[str]:
    seen: dict[str, str] = {}
    for file, shard in out.shards.items():
        for tensor in shard.tensors:
            if tensor in seen:
                yield f"{tensor} is in {seen[tensor]} and in {file}"
            seen[tensor] = file
    pickled = [path.name for path in out.files() if path.suffix in (".bin", ".pth", ".pt")]
    if pickled:
        yield f"{pickled[0]} lies beside the safetensors files"
    if not (out.path / INDEX).is_file():
        if set(out.shards) != {"model.safetensors"}:
            found = ", ".join(out.shards) or "no safetensors file"
            yield f"there is no {INDEX}, so model.safetensors is expected alone; found {found}"
        return
    index = out.small_json(INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        yield f"{INDEX} has no weight_map"
        return
    yield from _shard_names(out)
    for file in sorted({str(file) for file in weight_map.values()} - set(out.shards)):
        yield f"{INDEX} names {file}, which is not there"
    for file in sorted(set(out.shards) - {str(file) for file in weight_map.values()}):
        yield f"{file} is not in {INDEX}"
    for tensor, named in weight_map.items():
        if tensor not in seen:
            yield f"{INDEX} names {tensor}, which is in no file"
        elif seen[tensor] != named:
            yield f"{tensor} is in {seen[tensor]}, {INDEX} says {named}"
    for tensor in sorted(set(seen) - set(weight_map)):
        yield f"{tensor} is in {seen[tensor]}, and not in {INDEX}"
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    data = sum(entry.stop - entry.start for entry in out.tensors.values())
    if total != data:
        yield f"{INDEX} says total_size {total}, the tensors have {data} bytes"


def _shard_names(out: OutFolder) -> Iterator[str]:
    matches = [_SHARD.fullmatch(file) for file in out.shards]
    count = len(matches)
    wanted = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    if sorted(out.shards) != wanted:
        yield f"the files are {', '.join(out.shards)}, expected {wanted[0]} to {wanted[-1]}"


def _language_model(out: OutFolder) -> Check:
    """Names and shapes of the language model against its transformers class."""
    name = "tensors of the LLM"
    found = _shapes(out.component(LLM))
    try:
        expected = language_model_shapes(out.layout.text, found)
    except ConversionError as error:
        return Check.failed(name, error)
    faults = list(_differences(found, expected.shapes, expected.optional))
    strange = [n for n in out.tensors if out.layout.place(n) is None]
    faults += [f"{tensor} belongs to no part of {out.layout.architecture}" for tensor in strange]
    return Check.of(name, faults, f"the {len(found)} of {expected.title}, names and shapes")


def _tower(out: OutFolder) -> Check:
    name = "tensors of the vision tower"
    found = _shapes(out.component(VISUAL_ENCODER))
    if not found:
        return Check(name, SKIPPED, "there are none")
    try:
        expected = tower_shapes(out.layout.vision or tower_config_of_shapes(found))
    except ConversionError as error:
        return Check.failed(name, error)
    faults = list(_differences(found, expected.shapes, expected.optional))
    said = "of the config" if out.layout.vision else "as wide and deep as they are"
    return Check.of(name, faults, f"the {len(found)} of {expected.title} {said}")


def _projector(out: OutFolder) -> Check:
    """Depth and sizes of the projector against the config and the two models it connects."""
    name = "tensors of the projector"
    depth, said = out.layout.projector_depth()
    found = _shapes(out.component(PROJECTOR))
    if depth is None:
        return Check.of(name, [f"{said} is none that LLaVA has"], "")
    hidden = out.layout.text.get("hidden_size")
    vision = (out.layout.vision or out.layout.config).get(
        "hidden_size" if out.layout.vision else "mm_hidden_size"
    )
    class_token = _shapes(out.component(VISUAL_ENCODER)).get(
        "vision_model.embeddings.class_embedding"
    )
    if not isinstance(hidden, int) or not isinstance(vision, int):
        return Check.of(name, [f"sizes are {vision!r} and {hidden!r}"], "")
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(depth):
        inputs = vision if layer == 0 else hidden
        # LLaVA calls a single layer of type "linear" by no index.
        prefix = "" if said.endswith("'linear'") else f"{2 * layer}."
        expected |= {f"{prefix}weight": (hidden, inputs), f"{prefix}bias": (hidden,)}
    faults = list(_differences(found, expected, frozenset()))
    if class_token is not None and math.prod(class_token) != vision:
        faults.append(f"the tower is {math.prod(class_token)} wide, the config says {vision}")
    return Check.of(name, faults, f"{depth} linear layers, as {said} says")


def _shapes(tensors: Mapping[str, tuple[str, HeaderEntry]]) -> dict[str, tuple[int, ...]]:
    return {plain: entry.shape for plain, (_, entry) in tensors.items()}


def _differences(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    optional: frozenset[str],
) -> Iterator[str]:
    for name in expected:
        if name not in found and name not in optional:
            yield f"{name} is missing"
    for name, shape in found.items():
        if name not in expected:
            yield f"{name} is unexpected"
        elif shape != expected[name]:
            yield f"{name} has shape {list(shape)}, expected {list(expected[name])}"
