"""Names that decide what LLaVA loads: the folder's own, and `mm_vision_tower`."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

from xtuner2llava.mapping import Catalogue, model_name
from xtuner2llava.planning.vision_tower import is_known_to_llava
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.outcome import FAILED, OK, WARNING, Finding


def folder_name(out: ConvertedFolder) -> Finding | None:
    """Whether LLaVA and LLaVA-NeXT choose the right class by the folder's name."""
    if out.format != "llava":
        return None
    name = model_name(out.path.resolve())
    if reasons := other_class(out, name):
        # The model is right under any name.
        what = f"'{name}' {reasons}: LLaVA or LLaVA-NeXT loads another class"
        return WARNING, f"{what} than {out.architecture}; rename the folder"
    return OK, f"'{name}' is loaded as {out.architecture}"


def other_class(out: ConvertedFolder, name: str) -> str:
    """Why LLaVA loads the folder as another class if it is called `name`; empty if it does not."""
    classes = Catalogue.shipped().formats[out.format].classes
    chosen = classes.get(str(out.text.get("model_type")))
    return "" if chosen is None else chosen.folder_name.reasons(name)


def vision_tower(out: ConvertedFolder) -> Finding | None:
    """LLaVA fetches the tower's config and image processor by this name."""
    if out.format != "llava":
        return None
    value = out.config.get("mm_vision_tower")
    if not isinstance(value, str) or not value:
        return FAILED, f"is {value!r}"
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    if absolute or value.startswith("~"):
        return FAILED, f"'{value}' is a path of one machine"
    if is_known_to_llava(value):
        return OK, f"'{value}'"
    return WARNING, (
        f"LLaVA finds '{value}' only where that path exists: other names begin with openai or laion"
    )
