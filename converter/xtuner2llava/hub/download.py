"""Folders by Hub repo id: what is needed of them, from the cache or downloaded.

A reference is `owner/name`, `name`, or either with `@revision`. `snapshot_download` answers from
the local cache when the Hub cannot be reached, or when HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import CheckpointError
from xtuner2llava.hub.errors import hub_errors, is_transient, not_here, with_retries

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_SMALL = re.compile(
    r"[^/]+\.(json|tiktoken|jinja)|tokenizer\.model|merges\.txt|vocab\.txt|xtuner_config\.py"
)
_CARD = "README.md"  # with license and languages, which what is made of it inherits
_SAFETENSORS = re.compile(r"(adapter_)?model[^/]*\.safetensors")
_TORCH = re.compile(r"(pytorch_model|adapter_model)[^/]*\.bin")
_XTUNER_FOLDERS = (
    "", "projector", "visual_encoder", "visual_encoder_adapter", "llm_adapter", "llm",
)  # fmt: skip
# Endings of files, which no repository of a model has.
_FILES = tuple(
    ".pth .pt .bin .ckpt .safetensors .gguf .json .py .yaml .yml .txt .log .zip .tar .gz".split()
)
# Folders of mmengine's runs, and the names of checkpoints and of what XTuner makes of them.
_OUTPUT_FOLDERS = ("work_dir", "work_dirs")
_OUTPUT = re.compile(r"(iter|epoch)_\d+\w*")
_MAX_REF_BYTES = 256


def local_path(text: str) -> Path:
    """`text` as a path, a leading `~` replaced by the home folder where there is such a user.

    A folder of the Hub's cache, `models--owner--name`, is the snapshot in it. Raises
    `CheckpointError` where that could be any of several.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        return Path(text)
    if path.name == "snapshots":
        path = path.parent
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    main = path / "refs" / "main"
    names = sorted(entry.name for entry in (path / "snapshots").iterdir())
    if main.is_file():
        with main.open("rb") as file:
            commit = file.read(_MAX_REF_BYTES).decode("utf-8", "replace").strip()
        if commit in names:
            return path / "snapshots" / commit
        what = f"refs/main names the snapshot '{commit[:40]}', which is not there"
    elif len(names) == 1:
        return path / "snapshots" / names[0]
    else:
        what = f"a folder of the Hub's cache with {len(names)} snapshots and no refs/main"
    raise CheckpointError(
        what,
        where=text,
        advice=f"Give one of: {', '.join(f'snapshots/{name}' for name in names[:4]) or 'none'}",
    )


def is_reference(text: str) -> bool:
    """Whether `text` can be a repo id: nothing that exists here, and not a path that should.

    A path has a file's ending, a first component that is a folder here, or a name that mmengine or
    XTuner gives.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None or Path(text).exists() or text.lower().endswith(_FILES):
        return False
    parts = match["repo"].split("/")
    if len(parts) > 1 and Path(parts[0]).is_dir():
        return False
    if parts[0] in _OUTPUT_FOLDERS or _OUTPUT.fullmatch(parts[-1]):
        return False
    return not any(part.startswith((".", "-")) or ".." in part for part in parts)


def find_folder(reference: str) -> Path:
    """The folder at a path or repo id, with its small files. Raises `CheckpointError`."""
    folder = local_path(reference)
    if folder.is_dir():
        return folder
    if is_reference(reference):
        with not_here(reference):
            return fetch_model(reference, weights=False)
    raise CheckpointError("is not a folder here", where=reference)


def fetch_model(reference: str, *, weights: bool) -> Path:
    """The snapshot folder of a base model: its small files, and its weights if asked for.

    Only what lies at top level; `.bin` weights only where there are no safetensors.
    """
    return _fetch(reference, [""], [_CARD], weights=weights, always="config.json")


def fetch_checkpoint(reference: str) -> Path:
    """The snapshot folder of a repo that holds what `xtuner convert pth_to_hf` wrote.

    Of each part's folder, `.bin` weights are fetched only where it has no safetensors.
    """
    with not_here(reference):
        return _fetch(reference, _XTUNER_FOLDERS, [], weights=True, always="projector/config.json")


def split_reference(reference: str) -> tuple[str, str | None]:
    """The repository and the revision of `owner/name@revision`. Raises `CheckpointError`."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise CheckpointError("is not a Hub repo id", where=reference)
    return match["repo"], match["revision"]


def list_files(repo: str, revision: str, *, recursive: bool = False) -> dict[str, RepoFile]:
    """The files of a repository by path, with sizes and ids; by default those at top level."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    entries = with_retries(
        lambda: [*HfApi().list_repo_tree(repo, recursive=recursive, revision=revision)]
    )
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _fetch(
    reference: str, folders: Sequence[str], besides: Sequence[str], *, weights: bool, always: str
) -> Path:
    """The snapshot with those files of `folders` that are needed, and `besides`.

    Where the Hub cannot be asked, the snapshot that is in the cache and has at least `always`.
    """
    repo, revision = split_reference(reference)
    with hub_errors(reference, CheckpointError):
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            info = HfApi().model_info(repo, revision=revision)
        except Exception as error:
            if not isinstance(error, OfflineModeIsEnabled) and not is_transient(error):
                raise
            cached = snapshot_download(
                repo, revision=revision, allow_patterns=[always], local_files_only=True
            )
            return Path(cached)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        needed = [name for folder in folders for name in _needed(names, folder, weights=weights)]
        patterns = [glob.escape(name) for name in (*besides, *needed)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _needed(names: Sequence[str], home: str, *, weights: bool) -> list[str]:
    """Of the files `names` of a repository, those that are needed of the folder `home`."""
    prefix = f"{home}/" if home else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    needed = [name for name in inside if _SMALL.fullmatch(name)]
    if weights:
        safetensors = [name for name in inside if _SAFETENSORS.fullmatch(name)]
        needed += safetensors or [name for name in inside if _TORCH.fullmatch(name)]
    return [prefix + name for name in needed]
