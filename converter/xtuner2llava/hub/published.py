"""A published model as a folder: all of it but the data of its tensors."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from xtuner2llava.errors import CheckpointError, OutputError
from xtuner2llava.hub.download import list_files, split_reference
from xtuner2llava.hub.errors import hub_errors, with_retries
from xtuner2llava.hub.stream import RemoteFile
from xtuner2llava.storage.safetensors_file import MAX_HEADER_BYTES, START_BYTES

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
# The largest small file is a tokenizer of some 30 MB.
_MAX_SMALL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class PublishedCopy:
    """The folder `path` has what the repository has at `commit`, with the same names and sizes.

    Of weight files and of what is larger than small files are, all bytes past the header are holes.
    `sha256` are the checksums that the Hub states, of large files only.
    """

    path: Path
    commit: str
    sha256: Mapping[str, str]


@contextmanager
def published_copy(reference: str) -> Iterator[PublishedCopy]:
    """What `owner/name` or `owner/name@revision` has at top level, while the context lasts.

    Small files are downloaded; of weight files, the header is read by HTTP range. Raises
    `CheckpointError` where the Hub does not give them.
    """
    repo, revision = split_reference(reference)
    with hub_errors(reference, CheckpointError):
        from huggingface_hub import HfApi, snapshot_download

        info = with_retries(lambda: HfApi().model_info(repo, revision=revision))
        commit = str(info.sha)
        # Names come from the server: only those of files in this folder count.
        files = {name: e for name, e in list_files(repo, commit).items() if _is_plain(name)}
        small = [name for name, entry in files.items()
                 if not name.endswith(_WEIGHTS) and entry.size <= _MAX_SMALL_BYTES]  # fmt: skip
        patterns = [glob.escape(name) for name in small]
        snapshot = Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))
    with TemporaryDirectory(prefix="xtuner2llava-") as above:
        folder = Path(above, repo.rpartition("/")[2])
        try:
            folder.mkdir()
            for name in small:
                shutil.copyfile(snapshot / name, folder / name)
            for name in files.keys() - {*small}:
                _write_sparse(folder / name, f"{repo}@{commit}/{name}", files[name].size)
        except OSError as error:
            what = f"cannot hold what {reference} has ({error.strerror or error})"
            raise OutputError(what, where=above, advice="Set TMPDIR to a larger one.") from error
        stated = {name: entry.lfs.sha256 for name, entry in files.items() if entry.lfs is not None}
        yield PublishedCopy(folder, commit, stated)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _write_sparse(path: Path, remote: str, size: int) -> None:
    """A file of `size` bytes that has the header of the safetensors file `remote`, if it is one."""
    header = b""
    if path.suffix == ".safetensors":
        file = RemoteFile(remote, ahead=0)
        header = bytes(file.read(0, min(START_BYTES, size)))
        length = int.from_bytes(header, "little")
        # Anything else is reported by whoever reads the header.
        if 0 < length <= min(size - START_BYTES, MAX_HEADER_BYTES):
            header += file.read(START_BYTES, length)
    path.write_bytes(header)
    os.truncate(path, size)
