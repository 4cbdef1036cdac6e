"""Shards: which tensor goes into which safetensors file, and at which byte.

All of this is known before a byte of data is read. The format: safetensors README, "Format".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.errors import Fault, PlanError, raise_faults
from xtuner2llava.tensors.lazy import LazyTensor

INDEX_NAME = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_METADATA_KEY = "__metadata__"

# The declaration order of enum `Dtype`, backwards: so does `prepare` sort in safetensors
# `safetensors/src/tensor.rs`, then by name. Large alignments come first.
_ORDER = {
    code: place
    for place, code in enumerate(
        "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()
    )
}
# `MAX_HEADER_SIZE` in safetensors `safetensors/src/tensor.rs`: no reader takes more.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a shard; `offset` counts bytes from the start of the file."""

    name: str
    tensor: LazyTensor
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file to be: all its bytes are `header`, then `entries` in order, without gaps.

    `header` includes the eight bytes of its length. `size` counts the whole file, in bytes.
    """

    filename: str
    header: bytes
    entries: tuple[Entry, ...]
    size: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All shards of a model; `total_size` counts bytes of tensors, without headers."""

    shards: tuple[Shard, ...]
    total_size: int

    @property
    def index(self) -> bytes | None:
        """The content of `INDEX_NAME`; None for a single shard, which needs no index.

        Written as `save_pretrained` does (transformers `modeling_utils.py`).
        """
        if len(self.shards) == 1:
            return None
        weight_map = {entry.name: s.filename for s in self.shards for entry in s.entries}
        index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

    def fingerprint(self, provenance: str) -> str:
        """A hash that is equal only if a resumed run would write the same bytes.

        `provenance` stands for what the headers do not say: which input, merged and cast how.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.filename}\0".encode() + shard.header)
        digest.update(provenance.encode())
        return digest.hexdigest()


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_size: int = 5 * 10**9) -> ShardPlan:
    """Puts `tensors`, in the order given, into shards of at most `max_shard_size` bytes of data.

    A larger tensor has a shard of its own. Each shard is byte for byte what
    `safetensors.torch.save_file(..., metadata={"format": "pt"})` makes of its tensors. Reads
    nothing. Raises `PlanError` for names that safetensors cannot hold.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    if not tensors:
        raise PlanError("there is not a single tensor to write")
    raise_faults(PlanError, [fault for name in tensors for fault in _name_faults(name)])
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    shards = tuple(
        _shard(filename, {name: tensors[name] for name in names})
        for filename, names in split.filename_to_tensors.items()
    )
    return ShardPlan(shards, sum(tensor.nbytes for tensor in tensors.values()))


def _name_faults(name: str) -> list[Fault]:
    if name == _METADATA_KEY:
        return [Fault(name, "safetensors reserves this name, no tensor can have it")]
    try:
        name.encode()
    except UnicodeEncodeError:
        return [Fault(ascii(name), "the name of this tensor is not valid Unicode")]
    return []


def _shard(filename: str, tensors: Mapping[str, LazyTensor]) -> Shard:
    # Python compares strings by code point, which is the order of their UTF-8 bytes too.
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype.code], item[0]))
    described: dict[str, object] = {_METADATA_KEY: {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        described[name] = {
            "dtype": tensor.dtype.code,
            "shape": tensor.shape,
            "data_offsets": (position, position + tensor.nbytes),
        }
        position += tensor.nbytes
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise PlanError(
            f"its header would have {len(text):,} bytes, readers take {_MAX_HEADER_BYTES:,}",
            where=filename,
            advice="Give a smaller --max-shard-size, so that each shard has fewer tensors.",
        )
    header = len(text).to_bytes(8, "little") + text
    entries = []
    offset = len(header)
    for name, tensor in ordered:
        entries.append(Entry(name, tensor, offset))
        offset += tensor.nbytes
    return Shard(filename, header, tuple(entries), offset)
