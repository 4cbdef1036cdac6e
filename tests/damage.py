"""Ways to damage a converted folder, and to hide it from the checksums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


def copy_of(folder: Path, parent: Path) -> Path:
    """A copy under the same name, which says which class it is, in a new folder of `parent`."""
    place = parent / f"{len(list(parent.iterdir()))}"
    return Path(shutil.copytree(folder, place / folder.name))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Lets `change` work on the object in a file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def set_keys(path: Path, **values: Any) -> None:
    edit_json(path, lambda found: found.update(values))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Lets `change` work on the tensors of an unsharded folder."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def exchange(tensors: Tensors, one: str, other: str) -> None:
    assert tensors[one].shape == tensors[other].shape
    tensors[one], tensors[other] = tensors[other], tensors[one]


def flip_bit(path: Path, offset: int) -> None:
    """Flips the lowest bit of a byte; counted from the end where negative."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rewrite_header(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Lets `change` make another header of that of a safetensors file, its length is set."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def seal(folder: Path) -> None:
    """Writes the checksums of the files as they are into `conversion.json`: no traces left."""

    def digest(name: str) -> str:
        return blake3((folder / name).read_bytes()).hexdigest()

    def change(record: dict[str, Any]) -> None:
        record["files"] = {
            n: {"blake3": digest(n)} for n in record["files"] if (folder / n).is_file()
        }
        shards = [s["file"] for s in record["shards"] if (folder / s["file"]).is_file()]
        record["shards"] = [
            {"file": n, "bytes": (folder / n).stat().st_size, "blake3": digest(n)} for n in shards
        ]

    edit_json(folder / "conversion.json", change)


def results(verification: Any) -> Mapping[str, str]:
    """What failed, with its detail."""
    return {check.name: check.detail for check in verification.checks if check.result == "FAILED"}
