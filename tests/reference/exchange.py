"""Wrong folders, to show that a check can fail."""

from __future__ import annotations

import shutil
from pathlib import Path

from reference.compose import read_tensors


def write_exchanged(
    folder: Path, wrong: Path, exchanged: tuple[str, str], prefix: str = "model.layers.0"
) -> Path:
    """A copy of the unsharded `folder` in which two tensors of layer 0 have each other's name."""
    from safetensors.torch import save_file

    shutil.copytree(folder, wrong)
    tensors = read_tensors(folder)
    one, other = (f"{prefix}.{name}" for name in exchanged)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    return wrong
