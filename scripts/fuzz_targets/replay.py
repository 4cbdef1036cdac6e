"""Runs targets on kept inputs, and on mutations of them, without atheris.

    python -m fuzz_targets.replay CORPUS MUTATIONS [SEED]

CORPUS has a folder for each target. Prints a JSON object: for each target how many inputs there
were, and how many were accepted. Whatever is not a `ConversionError` ends it with a traceback, and
what `guard` forbids with its exit status.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"

from fuzz_targets.guard import forbid_execution
from fuzz_targets.targets import TARGETS, attack


def main() -> None:
    corpus, count = Path(sys.argv[1]), int(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with tempfile.TemporaryDirectory(prefix="fuzz-replay-") as name:
        work = Path(name)
        seeds = {name: list(target.seeds()) for name, target in TARGETS.items()}
        for name, target in TARGETS.items():
            for data in seeds[name]:  # Imports what it needs before that is forbidden.
                attack(target, data, work / "input")
        forbid_execution(work)
        result = {}
        for name, target in TARGETS.items():
            kept = [path.read_bytes() for path in sorted((corpus / name).glob("*"))]
            random = Random(seed + zlib.crc32(name.encode()))  # noqa: S311
            made = []
            for _ in range(count):
                data = random.choice(seeds[name] + kept)
                for _ in range(random.randrange(1, 5)):
                    data = target.mutate(data, random)
                made.append(data)
            inputs = [*seeds[name], *kept, *made]
            accepted = 0
            for data in inputs:
                accepted += run(name, data, work)
            result[name] = {"kept": len(kept), "inputs": len(inputs), "accepted": accepted}
    print(json.dumps(result))


def run(name: str, data: bytes, work: Path) -> bool:
    try:
        return attack(TARGETS[name], data, work / "input")
    except Exception:
        print(f"{name}: {data!r:.2000}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
