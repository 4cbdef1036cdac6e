"""Our API in another process, whose huggingface_hub talks to the loopback server.

huggingface_hub reads its settings when it is imported, so the process of the tests cannot change
its endpoint. One process serves many calls: importing takes longer than they do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from hub_server.server import HubServer


@dataclass(frozen=True)
class Answer:
    """What a call gave: its result as JSON, or the class and text of its error; and progress.

    The text of an error that is none of ours is its traceback.
    """

    result: dict[str, Any] | None
    error: str | None
    text: str
    progress: list[tuple[str, int, int]]


class Client:
    """Calls functions of xtuner2llava by name, with keywords; `token` None is an anonymous user."""

    def __init__(self, hub: HubServer, home: Path, cwd: Path, **environment: str) -> None:
        self.hub, self.token = hub, hub.token
        self._environment = {**os.environ, **hub.environment(home), **environment}
        self._cwd = cwd
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, Path(__file__).with_name("worker.py")],
            env=self._environment,
            cwd=self._cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def ask(
        self, function: str, *arguments: object, raise_at: str | None = None, **keywords: object
    ) -> Answer:
        """The answer to `function(*arguments, **keywords)`.

        The progress callback raises a `LookupError` at the stage `raise_at`.
        """
        token = keywords.pop("token", self.token)
        request = {
            "function": function,
            "arguments": [str(argument) for argument in arguments],
            "keywords": {k: str(v) if isinstance(v, Path) else v for k, v in keywords.items()},
            "token": token,
            "raise_at": raise_at,
        }
        pipes = self._process
        assert pipes.stdin is not None and pipes.stdout is not None
        print(json.dumps(request), file=pipes.stdin, flush=True)
        line = pipes.stdout.readline()
        if not line:
            pipes.communicate()
            self._process = self._start()  # Other tests share this client.
            raise AssertionError(f"the worker ended with {pipes.returncode} in {function}")
        answer = json.loads(line)
        return Answer(
            answer["result"],
            answer["error"],
            answer["text"],
            [tuple(p) for p in answer["progress"]],
        )

    def call(self, function: str, *arguments: object, **keywords: object) -> dict[str, Any]:
        """The result of a call that must go well."""
        answer = self.ask(function, *arguments, **keywords)
        assert answer.error is None, f"{answer.error}: {answer.text}"
        return cast("dict[str, Any]", answer.result)
