"""What to write as `mm_vision_tower`, the name under which LLaVA looks for CLIP's config.

LLaVA and LLaVA-NeXT accept an existing path or a name that starts with `openai` or `laion`
(haotian-liu/LLaVA `llava/model/multimodal_encoder/builder.py`), and fetch the tower's config and
image processor from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from xtuner2llava.errors import UsageError
from xtuner2llava.sources.json_file import Json

KEY = "mm_vision_tower"
# The CLIP towers that openai published: (hidden size, layers, patch, image size in pixels).
_WELL_KNOWN = {
    (1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
    (1024, 24, 14, 224): "openai/clip-vit-large-patch14",
    (768, 12, 16, 224): "openai/clip-vit-base-patch16",
    (768, 12, 32, 224): "openai/clip-vit-base-patch32",
}


@dataclass(frozen=True, slots=True)
class VisionTowerName:
    """The name to write, and what to tell the user about it, if anything."""

    name: str
    note: str | None = None


def vision_tower_name(
    given: str | None, recorded: str | None, tower: Mapping[str, Json]
) -> VisionTowerName:
    """The name for a tower with the config `tower`.

    `given` is the user's word and is taken as it is; `recorded` is what the XTuner config names.
    Raises `UsageError` where only an absolute path is known, which must not be published.
    """
    if given is not None:
        return VisionTowerName(given)
    if recorded is not None and _is_hub_name(recorded):
        return VisionTowerName(recorded)
    known = well_known(tower)
    if known is not None:
        where = "no name is recorded" if recorded is None else "a local path is recorded"
        return VisionTowerName(
            known,
            f"mm_vision_tower is '{known}', which has this tower's shape; {where}. If the tower "
            "needs another image processor, give --vision-tower-name.",
        )
    if recorded is not None and not _is_absolute(recorded):
        return VisionTowerName(
            recorded,
            f"mm_vision_tower is '{recorded}', as the XTuner config has it. LLaVA finds it only "
            "where that path exists; --vision-tower-name says another.",
        )
    raise UsageError(
        "the vision tower is known only by a path of this machine, which must not be published"
        if recorded is not None
        else "nothing says what the vision tower is called",
        where=KEY,
        advice="Give --vision-tower-name ID, a Hub id that starts with openai or laion, or a path "
        "that exists where the model will be used.",
    )


def well_known(tower: Mapping[str, Json]) -> str | None:
    """The published CLIP model with this shape, if there is one."""
    keys = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    shape = tuple(n for key in keys if isinstance(n := tower.get(key), int))
    return _WELL_KNOWN.get(shape) if len(shape) == 4 else None


def _is_absolute(path: str) -> bool:
    return (
        PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).is_absolute()
        or path.startswith("~")
    )


def _is_hub_name(name: str) -> bool:
    owner, slash, model = name.partition("/")
    plain = bool(slash) and bool(model) and "/" not in model and owner not in ("", ".", "..", "~")
    return plain and not Path(name).exists()
