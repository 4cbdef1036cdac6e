"""What huggingface_hub raises becomes an error that says what to do; what is ours stays."""

from __future__ import annotations

import errno

import pytest

from xtuner2llava import CheckpointError, HubError
from xtuner2llava.hub.errors import hub_errors, is_transient, with_retries


def test_a_client_that_another_thread_closed_is_the_network() -> None:
    """huggingface_hub closes the one client of all threads where one of them cannot connect."""
    again = r"(?s)cannot be reached.*Run the same command again"
    with pytest.raises(HubError, match=again), hub_errors("ann/llava"):
        raise RuntimeError("Cannot send a request, as the client has been closed.")


@pytest.mark.parametrize(
    "words",
    ["Data processing error: CAS service error : IO Error: Timer expired", "Network error: x"],
)
def test_the_storage_of_the_hub_is_the_network_too(words: str) -> None:
    with pytest.raises(HubError, match="cannot be reached"), hub_errors("ann/llava"):
        raise RuntimeError(words)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError(words)

    with pytest.raises(RuntimeError):
        with_retries(fail, 2)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOTDIR, "Not a directory", "/cache/x"),
        PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
    ],
)
def test_a_cache_that_cannot_be_written_is_not_the_network(error: OSError) -> None:
    assert not is_transient(error)
    with pytest.raises(CheckpointError) as caught, hub_errors("ann/llava", CheckpointError):
        raise error
    (fault,) = caught.value.faults
    assert fault.what.startswith("cannot be read or stored here: ")
    assert f"({error.strerror})" in fault.what
    assert "reached" not in fault.what
    assert fault.advice.startswith("Set HF_HOME")


def test_offline_mode_is_said_and_not_tried_again() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(HubError, match=r"(?s)HF_HUB_OFFLINE is set") as caught, hub_errors("x"):
        raise OfflineModeIsEnabled("offline mode is enabled")
    assert "same command" not in str(caught.value)


def test_errors_of_our_own_are_not_taken_for_the_hub_s() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"), hub_errors("ann/llava"):
        raise RuntimeError("a fault of ours")
