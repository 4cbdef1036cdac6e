"""Where a model is published, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner2llava.options import PushOptions
from xtuner2llava.sources.json_file import Json


@dataclass(frozen=True, slots=True)
class Destination:
    """A model repository `owner/name`, or `name` of the user whose token it is.

    It is made if it does not exist, and only then is `private` asked. `revision` is a branch, which
    is made too; None is the default branch.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    commit_message: str | None = None

    @classmethod
    def of(cls, repo_id: str, options: PushOptions) -> Destination:
        return cls(repo_id, options.private, options.revision, options.commit_message)


@dataclass(frozen=True, slots=True)
class Pushed:
    """A finished publication: `commit` is the full id of the commit that has all `files`.

    `removed` are weight files of an earlier model that the commit took away; `nbytes` is the size
    of all files, of which only those were sent that the Hub did not have.
    """

    repo_id: str
    revision: str
    commit: str
    link: str
    files: tuple[str, ...]
    nbytes: int
    removed: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "repo_id": self.repo_id,
            "revision": self.revision,
            "commit": self.commit,
            "link": self.link,
            "files": list(self.files),
            "bytes": self.nbytes,
            "removed": list(self.removed),
            "notes": list(self.notes),
        }
