"""What the server can be told to do wrong."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Once `times`, a request whose "METHOD path" matches `pattern` goes wrong.

    With `status`, that is the answer. With `drop`, the connection ends: "before" anything is done,
    "inside" the body that is being sent or received, or "after" all is done and before the answer
    is sent. With `hold`, the server waits inside the body until `release` is set, and sets `held`.
    With `meanwhile`, the server calls that before it does what is asked.
    `skip` lets as many matching requests pass before.
    """

    pattern: str
    status: int | None = None
    drop: str | None = None
    hold: bool = False
    meanwhile: Callable[[], None] | None = None
    times: int = 1
    skip: int = 0
    body: str = '{"error": "made to fail"}'
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def takes(self, request: str) -> bool:
        """Whether it is this one's turn; counts it."""
        if self.times < 1 or re.search(self.pattern, request) is None:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True
