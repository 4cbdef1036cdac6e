"""An upload: files go to the Hub's storage one by one, and one commit makes them visible."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava import __version__
from xtuner2llava.errors import HubError, VerificationError
from xtuner2llava.hub.download import list_files
from xtuner2llava.hub.errors import hub_errors, require_token, with_retries
from xtuner2llava.metadata.front_matter import CARD_NAME, MARK, merged_card
from xtuner2llava.options import PushOptions
from xtuner2llava.storage.json_file import Json
from xtuner2llava.writing.writer import WrittenShard

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

_MAIN = "main"
_MESSAGE = "LLaVA model converted by xtuner2llava"
_TRIES = 5
# What the Hub takes as a plain file in a commit; larger ones it asks for beforehand.
_MAX_PLAIN_BYTES = 16 << 20
# What earlier conversions wrote: of two models in one folder, loaders take the wrong one.
_OLD_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


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
        values = asdict(self)
        nbytes = values.pop("nbytes")
        lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
        return {**values, "bytes": nbytes, **lists}


@contextmanager
def open_upload(repo_id: str, options: PushOptions) -> Iterator[Upload]:
    """An upload, during which huggingface_hub shows no bars of its own."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield Upload(repo_id, options)
    finally:
        if were_shown:
            enable_progress_bars()


class Upload:
    """Files on their way into the model repository `repo_id`: `owner/name`, or `name` of the user.

    It is made if it does not exist, and so is the branch; a public one is refused where the options
    ask for a private one. Nothing is visible there before `commit`. What was sent by an earlier
    attempt is not sent again: the Hub's storage knows files by their content. Raises `HubError`,
    and `UsageError` for a name that no repository can have.
    """

    def __init__(self, repo_id: str, options: PushOptions) -> None:
        from huggingface_hub import HfApi

        self._options = options
        self._branch = options.revision or _MAIN
        self._operations: dict[str, CommitOperationAdd] = {}
        self._notes: list[str] = []
        self._api = HfApi(library_name="xtuner2llava", library_version=__version__)
        with hub_errors(repo_id):
            require_token()
            made = with_retries(
                lambda: self._api.create_repo(repo_id, private=options.private, exist_ok=True)
            )
            self.repo_id = made.repo_id
            if options.private and not self._api.model_info(self.repo_id).private:
                raise HubError(
                    "is public, and --private is given",
                    where=self.repo_id,
                    advice="Make it private in its settings, or leave --private out.",
                )
            # A new branch is made with the commit; until then the default one stands for it.
            self._has_branch = self._head() is not None

    def check_card(self, text: str) -> None:
        """Raises `HubError` if the Hub would refuse this README.md, hours later."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        with hub_errors(CARD_NAME):
            # What `create_commit` asks first; ModelCard.validate does not always ask this Hub.
            answer = get_session().post(
                f"{self._api.endpoint}/api/validate-yaml",
                json={"content": text, "repoType": "model"},
                headers=build_hf_headers(),
            )
            if answer.status_code == 400:
                messages = [str(entry.get("message")) for entry in answer.json().get("errors", [])]
                raise ValueError(f"README.md: {'; '.join(messages)}")
            hf_raise_for_status(answer)

    def deliver(self, path: Path, shard: WrittenShard, advance: Callable[[int], None]) -> None:
        """Sends a shard as soon as it is written."""
        self.send(path, shard.filename)
        advance(shard.size)

    def send(self, path: Path, name: str) -> None:
        """Sends the file at `path`, which is not needed any more when this returns.

        The Hub says what it has; only the rest is read and sent. Several threads may send at once.
        """
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
        revision = self._branch if self._has_branch else None
        with hub_errors(f"{self.repo_id}: {name}"):
            with_retries(
                lambda: self._api.preupload_lfs_files(self.repo_id, [operation], revision=revision)
            )
        if operation.path_or_fileobj == b"":  # The Hub has it.
            self._operations[name] = operation
        elif operation.upload_info.size <= _MAX_PLAIN_BYTES:
            self._add(name, path.read_bytes())
        else:
            raise HubError(
                f"the Hub does not take {name} as a large file",
                where=self.repo_id,
                advice="Do its .gitattributes and .gitignore leave out *.safetensors?",
            )

    def _add(self, name: str, data: bytes) -> None:
        """Adds a small file to the commit."""
        from huggingface_hub import CommitOperationAdd

        self._operations[name] = CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)

    def commit(self, folder: Path, names: Iterable[str]) -> Pushed:
        """Makes all that was sent visible at once, with the small files `names` of `folder`.

        Weights of an earlier model go with the same commit. A README.md on the Hub that its owner
        wrote stays. Nothing is committed if all of it is there already. Raises `VerificationError`
        if the Hub then shows anything else.
        """
        for name in names:
            self._add(name, (folder / name).read_bytes())
        with hub_errors(self.repo_id):
            if not self._has_branch:
                self._api.create_branch(self.repo_id, branch=self._branch, exist_ok=True)
            commit, removed = with_retries(self._commit, _TRIES, conflicts=True)
            wrong = self._missing(list_files(self.repo_id, commit, recursive=True))
        if wrong:
            raise VerificationError(
                f"the Hub shows another content of {', '.join(wrong[:5])} at {commit}",
                where=self.repo_id,
                advice="Push again; if it stays so, check whether its .gitignore names them.",
            )
        page = f"{self._api.endpoint}/{self.repo_id}"
        return Pushed(
            repo_id=self.repo_id,
            revision=self._branch,
            commit=commit,
            link=page if self._options.revision is None else f"{page}/tree/{self._branch}",
            files=tuple(sorted(self._operations)),
            nbytes=sum(op.upload_info.size for op in self._operations.values()),
            removed=tuple(removed),
            notes=tuple(self._notes),
        )

    def _commit(self) -> tuple[str, list[str]]:
        """The commit that has everything, and what it removed."""
        from huggingface_hub import CommitOperationDelete

        head = self._head()
        there = list_files(self.repo_id, head, recursive=True) if head is not None else {}
        self._keep_card(there, head)
        old = [name for name in sorted(there) if _OLD_WEIGHTS.fullmatch(name)]
        stale = [name for name in old if name not in self._operations]
        missing = self._missing(there)
        if head is not None and not stale and not missing:
            return head, stale
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(self._operations[name] for name in missing),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]
        # This sends what is small and yet a large file, such as tokenizer.model. `parent_commit`
        # shows a change by others, or that the answer to an earlier try was lost.
        done = self._api.create_commit(
            self.repo_id,
            operations,
            commit_message=self._options.commit_message or _MESSAGE,
            revision=self._branch,
            parent_commit=head,
        )
        return done.oid, stale

    def _head(self) -> str | None:
        """The commit that the branch is at; None if there is no such branch."""
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            found = with_retries(lambda: self._api.model_info(self.repo_id, revision=self._branch))
        except RevisionNotFoundError:
            return None
        return found.sha

    def _missing(self, there: Mapping[str, RepoFile]) -> list[str]:
        """The files that are not `there` with the content that was sent."""
        return sorted(
            name
            for name, operation in self._operations.items()
            if name not in there or not _is_same(operation, there[name])
        )

    def _keep_card(self, there: Mapping[str, RepoFile], head: str | None) -> None:
        """Keeps the text of a card that its owner wrote on the Hub, and all metadata there."""
        ours = self._operations.get(CARD_NAME)
        if ours is None or CARD_NAME not in there or _is_same(ours, there[CARD_NAME]):
            return
        with ours.as_file() as file:
            text = file.read().decode()
        if MARK not in text:
            return
        path = self._api.hf_hub_download(self.repo_id, CARD_NAME, revision=head)
        theirs = Path(path).read_text(encoding="utf-8", errors="replace")
        merged = merged_card(text, theirs)
        if merged is not None:
            self._add(CARD_NAME, merged.encode("utf-8"))
            return
        del self._operations[CARD_NAME]
        self._notes.append("README.md on the Hub is its owner's own, and stays as it is.")


def _is_same(operation: CommitOperationAdd, found: RepoFile) -> bool:
    """Whether the Hub shows the content that is sent; it states git's id of small files."""
    if found.lfs is not None:
        return bool(found.lfs.sha256 == operation.upload_info.sha256.hex())
    with operation.as_file() as file:
        data = file.read()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return git.hexdigest() == found.blob_id
