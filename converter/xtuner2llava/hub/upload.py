"""An upload: files go to the Hub's storage one by one, and one commit makes them visible."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from xtuner2llava.errors import HubError, VerificationError
from xtuner2llava.hub.counting import Progress, addition
from xtuner2llava.hub.destination import Destination, Pushed
from xtuner2llava.hub.errors import CONFLICT, LOG_IN, hub_errors, innermost, persistently
from xtuner2llava.model_card import (
    CARD_NAME,
    is_generated,
    with_extra_keys,
    with_front_matter_of,
)
from xtuner2llava.sources.hub import http_status, is_worth_another_try
from xtuner2llava.version import version

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

_MAIN = "main"
_TRIES = 5
# What the Hub takes as a plain file in a commit; larger ones it asks for beforehand.
_MAX_PLAIN_BYTES = 16 << 20
# What earlier conversions wrote: of two models in one folder, loaders take the wrong one.
_OLD_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True, slots=True)
class _Sent:
    """A file as the commit will have it; `sha256` and git's `blob_id` in hexadecimal digits."""

    size: int
    sha256: str
    blob_id: str | None

    @classmethod
    def of(cls, data: bytes) -> _Sent:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return cls(len(data), hashlib.sha256(data).hexdigest(), git.hexdigest())

    def is_same(self, found: RepoFile) -> bool:
        lfs = found.lfs
        if lfs is not None:
            return bool(lfs.sha256 == self.sha256)
        return found.size == self.size and self.blob_id in (None, found.blob_id)


class Upload:
    """Files on their way into the repository `destination`; `with` makes that if need be.

    Nothing is visible there before `commit`. What was sent by an earlier attempt is not sent again:
    the Hub's storage knows files by their content. Raises `HubError`, and `UsageError` for a name
    that no repository can have.
    """

    def __init__(self, destination: Destination) -> None:
        self.repo_id = destination.repo_id
        self._destination = destination
        self._branch = destination.revision or _MAIN
        self._operations: dict[str, CommitOperationAdd] = {}
        self._sent: dict[str, _Sent] = {}
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._bars_were_shown = False

    def __enter__(self) -> Upload:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            are_progress_bars_disabled,
            disable_progress_bars,
        )

        with hub_errors(self.repo_id):
            if get_token() is None:
                raise HubError("needs a token, and there is none", where="the Hub", advice=LOG_IN)
            self._api: HfApi = HfApi(library_name="xtuner2llava", library_version=version())
            made = persistently(
                lambda: self._api.create_repo(
                    self.repo_id, private=self._destination.private, exist_ok=True
                )
            )
            self.repo_id = made.repo_id
            # A new branch is made with the commit; until then the default one stands for it.
            self._has_branch = self._head() is not None
        self._bars_were_shown = not are_progress_bars_disabled()
        disable_progress_bars()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]

        if self._bars_were_shown:
            enable_progress_bars()

    @property
    def link(self) -> str:
        """The address of the model's page."""
        page = f"{self._api.endpoint}/{self.repo_id}"
        return page if self._destination.revision is None else f"{page}/tree/{self._branch}"

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
                found = answer.json().get("errors", [])
                messages = [str(entry.get("message")) for entry in found]
                raise ValueError(f"README.md: {'; '.join(messages)}")
            hf_raise_for_status(answer)

    def send(
        self,
        path: Path,
        name: str,
        *,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Sends the file at `path`, which is not needed any more when this returns.

        The Hub says what it has; only the rest is read and sent. `advance` is told the bytes.
        Several threads may send at once.
        """
        size = path.stat().st_size
        progress = Progress(size, advance)
        with hub_errors(f"{self.repo_id}: {name}"):
            operation = addition(path, name, progress)
            persistently(lambda: self._preupload(operation))
            sent = _Sent(size, operation.upload_info.sha256.hex(), None)
            if operation.path_or_fileobj != b"":  # Plain: the commit itself has the content.
                sent = self._take_in(operation, path)
            self._remember(name, operation, sent)
            progress.finish()

    def add(self, name: str, data: bytes) -> None:
        """Adds a small file to the commit."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
        self._remember(name, operation, _Sent.of(data))

    def commit(self) -> Pushed:
        """Makes all files visible at once, and checks that the Hub shows what was sent.

        Weights of an earlier model go with the same commit. A README.md on the Hub that somebody
        wrote stays. Nothing is committed if all of it is there already.
        """
        message = self._destination.commit_message or "LLaVA model converted by xtuner2llava"
        with hub_errors(self.repo_id):
            commit, removed = self._commit(message)
            there = self._files(commit)
        wrong = [n for n, s in self._sent.items() if n not in there or not s.is_same(there[n])]
        if wrong:
            raise VerificationError(
                f"the Hub shows another content of {', '.join(sorted(wrong)[:5])} at {commit}",
                where=self.repo_id,
                advice="Push again; if it stays so, look whether its .gitignore names them.",
            )
        return Pushed(
            repo_id=self.repo_id,
            revision=self._branch,
            commit=commit,
            link=self.link,
            files=tuple(sorted(self._sent)),
            nbytes=sum(sent.size for sent in self._sent.values()),
            removed=tuple(removed),
            notes=tuple(self._notes),
        )

    def _preupload(self, operation: CommitOperationAdd) -> None:
        revision = self._branch if self._has_branch else None
        self._api.preupload_lfs_files(self.repo_id, [operation], revision=revision)

    def _take_in(self, operation: CommitOperationAdd, path: Path) -> _Sent:
        """Reads a file that the Hub does not take as a large one, for the commit."""
        if path.stat().st_size > _MAX_PLAIN_BYTES:
            raise HubError(
                f"the Hub does not take {operation.path_in_repo} as a large file",
                where=self.repo_id,
                advice="Do its .gitattributes and .gitignore leave out *.safetensors?",
            )
        data = path.read_bytes()
        operation.path_or_fileobj = data
        return _Sent.of(data)

    def _remember(self, name: str, operation: CommitOperationAdd | None, sent: _Sent) -> None:
        with self._lock:
            self._sent[name] = sent
            if operation is not None:
                self._operations[name] = operation

    def _commit(self, message: str) -> tuple[str, list[str]]:
        """The commit that has everything, and what it removed."""
        from huggingface_hub import CommitOperationDelete

        if not self._has_branch:
            self._api.create_branch(self.repo_id, branch=self._branch, exist_ok=True)
        for attempt in range(1, _TRIES + 1):
            head = self._head()
            there = self._files(head) if head is not None else {}
            self._respect_card(there, head)
            stale = [n for n in sorted(there) if _OLD_WEIGHTS.fullmatch(n) and n not in self._sent]
            if head is not None and not stale and self._is_there(there):
                return head, stale
            gone = [n for n in self._sent if n not in self._operations and not self._has(there, n)]
            if gone:
                raise HubError(
                    f"{', '.join(gone[:5])} changed there meanwhile",
                    where=self.repo_id,
                    advice="Run the same command again.",
                )
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(op for name, op in self._operations.items() if not self._has(there, name)),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ]
            try:
                done = self._api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    revision=self._branch,
                    # So a change by others, or a lost answer to this very commit, is seen.
                    parent_commit=head,
                )
                return done.oid, stale
            except Exception as error:
                # It sends what is small and yet a large file, such as tokenizer.model.
                cause = innermost(error)
                conflict = http_status(cause) == CONFLICT
                if attempt == _TRIES or not (conflict or is_worth_another_try(cause)):
                    raise
                if not conflict:
                    time.sleep(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _head(self) -> str | None:
        """The commit that the branch is at; None if there is no such branch."""
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            found = persistently(lambda: self._api.model_info(self.repo_id, revision=self._branch))
        except RevisionNotFoundError:
            return None
        return found.sha

    def _files(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        def files() -> dict[str, RepoFile]:
            tree = self._api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

        return persistently(files)

    def _has(self, there: Mapping[str, RepoFile], name: str) -> bool:
        return name in there and self._sent[name].is_same(there[name])

    def _is_there(self, there: Mapping[str, RepoFile]) -> bool:
        return all(self._has(there, name) for name in self._sent)

    def _respect_card(self, there: Mapping[str, RepoFile], head: str | None) -> None:
        """Leaves the text that somebody wrote on the Hub as it is, and all metadata there."""
        ours = self._operations.get(CARD_NAME)
        if ours is None or CARD_NAME not in there or self._has(there, CARD_NAME):
            return
        with ours.as_file() as file:
            text = file.read().decode()
        if not is_generated(text):
            return
        path = self._api.hf_hub_download(self.repo_id, CARD_NAME, revision=head)
        theirs = Path(path).read_text(encoding="utf-8", errors="replace")
        merged = (
            with_extra_keys(theirs, text)
            if is_generated(theirs)
            else with_front_matter_of(theirs, text)
        )
        if merged is not None:
            self.add(CARD_NAME, merged.encode("utf-8"))
            return
        del self._operations[CARD_NAME], self._sent[CARD_NAME]
        self._notes.append("README.md on the Hub is somebody's own, and stays as it is.")
