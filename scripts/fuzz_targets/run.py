"""Runs one target under atheris: `python -m fuzz_targets.run TARGET SECONDS CORPUS [FOLDER...]`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

os.environ["HF_HUB_OFFLINE"] = "1"
with atheris.instrument_imports(include=["xtuner2llava"]):
    from fuzz_targets.targets import TARGETS, attack

from fuzz_targets.guard import forbid_execution

_SECONDS_AN_INPUT = 20
_MEGABYTES = 3000


def main() -> None:
    name, seconds, corpus = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    target = TARGETS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")  # noqa: S108 - files that need no disk
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=memory if memory.is_dir() else None))
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
        attack(target, seed, work / "input")  # Imports what it needs before that is forbidden.
    forbid_execution(work)

    def change(data: bytes, longest: int, seed: int) -> bytes:
        random = Random(seed)  # noqa: S311
        if random.random() < 0.2:
            return atheris.Mutate(data, longest)
        return target.mutate(data, random)[:longest]

    arguments = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-timeout={_SECONDS_AN_INPUT}",
        f"-rss_limit_mb={_MEGABYTES}",
        "-max_len=200000",
        "-len_control=0",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus.parent}/found-{name}-",
        str(corpus),
        *(folder for folder in sys.argv[4:] if Path(folder).is_dir()),
    ]
    atheris.Setup(arguments, lambda data: attack(target, data, work / "input") and None,
                  custom_mutator=change)  # fmt: skip
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
