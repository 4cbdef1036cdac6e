"""A Dask cluster as an executor; Dask is an extra, imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

from xtuner2llava.errors import UsageError

_SECONDS = "10s"


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """The workers of the scheduler at `address`, such as "tcp://scheduler:8786".

    A shard whose worker dies is written by another one: the scheduler tries again. Raises
    `UsageError` if Dask is not installed, or no scheduler answers there.
    """
    try:
        from distributed import Client  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UsageError(
            f"Dask is not installed ({error})",
            where="--dask",
            advice="Install it: pip install distributed",
        ) from None
    try:
        client: Any = Client(address, timeout=_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call,unused-ignore]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no scheduler answers at {address} ({str(error).strip() or type(error).__name__})",
            where="--dask",
            advice="Give the address that `dask scheduler` shows, such as tcp://host:8786.",
        ) from error
    with client:
        executor: Executor = client.get_executor(pure=False)
        yield executor
