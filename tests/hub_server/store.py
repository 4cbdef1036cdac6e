"""Repositories, commits and large files, as a Hub has them."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The Hub gives every repository such a file; what it names goes to LFS.
GITATTRIBUTES = b"".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n".encode()
    for pattern in ("*.safetensors", "*.bin", "*.model", "*.pth")
)
_LARGE_BYTES = 10 << 20


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a commit; `lfs` says that a large file's pointer stands in git."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        if not self.lfs:
            return git_sha1(self.data)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        return git_sha1(f"{pointer}size {len(self.data)}\n".encode())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    """`commits` map an id to files; `branches` a name to the id it is at."""

    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Mapping[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    # Large files by sha256; those of no commit yet are there too.
    objects: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.put("main", {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit")

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def put(self, branch: str, files: Mapping[str, Blob], message: str) -> str:
        """A new commit with exactly `files`; its id."""
        listing = sorted((path, blob.oid) for path, blob in files.items())
        text = f"{self.name} {branch} {message} {len(self.commits)} {listing}"
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        self.messages.append(message)
        self.objects.update({b.sha256: b.data for b in files.values() if b.lfs})
        return commit

    def upload(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Adds `files`, large ones by the rules of .gitattributes."""
        blobs = {name: Blob(data, self.is_large(name, len(data))) for name, data in files.items()}
        return self.put(branch, {**self.files(branch), **blobs}, "upload")

    def resolve(self, revision: str) -> str | None:
        if revision in self.branches:
            return self.branches[revision]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> Mapping[str, Blob]:
        return self.commits[self.resolve(revision) or ""]

    def content(self, revision: str = "main") -> dict[str, bytes]:
        """All files but .gitattributes."""
        found = self.files(revision)
        return {name: blob.data for name, blob in found.items() if name != ".gitattributes"}

    def is_large(self, name: str, size: int) -> bool:
        attributes = GITATTRIBUTES
        if self.branches:
            attributes = self.files().get(".gitattributes", Blob(b"")).data
        patterns = [line.split()[0].decode() for line in attributes.splitlines() if line.strip()]
        return size >= _LARGE_BYTES or any(fnmatch.fnmatch(name, p) for p in patterns)

    def is_ignored(self, name: str) -> bool:
        ignore = self.files().get(".gitignore", Blob(b"")).data.decode().split()
        return any(fnmatch.fnmatch(name, pattern) for pattern in ignore)

    def commit(self, branch: str, lines: list[dict[str, Any]]) -> str:
        """Applies the lines of a commit; raises `KeyError` for a large file that nobody sent."""
        header = lines[0]["value"]
        files = dict(self.files(branch))
        import base64

        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.objects[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise ValueError(line["key"])
        return self.put(branch, files, header["summary"])


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder on disk by path, as `Repo.content` has them of a repository."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
