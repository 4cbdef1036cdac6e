"""The other end of `Client`: a request a line on standard input, an answer a line on output."""

from __future__ import annotations

import json
import os
import sys
import traceback

import xtuner2llava


def answer(request):
    progress = []

    def on_progress(*values):
        progress.append(values)
        if values[0] == request["raise_at"]:
            raise LookupError("raised by the callback")

    os.environ["HF_TOKEN"] = request["token"] or ""
    try:
        result = getattr(xtuner2llava, request["function"])(
            *request["arguments"],
            **request["keywords"],
            on_progress=on_progress,
        )
    except xtuner2llava.ConversionError as error:
        return {"result": None, "error": type(error).__name__, "text": str(error)}, progress
    except (Exception, SystemExit) as error:
        # No other error is for users. The test is told all of it, and this process lives on.
        text = traceback.format_exc()
        return {"result": None, "error": type(error).__name__, "text": text}, progress
    return {"result": result.to_dict(), "error": None, "text": ""}, progress


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print shall not be taken for answers.
    for line in sys.stdin:
        found, progress = answer(json.loads(line))
        print(json.dumps({**found, "progress": progress}), file=answers, flush=True)


if __name__ == "__main__":
    main()
