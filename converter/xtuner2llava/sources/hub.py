"""Folders by Hub repo id: what is needed of them, from the cache or downloaded.

A reference is `owner/name`, `name`, or either with `@revision`. `snapshot_download` answers from
the local cache when the Hub cannot be reached, or when HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from xtuner2llava.errors import CheckpointError, ConversionError
from xtuner2llava.sources.small_file import read_small

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_SMALL = re.compile(
    r"[^/]+\.(json|tiktoken|jinja)|tokenizer\.model|merges\.txt|vocab\.txt|xtuner_config\.py"
)
_CARD = "README.md"  # says license and languages, which what is made of it inherits
_SAFETENSORS = re.compile(r"(adapter_)?model[^/]*\.safetensors")
_TORCH = re.compile(r"(pytorch_model|adapter_model)[^/]*\.bin")
_XTUNER_FOLDERS = (
    "",
    "projector",
    "visual_encoder",
    "visual_encoder_adapter",
    "llm_adapter",
    "llm",
)
# Endings of files, which no repository of a model has.
_FILES = tuple(
    ".pth .pt .bin .ckpt .safetensors .gguf .json .py .yaml .yml .txt .log .zip .tar .gz".split()
)
# What mmengine calls the folder of a run, and its checkpoints, and XTuner what it makes of them.
_OUTPUT_FOLDERS = ("work_dir", "work_dirs")
_OUTPUT = re.compile(r"(iter|epoch)_\d+\w*")
_MAX_REF_BYTES = 256
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


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
        commit = read_small(main, _MAX_REF_BYTES).decode("utf-8", "replace").strip()
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

    A path is told by a file's ending, by a first component that is a folder here, and by the names
    that mmengine and XTuner give.
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


def fetch_model(reference: str, *, weights: bool) -> Path:
    """The snapshot folder of a base model: its small files, and its weights if asked for.

    Only what lies at top level; `.bin` weights only where there are no safetensors.
    """
    return _fetch(
        reference, lambda names: [_CARD, *_needed(names, "", weights=weights)], "config.json"
    )


def fetch_checkpoint(reference: str) -> Path:
    """The snapshot folder of a repo that holds what `xtuner convert pth_to_hf` wrote.

    Of each part's folder, `.bin` weights are fetched only where it has no safetensors.
    """
    return _fetch(
        reference,
        lambda names: [
            name for home in _XTUNER_FOLDERS for name in _needed(names, home, weights=True)
        ],
        "projector/config.json",
    )


def _needed(names: Sequence[str], home: str, *, weights: bool) -> list[str]:
    """Of the files `names` of a repository, those that are needed of the folder `home`."""
    prefix = f"{home}/" if home else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    needed = [name for name in inside if _SMALL.fullmatch(name)]
    if weights:
        safetensors = [name for name in inside if _SAFETENSORS.fullmatch(name)]
        needed += safetensors or [name for name in inside if _TORCH.fullmatch(name)]
    return [prefix + name for name in needed]


def repository_at(reference: str, folder: Path) -> str:
    """The repository of `reference` at the commit whose files lie in `folder`, a snapshot."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise CheckpointError("is no Hub repo id", where=reference)
    return f"{match['repo']}@{folder.name}"


def network_errors() -> tuple[type[Exception], ...]:
    """The base classes of what the HTTP library raises: requests before huggingface_hub 1.0, then
    httpx and httpx2. It is loaded when it matters, and which one it is need not be known."""
    kinds: list[type[Exception]] = [OSError]
    for library, name in (
        ("requests", "RequestException"),
        ("httpx", "HTTPError"),
        ("httpx2", "HTTPError"),
    ):
        kind = getattr(sys.modules.get(library), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            kinds.append(kind)
    return tuple(kinds)


def http_status(error: BaseException) -> int | None:
    """The status that the Hub answered with; None if `error` is not about an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    return int(getattr(error.response, "status_code", 0)) or None


def is_worth_another_try(error: BaseException) -> bool:
    """Whether there was no answer, or one that says to come again."""
    if isinstance(error, (FileNotFoundError, PermissionError)) or _is_offline(error):
        return False
    status = http_status(error)
    return isinstance(error, network_errors()) if status is None else status in TRANSIENT


@contextmanager
def hub_faults(reference: str) -> Iterator[None]:
    """Turns what reading from the Hub raises into a `CheckpointError` about `reference`."""
    # Imported here: it takes a quarter of a second, and most conversions are of local files.
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        what = "is gated: its owner grants access on its page"
        advice = "Ask for access there, then log in with `hf auth login` or set HF_TOKEN."
        raise CheckpointError(what, where=reference, advice=advice) from error
    except RevisionNotFoundError as error:
        what = "has no such revision"
        raise CheckpointError(what, where=reference, advice="Check the name.") from error
    except RepositoryNotFoundError as error:
        what = "is no repository on the Hub that this token can see"
        advice = "Check the spelling; for a private one, log in with `hf auth login`."
        raise CheckpointError(what, where=reference, advice=advice) from error
    except HFValidationError as error:
        raise CheckpointError("is no Hub repo id", where=reference) from error
    except LocalEntryNotFoundError as error:
        what = "is neither in the local cache nor can the Hub be reached"
        advice = "Download it where there is a network, and give its folder."
        raise CheckpointError(what, where=reference, advice=advice) from error
    except HfHubHTTPError as error:
        said = str(getattr(error, "server_message", None) or "") or _first_line(error)
        status = http_status(error)
        advice = "The token is not valid: log in with `hf auth login`." if status == 401 else ""
        what = f"cannot be fetched: the Hub answered {status}: {said}"
        raise CheckpointError(what, where=reference, advice=advice) from error
    except ConversionError:
        raise
    except Exception as error:
        if not isinstance(error, (ValueError, *network_errors())):
            raise
        what = f"cannot be fetched from the Hub ({type(error).__name__}: {_first_line(error)})"
        raise CheckpointError(what, where=reference) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _fetch(reference: str, choose: Callable[[Sequence[str]], Sequence[str]], always: str) -> Path:
    """The snapshot with those files of the repository that `choose` takes.

    Where the Hub cannot be asked, the snapshot that is in the cache and has at least `always`.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise CheckpointError("is no Hub repo id", where=reference)
    with hub_faults(reference):
        from huggingface_hub import HfApi, snapshot_download

        try:
            info = HfApi().model_info(match["repo"], revision=match["revision"])
        except Exception as error:
            if not _is_offline(error) and not is_worth_another_try(error):
                raise
            return Path(
                snapshot_download(
                    match["repo"],
                    revision=match["revision"],
                    allow_patterns=[always],
                    local_files_only=True,
                )
            )
        names = [sibling.rfilename for sibling in info.siblings or ()]
        return Path(
            snapshot_download(
                match["repo"],
                revision=match["revision"],
                allow_patterns=[glob.escape(name) for name in choose(names)],
            )
        )


def _is_offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)
