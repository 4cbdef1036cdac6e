"""Converts with a Dask cluster of two processes; prints what came of it as JSON.

    python run_dask.py CHECKPOINT LLM VISION FOLDER

In a process of its own: functions of a `__main__` are sent to workers by value, and what Dask
leaves behind does not meet other tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

OPTIONS = {"vision_tower_name": "openai/x", "max_shard_size": "100KB", "dtype": "float32"}


def die_once(marker: str, function: Any, *arguments: Any) -> Any:
    """`function`, but the first worker that comes here kills itself when half of it is done."""
    import os
    import signal

    from xtuner2llava.writing import verify

    write_all = verify.write_all
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return function(*arguments)

    def kill(descriptor: int, data: memoryview, offset: int) -> None:
        if offset:
            write_all(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        write_all(descriptor, data, offset)

    verify.write_all = kill
    return function(*arguments)


class DyingOnce(Executor):
    """Hands over to `executor`; one of its workers dies in the middle of a shard."""

    def __init__(self, executor: Executor, marker: Path) -> None:
        self._executor, self._marker = executor, marker

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        return self._executor.submit(die_once, str(self._marker), function, *arguments)


def main(checkpoint: str, llm: str, vision: str, folder: Path) -> None:
    from xtuner2llava import convert

    bases = {"llm": llm, "vision": vision}
    command = [sys.executable, "-m", "xtuner2llava", "convert", checkpoint, folder / "command",
               "--llm", llm, "--vision", vision, "--vision-tower-name", "openai/x",
               "--max-shard-size", "100KB", "--dtype", "float32", "--json"]  # fmt: skip
    convert(checkpoint, folder / "local", **bases, **OPTIONS)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        before = set(client.run(os.getpid).values())
        executor = DyingOnce(client.get_executor(pure=False), folder / "marker")
        convert(checkpoint, folder / "killed", executor=executor, **bases, **OPTIONS)
        client.wait_for_workers(2, timeout=60)
        after = set(client.run(os.getpid).values())
        ran = subprocess.run(
            [*command, "--dask", cluster.scheduler_address], capture_output=True, text=True
        )
    print(json.dumps({"died": len(before - after), "status": ran.returncode, "told": ran.stderr}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
