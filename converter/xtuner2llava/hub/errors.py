"""What huggingface_hub and the HTTP library under it raise, as errors that say what to do."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeGuard, TypeVar

from xtuner2llava.errors import CheckpointError, ConversionError, HubError, UsageError

_T = TypeVar("_T")

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
_READ = "log in with `hf auth login` or set HF_TOKEN."
_AGAIN = "Run the same command again: what the Hub has already is not sent again."
_FORBIDDEN = "The token may not write there: make one that may, or give an owner that is yours."
# 412: another commit came in between.
_CONFLICT = 412
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# What is raised as RuntimeError: by httpx, whose client of all threads is closed where one of them
# cannot connect; and by hf_xet, of requests to its storage (huggingface/xet-core#394, #444).
_OF_NETWORK = ("client has been closed", "Data processing error", "Network error")


@contextmanager
def hub_errors(where: str, kind: type[ConversionError] = HubError) -> Iterator[None]:
    """Turns what a call to the Hub raises into an error about `where`.

    That is a `HubError` (`UsageError` for a name that no repository can have), or `kind`: for calls
    that only read, `CheckpointError`. What is not a failure of the Hub is raised as it was.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        from huggingface_hub.errors import HFValidationError

        cause = root_cause(error)
        described = _describe(cause, reading=kind is not HubError)
        if described is None:
            raise
        invalid = isinstance(cause, HFValidationError) and kind is HubError
        what, advice = described
        raise (UsageError if invalid else kind)(what, where=where, advice=advice) from error


@contextmanager
def not_here(reference: str) -> Iterator[None]:
    """Has what is wrong with `reference` on the Hub say that it is no folder here either."""
    try:
        yield
    except CheckpointError as error:
        faults = [
            replace(fault, what=f"is not a folder here, and {fault.what}")
            if fault.where == reference
            else fault
            for fault in error.faults
        ]
        raise type(error).from_faults(faults) from error


def require_token() -> None:
    """Raises `HubError` if there is nothing to log in to the Hub with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError("needs a token, and there is none", where="the Hub", advice=_LOG_IN)


def with_retries(call: Callable[[], _T], tries: int = 3, *, conflicts: bool = False) -> _T:
    """The result of `call`, which is made `tries` times where the network or the server fails.

    With `conflicts`, also where another commit came in between. huggingface_hub tries again itself,
    but not everywhere, and older versions in fewer places.
    """
    for attempt in range(1, tries):
        try:
            return call()
        except Exception as error:
            cause = root_cause(error)
            conflict = conflicts and http_status(cause) == _CONFLICT
            if not conflict and not is_transient(cause):
                raise
            time.sleep(0 if conflict else attempt)
    return call()


def root_cause(error: Exception) -> Exception:
    """What huggingface_hub wrapped as "Error while uploading" (`_upload_lfs_files`)."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def http_status(error: BaseException) -> int | None:
    """The status that the Hub answered with; None if `error` is not about an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    response = error.response if isinstance(error, HfHubHTTPError) else None
    return int(getattr(response, "status_code", 0)) or None


def is_transient(error: BaseException) -> bool:
    """Whether there was no answer, or one that asks to come again."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    final = (FileNotFoundError, PermissionError, OfflineModeIsEnabled)
    if isinstance(error, final) or _is_of_disk(error):
        return False
    status = http_status(error)
    return _is_of_network(error) if status is None else status in _TRANSIENT


def _is_of_disk(error: BaseException) -> TypeGuard[OSError]:
    """Whether a file here failed, such as one of the cache on a disk that is full."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_DISK)


def _is_of_network(error: BaseException) -> bool:
    """The HTTP library is requests, httpx or httpx2, by the version of huggingface_hub, whose own
    error has that library's as its base."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _OF_NETWORK)
    return isinstance(error, (OSError, *HfHubHTTPError.__bases__))


def _describe(error: Exception, *, reading: bool) -> tuple[str, str] | None:
    """What happened and what to do; None for what is not a failure of the Hub."""
    from huggingface_hub import errors

    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    again = "Run the same command again." if reading else _AGAIN
    match error:
        case errors.HFValidationError():
            what = f"is not a name for a repository ({first_line})"
            return what, "Expected owner/name, of letters, digits, '-', '_' and '.'."
        case errors.GatedRepoError():
            log_in = f", then {_READ}" if reading else "."
            return "is gated: its owner grants access on its page", f"Ask for access there{log_in}"
        case errors.RevisionNotFoundError():
            return "has no such revision", "Check the name."
        case errors.RepositoryNotFoundError():
            spelling = f"; for a private one, {_READ}" if reading else f" of the owner. {_LOG_IN}"
            what = "is not a repository on the Hub that this token can see"
            return what, f"Check the spelling{spelling}"
        case errors.OfflineModeIsEnabled():
            return "cannot be asked: HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE."
        case errors.LocalEntryNotFoundError():
            what = "is not in the local cache, and the Hub cannot be reached"
            return what, "Download it where there is a network, and give its folder."
    if _is_of_disk(error):
        what = f"cannot be read or stored here: {error.filename or 'a file'} ({error.strerror})"
        return what, "Set HF_HOME to a folder that has space and may be written." if reading else ""
    status = http_status(error)
    if status is not None:
        server = str(getattr(error, "server_message", None) or "") or first_line
        advice = {_CONFLICT: f"Others commit to it at the same time. {again}"}
        advice |= dict.fromkeys(_TRANSIENT, again)
        advice[401] = f"The token is not valid{f': {_READ}' if reading else f'. {_LOG_IN}'}"
        advice[403] = "" if reading else _FORBIDDEN
        return f"the Hub answered {status}: {server[:500]}", advice.get(status, "")
    if isinstance(error, ValueError) and "README.md" in str(error):
        what = f"the Hub does not take the model card: {' '.join(str(error).split())[:500]}"
        return what, "Fix the lines between the --- of README.md, or of the --card-template."
    if _is_of_network(error):
        return f"the Hub cannot be reached ({type(error).__name__}: {first_line})", again
    # Malformed answers are ValueErrors there.
    return (f"failed ({first_line})", again) if isinstance(error, ValueError) else None
