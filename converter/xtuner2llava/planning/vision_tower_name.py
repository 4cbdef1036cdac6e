"""What to write as `mm_vision_tower`, the name under which LLaVA looks for CLIP's config.

LLaVA and LLaVA-NeXT fetch the tower's config and image processor by this name. Both builders take
an existing path, a name that starts with `openai` or `laion`, or one with `ShareGPT4V` in it, and
raise `ValueError: Unknown vision tower` for others (`llava/model/multimodal_encoder/builder.py` of
haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT; what NeXT takes besides are not CLIP towers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from xtuner2llava.errors import UsageError
from xtuner2llava.planning.published_towers import PUBLISHED, Difference
from xtuner2llava.storage.json_file import Json

KEY = "mm_vision_tower"
_ADVICE = (
    "Give --vision-tower-name ID, a Hub id that starts with openai or laion and holds this config "
    "and image processor, or a path that exists where the model will be used; --format hf needs no "
    "name."
)
# The owners under whose names the builders look on the Hub; any other `owner/name` is a path there.
_HUB_ID = re.compile(r"(openai|laion|Lin-Chen(?=/ShareGPT4V))/[\w.-]+", re.ASCII)
_SHOWN = 4  # differences in a message


@dataclass(frozen=True, slots=True)
class VisionTowerName:
    """The name to write, and a note on it for the user, if one is needed."""

    name: str
    note: str | None = None


def vision_tower_name(
    given: str | None,
    recorded: str | None,
    tower: Mapping[str, Json],
    processor: Mapping[str, Json],
    *,
    writes_tower: bool = True,
) -> VisionTowerName:
    """The name for a tower with the config `tower` and the image processor `processor`.

    `given` is what the user names; `recorded` is what the XTuner config names, or the Hub
    repository that the tower was read from. Without `writes_tower`, LLaVA takes the weights too by
    that name.
    Raises `UsageError` where LLaVA would silently compute something else with the name, and where
    only an absolute path is known, which must not be published.
    """
    if given is not None:
        return _given(given, tower, processor)
    if recorded is not None and recorded in PUBLISHED:
        differences = PUBLISHED[recorded].differences(tower, processor)
        if differences:
            raise _unfit(f"the tower is recorded as '{recorded}'", differences)
        return VisionTowerName(recorded)
    if recorded is not None and _HUB_ID.fullmatch(recorded) and not Path(recorded).exists():
        return VisionTowerName(recorded)
    local = recorded is None or _is_absolute(recorded)
    what = "no name is recorded" if recorded is None else "a path is recorded"
    if not local:
        what = f"the tower is known here as '{recorded}'"
    agreeing = well_known(tower, processor)
    if agreeing is not None and writes_tower:
        return VisionTowerName(
            agreeing,
            f"{KEY} is '{agreeing}': its config and image processor, which is all that LLaVA takes "
            f"from there, are this tower's; {what}.",
        )
    if recorded is not None and not local:
        return VisionTowerName(recorded, f"{_unknown(recorded)}{_nearest(tower, processor)}")
    raise UsageError(
        ("the vision tower is known only by a path of this machine, which must not be published")
        if recorded is not None
        else "nothing says what the vision tower is called",
        where=KEY,
        advice=f"{_nearest(tower, processor).strip()} {_ADVICE}".strip(),
    )


def well_known(tower: Mapping[str, Json], processor: Mapping[str, Json]) -> str | None:
    """The published tower from which LLaVA would load exactly this config and processor."""
    fits = (one.name for one in PUBLISHED.values() if not one.differences(tower, processor))
    return next(fits, None)


def is_known_to_llava(name: str) -> bool:
    """Whether both builders take the name wherever they run, and it can be a repository."""
    return _HUB_ID.fullmatch(name) is not None or "ShareGPT4V" in name


def _given(name: str, tower: Mapping[str, Json], processor: Mapping[str, Json]) -> VisionTowerName:
    """The user's name, unless it is known to make LLaVA compute something else silently."""
    if _is_absolute(name):
        raise UsageError(
            f"'{name}' is a path of one machine, which must not be published",
            where="--vision-tower-name",
            advice=_ADVICE,
        )
    name = name.rstrip("/")  # The Hub has no such names.
    if name not in PUBLISHED:
        return VisionTowerName(name, None if is_known_to_llava(name) else _unknown(name))
    differences = PUBLISHED[name].differences(tower, processor)
    if not differences:
        return VisionTowerName(name)
    if not differences[0].is_of_shape:
        raise _unfit(f"--vision-tower-name is '{name}'", differences)
    return VisionTowerName(
        name,
        f"{KEY} is '{name}', as asked, and LLaVA cannot load this tower by it: "
        f"{_listed(differences)}.",
    )


def _unknown(name: str) -> str:
    return (
        f"{KEY} is '{name}'. LLaVA and LLaVA-NeXT find that only where it exists as a path: of "
        "names, they take those that start with openai or laion. --vision-tower-name gives another."
    )


def _unfit(what: str, differences: tuple[Difference, ...]) -> UsageError:
    return UsageError(
        f"{what}, but LLaVA would load another config or image processor from there: "
        f"{_listed(differences)}",
        where=KEY,
        advice=_ADVICE,
    )


def _nearest(tower: Mapping[str, Json], processor: Mapping[str, Json]) -> str:
    """Why a published tower of the same shapes is not taken; empty where there is none."""
    for one in PUBLISHED.values():
        differences = one.differences(tower, processor)
        if not differences:
            return f" '{one.name}' has this config; whether its weights are these is not known."
        if not differences[0].is_of_shape:
            return f" It is not '{one.name}', whose shapes it has: {_listed(differences)}."
    return ""


def _listed(differences: tuple[Difference, ...]) -> str:
    more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return ", ".join(map(str, differences[:_SHOWN])) + more


def _is_absolute(path: str) -> bool:
    return (
        PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).is_absolute()
        or path.startswith("~")
    )
