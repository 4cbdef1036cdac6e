"""Our API as a user of the loopback server calls it, in the process of the tests."""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

import xtuner2llava
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

    def __init__(self, hub: HubServer, cwd: Path) -> None:
        self.hub, self.token, self._cwd = hub, hub.token, cwd

    def ask(
        self, function: str, *arguments: object, raise_at: str | None = None, **keywords: object
    ) -> Answer:
        """The answer to `function(*arguments, **keywords)`.

        The progress callback raises a `LookupError` at the stage `raise_at`.
        """
        token = cast("str | None", keywords.pop("token", self.token))
        progress: list[tuple[str, int, int]] = []

        def on_progress(stage: str, done: int, total: int) -> None:
            progress.append((stage, done, total))
            if stage == raise_at:
                raise LookupError("raised by the callback")

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", token or "")
            patch.chdir(self._cwd)
            try:
                result = getattr(xtuner2llava, function)(
                    *map(str, arguments), **keywords, on_progress=on_progress
                )
            except xtuner2llava.ConversionError as error:
                return Answer(None, type(error).__name__, str(error), progress)
            except (Exception, SystemExit) as error:
                return Answer(None, type(error).__name__, traceback.format_exc(), progress)
        return Answer(json.loads(json.dumps(result.to_dict())), None, "", progress)

    def call(self, function: str, *arguments: object, **keywords: object) -> dict[str, Any]:
        """The result of a call that must go well."""
        answer = self.ask(function, *arguments, **keywords)
        assert answer.error is None, f"{answer.error}: {answer.text}"
        return cast("dict[str, Any]", answer.result)
