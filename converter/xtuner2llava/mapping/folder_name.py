"""Names of output folders: LLaVA chooses the model class by the folder's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def model_name(path: Path) -> str:
    """What LLaVA calls a model in `path`: for `checkpoint-…`, the folder above counts too.

    `get_model_name_from_path` in `llava/mm_utils.py` of both. A snapshot in the Hub's cache is
    loaded by its repo id.
    """
    path = path.absolute()
    repo = path.parent.parent.name
    if path.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.rpartition("--")[2]
    if path.name.startswith("checkpoint-"):
        return f"{path.parent.name}_{path.name}"
    return path.name


@dataclass(frozen=True, slots=True)
class FolderName:
    """What a folder's name must contain to be loaded as a class, and what it must not.

    Compared in lower case, as haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT do in
    `llava/model/builder.py`.
    """

    needs: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()

    def missing(self, name: str) -> list[str]:
        return [word for word in self.needs if word not in name.lower()]

    def wrong(self, name: str) -> list[str]:
        return [word for word in self.avoid if word in name.lower()]

    def fits(self, name: str) -> bool:
        return not self.reasons(name)

    def reasons(self, name: str) -> str:
        """Why LLaVA loads another class by `name`: "lacks 'qwen'"; empty where it does not."""
        lacks = [f"lacks '{word}'" for word in self.missing(name)]
        return " and ".join([*lacks, *(f"contains '{word}'" for word in self.wrong(name))])

    def suggest(self, candidates: Sequence[str]) -> str:
        """The first of `candidates` that works, or the plainest name that does."""
        plain = "-".join(self.needs)
        return next((name for name in candidates if self.fits(name)), plain)
