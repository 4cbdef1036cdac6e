"""The other end of `Client`: a request a line on standard input, an answer a line on output."""

from __future__ import annotations

import json
import os
import sys

import xtuner2llava


def answer(request):
    progress = []
    os.environ["HF_TOKEN"] = request["token"] or ""
    try:
        result = getattr(xtuner2llava, request["function"])(
            *request["arguments"],
            **request["keywords"],
            on_progress=lambda *values: progress.append(values),
        )
    except xtuner2llava.ConversionError as error:
        return {"result": None, "error": type(error).__name__, "text": str(error)}, progress
    return {"result": result.to_dict(), "error": None, "text": ""}, progress


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print shall not be taken for answers.
    for line in sys.stdin:
        found, progress = answer(json.loads(line))
        print(json.dumps({**found, "progress": progress}), file=answers, flush=True)


if __name__ == "__main__":
    main()
