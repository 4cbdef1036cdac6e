"""The checksum of a shard, and what is not finite in it, from one pass over the written file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from xtuner2llava.writing.disk import BLOCK_BYTES, read_all
from xtuner2llava.writing.nonfinite import NonFinite, count_nonfinite
from xtuner2llava.writing.shards import Shard


@dataclass(frozen=True, slots=True)
class Checksum:
    """`sha256` in hexadecimal digits, and the tensors that hold NaN or infinity, in file order."""

    sha256: str
    nonfinite: tuple[NonFinite, ...]


def checksum(descriptor: int, shard: Shard, wait: Callable[[int], None]) -> Checksum:
    """Reads the whole shard once, from the page cache where it was just written.

    `wait(n)` returns when the first n bytes of the file are there, so this can run while another
    thread still writes. Raises `OSError`, and what `wait` raises.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    found = []

    def blocks(start: int, length: int) -> Iterator[memoryview]:
        for offset in range(start, start + length, BLOCK_BYTES):
            view = buffer[: min(BLOCK_BYTES, start + length - offset)]
            wait(offset + len(view))
            read_all(descriptor, view, offset)
            digest.update(view)
            yield view

    for _ in blocks(0, len(shard.header)):
        pass
    for entry in shard.entries:
        nan = inf = 0
        for view in blocks(entry.offset, entry.tensor.nbytes):
            counts = count_nonfinite(view, entry.tensor.dtype.code)
            nan, inf = nan + counts[0], inf + counts[1]
        if nan or inf:
            found.append(NonFinite(entry.name, nan, inf))
    return Checksum(digest.hexdigest(), tuple(found))
