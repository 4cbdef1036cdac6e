"""What huggingface_hub raises becomes an error that says what to do; what is ours stays."""

from __future__ import annotations

import pytest

from xtuner2llava import HubError
from xtuner2llava.hub.errors import hub_errors


def test_a_client_that_another_thread_closed_is_the_network() -> None:
    """huggingface_hub closes the one client of all threads where one of them cannot connect."""
    again = r"(?s)cannot be reached.*Run the same command again"
    with pytest.raises(HubError, match=again), hub_errors("ann/llava"):
        raise RuntimeError("Cannot send a request, as the client has been closed.")


def test_offline_mode_is_said_and_not_tried_again() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(HubError, match=r"(?s)HF_HUB_OFFLINE is set") as caught, hub_errors("x"):
        raise OfflineModeIsEnabled("offline mode is enabled")
    assert "same command" not in str(caught.value)


def test_errors_of_our_own_are_not_taken_for_the_hub_s() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"), hub_errors("ann/llava"):
        raise RuntimeError("a fault of ours")
