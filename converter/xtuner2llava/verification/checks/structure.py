"""Whether the weight files are whole: headers, index, and the tensors that the classes have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.storage.json_file import table
from xtuner2llava.storage.safetensors_file import SafetensorsFile
from xtuner2llava.tensors.lazy import LazyTensor, Shape
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.outcome import FAILED, SKIPPED, Finding, judge
from xtuner2llava.verification.plain_model import (
    in_files,
    new_language_model,
    new_tower,
    plain_config,
    tower_config_of_shapes,
)
from xtuner2llava.writing.shards import INDEX_NAME

# Dtypes by their place in a file: enum `Dtype` of safetensors `src/tensor.rs`, backwards.
_ORDER = "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()


def headers(out: ConvertedFolder) -> Finding:
    """Each header as `safetensors.torch.save_file` writes it, which is stricter than the format."""
    faults = [fault for found in out.damage.values() for fault in found]
    faults += [f"{n}: {fault}" for n, shard in out.shards.items() for fault in _unusual(shard)]
    return judge(faults, f"{len(out.shards)} {_files(out)}, no holes, ordered, padded")


def _files(out: ConvertedFolder) -> str:
    return "file" if len(out.shards) == 1 else "files"


def _unusual(shard: SafetensorsFile) -> Iterator[str]:
    with shard.file.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    if not text.startswith(b"{"):
        yield "its header does not begin with '{'"
    if (8 + length) % 8 or len(text) - len(text.rstrip(b" ")) > 7:
        yield f"its header of {length:,} bytes is not padded with spaces to a multiple of eight"
    if shard.metadata != {"format": "pt"}:
        yield "its __metadata__ is not {'format': 'pt'}, without which it is not loaded"
    stored = {name: tensor.ranges() for name, tensor in shard.tensors.items()}
    found = sorted((r[0].offset, name) for name, r in stored.items() if r)
    wanted = sorted((_ORDER.index(shard.tensors[name].dtype.code), name) for _, name in found)
    first = next((a for (_, a), (_, b) in zip(found, wanted, strict=True) if a != b), None)
    if first is not None:
        yield f"its tensors are not in the order that safetensors writes, from {first} on"


def index(out: ConvertedFolder) -> Finding:
    """The index against the files, both ways; without an index there is one file."""
    where = {tensor: file for file, shard in out.shards.items() for tensor in shard.tensors}
    readable = "readable " if out.damage else ""
    fine = f"{len(where)} tensors in {len(out.shards)} {readable}{_files(out)}, each once"
    return judge([*_other_weights(out, where), *_index_faults(out, where)], fine)


def _other_weights(out: ConvertedFolder, where: Mapping[str, str]) -> Iterator[str]:
    """Tensors and files of weights that loaders may take instead of others."""
    for file, shard in out.shards.items():
        yield from (
            f"{n} is in {file} and in {where[n]}" for n in shard.tensors if where[n] != file
        )
    for path in out.files():
        if path.suffix in (".bin", ".pth", ".pt"):
            yield f"{path.name} lies beside the safetensors files"


def _index_faults(out: ConvertedFolder, where: Mapping[str, str]) -> Iterator[str]:
    """What the index, if there is one, says wrong of the tensors, which are `where` they are."""
    files = sorted([*out.shards, *out.damage])
    if not (out.path / INDEX_NAME).is_file():
        if files != ["model.safetensors"]:
            found = ", ".join(files) or "no safetensors file"
            yield f"there is no {INDEX_NAME}, so model.safetensors is expected alone; found {found}"
        return
    values = out.json(INDEX_NAME)
    weight_map, total = values.get("weight_map"), table(values, "metadata").get("total_size")
    if not isinstance(weight_map, dict):
        yield f"{INDEX_NAME} has no weight_map"
        return
    wanted = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    if files != wanted:
        yield f"the files are {', '.join(files)}, expected {wanted[0]} to {wanted[-1]}"
    named = {str(file) for file in weight_map.values()}
    yield from (f"{INDEX_NAME} names {n}, which is not there" for n in sorted(named - {*files}))
    yield from (f"{n} is not in {INDEX_NAME}" for n in sorted({*files} - named))
    for tensor, said in weight_map.items():
        if tensor not in where and said not in out.damage:
            yield f"{INDEX_NAME} names {tensor}, which is in no file"
        elif where.get(tensor, said) != said:
            yield f"{tensor} is in {where[tensor]}, {INDEX_NAME} says {said}"
    for tensor in sorted(where.keys() - weight_map.keys()):
        yield f"{tensor} is in {where[tensor]}, and not in {INDEX_NAME}"
    data = sum(t.nbytes for shard in out.shards.values() for t in shard.tensors.values())
    if total != data:
        yield f"{INDEX_NAME} says total_size {total}, the tensors have {data} bytes"


def language_model(out: ConvertedFolder) -> Finding:
    """Names and shapes of the language model against its transformers class."""
    import torch

    found = out.part(LLM)
    config = plain_config(out.text)
    with torch.device("meta"):
        model = new_language_model(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    faults = _differences(found, _shapes(model), "lm_head.weight" if tied else None)
    unknown = (name for name in out.tensors if out.place(name) is None)
    others = (f"{name} belongs to no part of {out.architecture}" for name in unknown)
    fine = f"the {len(found)} of {type(model).__name__}, names and shapes"
    return judge([*faults, *others], fine)


def tower(out: ConvertedFolder) -> Finding:
    """The same of the vision tower; without a config of its own, as wide and deep as it is."""
    import torch

    found = out.part(VISUAL_ENCODER)
    if not found:
        return SKIPPED, "there are none"
    config = out.vision or tower_config_of_shapes({n: t.shape for n, t in found.items()})
    with torch.device("meta"):
        shapes = _shapes(new_tower(config))
    which = "of the config" if out.vision else "as wide and deep as they are"
    faults = [*_differences(found, shapes, "vision_model.embeddings.position_ids")]
    return judge(faults, f"the {len(found)} of CLIPVisionModel {which}")


def _shapes(model: Any) -> dict[str, Shape]:
    return {name: shape for parts in in_files(model).values() for name, shape in parts}


def projector(out: ConvertedFolder) -> Finding:
    """Depth and sizes of the projector against the config and the two models it connects."""
    hidden = out.text.get("hidden_size")
    if out.vision is not None:
        depth, named = 2, "LlavaMultiModalProjector has linear_1 and linear_2"
        vision = out.vision.get("hidden_size")
    else:
        kind, vision = out.config.get("mm_projector_type"), out.config.get("mm_hidden_size")
        named, match = (
            f"mm_projector_type {kind!r}",
            re.fullmatch(r"mlp([1-9]\d?)x_gelu", str(kind)),
        )
        depth = int(match[1]) if match else int(kind == "linear")
    if not depth:
        return FAILED, f"{named} is not one that LLaVA has"
    if not isinstance(hidden, int) or not isinstance(vision, int):
        return FAILED, f"sizes are {vision!r} and {hidden!r}"
    shapes: dict[str, Shape] = {}
    for layer in range(depth):
        # LLaVA gives a single layer, of type "linear", no index.
        prefix = "" if named.endswith("'linear'") else f"{2 * layer}."
        inputs = vision if layer == 0 else hidden
        shapes |= {f"{prefix}weight": (hidden, inputs), f"{prefix}bias": (hidden,)}
    faults = [*_differences(out.part(PROJECTOR), shapes)]
    token = out.part(VISUAL_ENCODER).get("vision_model.embeddings.class_embedding")
    if token is not None and math.prod(token.shape) != vision:
        faults.append(f"the tower is {math.prod(token.shape)} wide, the config says {vision}")
    return judge(faults, f"{depth} linear layers, as {named} says")


def _differences(
    found: Mapping[str, LazyTensor], expected: Mapping[str, Shape], optional: str | None = None
) -> Iterator[str]:
    for name in expected:
        if name not in found and name != optional:
            yield f"{name} is missing"
    for name, tensor in found.items():
        shape = expected.get(name)
        if shape is None:
            yield f"{name} is unexpected"
        elif tensor.shape != shape:
            yield f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
