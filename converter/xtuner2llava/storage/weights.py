"""Folders of weights as `save_pretrained` leaves them: safetensors or `.bin`, whole or sharded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, UnsupportedError, raise_faults
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.json_file import read_json
from xtuner2llava.storage.pickle_reader import TensorReference, Value
from xtuner2llava.storage.safetensors_file import SafetensorsFile
from xtuner2llava.storage.small_file import inside
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.tensors.lazy import LazyTensor

_QUANTISED = re.compile(
    r"\.(?:nested_)?(?:absmax|quant_map)$|\.quant_state\.|\.SCB$|\.weight_format$"
    r"|\.(?:qweight|qzeros|g_idx)$"
)
# Files beside weights that are not weights: the states of optimizers and trainers.
_OF_TRAINERS = re.compile(r"optimizer|scheduler|scaler|rng_state|training_args|random_states")
_WEIGHT_FILES = frozenset(
    ".safetensors .bin .pth .pt .ckpt .distcp .gguf .h5 .msgpack .npz".split()
)
# The largest models that are published have a few hundred.
_MAX_SHARDS = 10_000


@dataclass(frozen=True, slots=True)
class Weights:
    """Lazy tensors by name, and the files that they lie in."""

    tensors: Mapping[str, LazyTensor]
    files: tuple[Fingerprint, ...]


def find_weights(folder: Path, stems: Sequence[str] = ("model", "pytorch_model")) -> Path | None:
    """The index or weight file that `from_pretrained` would take in `folder`, if there is one."""
    whole = (f"{stems[0]}.safetensors", f"{stems[-1]}.bin")
    names = [name + suffix for name in whole for suffix in ("", ".index.json")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def weight_names(path: Path) -> frozenset[str]:
    """The names of the tensors in a weight file, or in the shards that an index names."""
    return frozenset(_weight_map(path) if _is_index(path) else _open_file(path).tensors)


def unread_weights(folder: Path, read: Path | None, files: tuple[Fingerprint, ...]) -> list[str]:
    """The names of weight files in `folder` other than the `files` that `read` is or names."""
    known = {file.name for file in files} | {read.name if read is not None else ""}
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in known
        and (entry.suffix in _WEIGHT_FILES or _is_index(entry))
        and not _OF_TRAINERS.match(entry.name)
    )


def open_weights(path: Path, *, sampled: bool = False) -> Weights:
    """All tensors of a weight file, or of the shards that an index names; headers only are read.

    `sampled` is for checkpoints, see `SafetensorsFile.fingerprint`.
    """

    def open_shard(name: str) -> Weights:
        if not inside(path.parent, name).is_file():
            raise CorruptFileError(
                f"names the shard '{name}', which is not there",
                where=str(path),
                advice="Copy or download the missing file.",
            )
        return _open_file(path.parent / name, sampled=sampled)

    return open_shards(path, open_shard) if _is_index(path) else _open_file(path, sampled=sampled)


def _open_file(path: Path, *, sampled: bool = False) -> Weights:
    """All tensors of one safetensors or `torch.save` file."""
    inside(path.parent, path.name)
    if path.suffix == ".safetensors":
        opened = SafetensorsFile(path)
        return Weights(opened.tensors, (opened.fingerprint(sampled=sampled),))
    torch_file = TorchFile(path)
    tensors = torch_file.tensors(tensor_references(torch_file.value, str(path)))
    return Weights(tensors, (torch_file.fingerprint,))


def _is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def tensor_references(value: Value, where: str) -> dict[str, TensorReference]:
    """The tensors of a state dict; raises `UnsupportedError` if `value` is not one.

    It may hold tensors alone: what cannot be read would be left out.
    """
    if not isinstance(value, dict):
        raise UnsupportedError(
            f"holds a {type(value).__name__}, expected a state dict of tensors", where=where
        )
    tensors: dict[str, TensorReference] = {}
    others: list[str] = []
    for name, tensor in value.items():
        if isinstance(name, str) and isinstance(tensor, TensorReference):
            tensors[name] = tensor
        elif tensor is not None:
            others.append(f"{str(name)[:100]} ({type(tensor).__name__})")
    if tensors and others:
        what = f"holds {len(others)} entries that are not tensors, such as {others[0]}"
        raise UnsupportedError(what, where=where, advice="Expected a state dict of tensors alone.")
    return tensors


def quantised(tensors: Mapping[str, LazyTensor]) -> str | None:
    """What is quantised among `tensors`: they are codes, not weights. None if nothing is.

    The names are those that bitsandbytes (`functional.py`, QuantState; SCB), GPTQ and AWQ save.
    """
    marks = [n for n in tensors if _QUANTISED.search(n)]
    codes = {n for n, t in tensors.items() if n.endswith(".weight") and not t.dtype.is_float}
    modules = codes | {_QUANTISED.split(n)[0].removesuffix(".weight") + ".weight" for n in marks}
    if not modules:
        return None
    others = f" and {len(modules) - 1:,} more" if len(modules) > 1 else ""
    return f"holds quantised weights such as '{min(modules)}'{others}"


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as `index` says."""
    values = read_json(index).get("weight_map")
    found = values.items() if isinstance(values, dict) else ()
    weight_map = {name: file for name, file in found if isinstance(file, str)}
    if weight_map != values:
        raise CorruptFileError("has no 'weight_map' of names to files", where=str(index))
    return weight_map


def open_shards(index: Path, open_shard: Callable[[str], Weights]) -> Weights:
    """The tensors of all the shards that `index` names, each opened by its name.

    Raises `CorruptFileError` with all that is wrong.
    """
    weight_map = _weight_map(index)
    by_shard: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        by_shard.setdefault(shard, []).append(tensor)
    if len(by_shard) > _MAX_SHARDS:
        raise CorruptFileError(
            f"names {len(by_shard):,} shards, expected at most {_MAX_SHARDS:,}", where=str(index)
        )
    tensors: dict[str, LazyTensor] = {}
    files: list[Fingerprint] = []
    faults: list[Fault] = []
    for shard, names in sorted(by_shard.items()):
        try:
            weights = open_shard(shard)
        except CorruptFileError as error:
            faults.extend(error.faults)
            continue
        files.extend(weights.files)
        missing = [name for name in names if name not in weights.tensors]
        extra = [name for name in weights.tensors if weight_map.get(name) != shard]
        if missing or extra:
            faults.append(
                Fault(
                    str(index.parent / shard),
                    f"its tensors are not those that {index.name} lists: "
                    f"{len(missing)} missing {missing[:3]}, {len(extra)} too many {extra[:3]}",
                    "The shards are of different models or versions; copy or download them again.",
                )
            )
        tensors.update(weights.tensors)
    raise_faults(CorruptFileError, faults)
    return Weights(tensors, tuple(files))
