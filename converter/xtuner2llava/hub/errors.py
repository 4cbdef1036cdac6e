"""What huggingface_hub and the HTTP library under it raise, as errors that say what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from xtuner2llava.errors import ConversionError, HubError, UsageError
from xtuner2llava.hub.counting import CallbackError
from xtuner2llava.sources.hub import TRANSIENT, http_status, is_worth_another_try, network_errors

_T = TypeVar("_T")
_TRIES = 3

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
_AGAIN = "Run the same command again: what the Hub has already is not sent again."
# 412 is a commit by somebody else in between.
CONFLICT = 412


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turns what a call to the Hub raises into a `HubError` (or `UsageError`) about `where`.

    What came from our own callbacks is raised as it was, even if huggingface_hub wrapped it.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        cause = innermost(error)
        if isinstance(cause, CallbackError):
            raise cause.error from None
        translated = _translated(cause, where)
        if translated is None:
            raise
        raise translated from error


def persistently(call: Callable[[], _T]) -> _T:
    """What `call` gives, asked a few times where the network or the server fails.

    huggingface_hub tries again itself, but not everywhere, and older versions in fewer places.
    """
    for attempt in range(1, _TRIES):
        try:
            return call()
        except Exception as error:
            if not is_worth_another_try(innermost(error)):
                raise
            time.sleep(attempt)
    return call()


def innermost(error: Exception) -> Exception:
    """What huggingface_hub wrapped as "Error while uploading" (`_upload_lfs_files`)."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _translated(error: Exception, where: str) -> ConversionError | None:
    """The error for a user; None for what is no failure of the Hub."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return UsageError(
            f"is no name for a repository ({_first_line(error)})",
            where=where,
            advice="Expected owner/name, of letters, digits, '-', '_' and '.'.",
        )
    if isinstance(error, GatedRepoError):
        what = "is gated: its owner grants access on its page"
        return HubError(what, where=where, advice="Ask for access there.")
    if isinstance(error, RevisionNotFoundError):
        return HubError("has no such revision", where=where, advice="Check the name.")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            "is no repository that this token can see",
            where=where,
            advice=f"Check the spelling of the owner. {LOG_IN}",
        )
    status = http_status(error)
    if status is not None:
        said = str(getattr(error, "server_message", None) or "") or _first_line(error)
        return HubError(
            f"the Hub answered {status}: {said[:500]}", where=where, advice=_advice(status)
        )
    if isinstance(error, ValueError) and "README.md" in str(error):
        return HubError(
            f"the Hub does not take the model card: {' '.join(str(error).split())[:500]}",
            where="README.md",
            advice="Mend the lines between the --- of README.md, or of the --card-template.",
        )
    if isinstance(error, network_errors()) or _is_of_a_closed_client(error):
        return HubError(
            f"the Hub cannot be reached ({type(error).__name__}: {_first_line(error)})",
            where=where,
            advice=_AGAIN,
        )
    # Malformed answers are ValueErrors there.
    if isinstance(error, ValueError):
        return HubError(f"failed ({_first_line(error)})", where=where, advice=_AGAIN)
    return None


def _is_of_a_closed_client(error: Exception) -> bool:
    """huggingface_hub closes the client of all threads where one of them cannot connect."""
    return isinstance(error, RuntimeError) and "client has been closed" in str(error)


def _advice(status: int) -> str:
    if status == 401:
        return f"The token is not valid. {LOG_IN}"
    if status == 403:
        return "The token may not write there: make one that may, or give an owner that is yours."
    if status == CONFLICT:
        return "Others commit to it at the same time. Run the same command again."
    if status in TRANSIENT:
        return _AGAIN
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
