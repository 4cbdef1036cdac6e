"""CRC-32 sums of what was read, held against those that the source files carry.

`torch.save` writes a CRC-32 for each entry of its zip, over the tensor's whole storage. A shard may
need only a part of one, and another shard the rest; so each writer returns sums of the ranges that
it read, and they are combined when the entry is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

from isal.isal_zlib import crc32, crc32_combine

from xtuner2llava.errors import VerificationError
from xtuner2llava.tensors.files import FileRange, SourceFile, ZipMember, crc32_of, require_member
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.writing.shards import Shard

_NAMES = 8


class RangeSum(NamedTuple):
    """The CRC-32 of `length` bytes at `offset` of the file `path`, in the entry at `member`."""

    path: str
    member: int
    offset: int
    length: int
    crc32: int


def sums_of(pieces: Iterable[FileRange], data: memoryview) -> list[RangeSum]:
    """The sums of `data`, the bytes of `pieces`, where these lie in entries that carry one."""
    sums: list[RangeSum] = []
    for piece in pieces:
        if piece.checkable is not None:
            found = crc32(data[: piece.length])
            place = piece.checkable.offset, piece.offset
            append_sum(sums, RangeSum(_path(piece.file), *place, piece.length, found))
        data = data[piece.length :]
    return sums


def append_sum(sums: list[RangeSum], found: RangeSum) -> None:
    """Appends `found`, or makes one sum of it and the last where it lies behind that."""
    last = sums[-1] if sums else None
    if last is not None and last[:2] == found[:2] and last.offset + last.length == found.offset:
        crc = crc32_combine(last.crc32, found.crc32, found.length)
        sums[-1] = last._replace(length=last.length + found.length, crc32=crc)
    else:
        sums.append(found)


@cache
def _path(file: SourceFile) -> str:
    return str(file.path.absolute())


class SourceSums:
    """Checks each entry of a source file from which something goes into `shards`, once."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._members = {
            (_path(piece.file), member.offset): (piece.file, member)
            for shard in shards
            for piece in _extents(shard)
            if (member := piece.checkable) is not None
        }
        self._sums: dict[tuple[str, int], list[RangeSum]] = {}
        self._lock = threading.Lock()
        # One for each entry that is read whole, and what is known of it then.
        self._reading: dict[tuple[SourceFile, ZipMember], threading.Lock] = {}
        self._right: set[tuple[SourceFile, ZipMember]] = set()

    def require(self, tensor: LazyTensor) -> None:
        """Reads the entries that `tensor` is computed from; raises `CorruptFileError`.

        It reads its rows in its own way, some more than once; so this costs a read of its own,
        which leaves them in the page cache.
        """
        for file, member in dict.fromkeys((p.file, p.checkable) for p in tensor.extents()):
            if member is None:
                continue
            with self._lock:
                reading = self._reading.setdefault((file, member), threading.Lock())
            with reading:
                if (file, member) not in self._right:
                    require_member(file, member, partial(self._tensors_in, file, member))
                    self._right.add((file, member))

    def add(self, sums: Iterable[RangeSum], compare: Callable[[Shard], None]) -> None:
        """Adds the sums of a shard, and checks the entries that are complete with it.

        Raises as `finish` does.
        """
        changed = set()
        with self._lock:
            for found in sums:
                key = found.path, found.member
                self._sums.setdefault(key, []).append(found)
                changed.add(key)
        if changed:
            self._check(changed, compare, complete=True)

    def finish(self, compare: Callable[[Shard], None]) -> None:
        """Checks the other entries too; what no shard has of them is read for that.

        Raises `CorruptFileError` for a damaged file, with the tensors in it. Where the file is
        right, so that what was made of it is not, `compare` is called for each shard with a part
        of it, to raise what it finds; if that is nothing, `VerificationError` is raised.
        """
        self._check(set(self._sums), compare, complete=False)

    def _check(
        self, keys: set[tuple[str, int]], compare: Callable[[Shard], None], *, complete: bool
    ) -> None:
        for key in sorted(keys):
            file, member = self._members[key]
            with self._lock:
                sums = self._sums.get(key, [])
                if complete and sum(found.length for found in sums) < member.length:
                    continue
                if self._sums.pop(key, None) is None:
                    continue
            if _total(file, member, sums) != member.crc32:
                self._raise(file, member, compare)

    def _raise(self, file: SourceFile, member: ZipMember, compare: Callable[[Shard], None]) -> None:
        require_member(file, member, partial(self._tensors_in, file, member))
        for shard in self._shards:
            if any(p.member == member and p.file == file for p in _extents(shard)):
                compare(shard)
        raise VerificationError(
            f"what was made of entry '{member.name}' does not match its CRC-32"
            f"{self._tensors_in(file, member)}",
            where=str(file.path),
            advice="The disk or memory of this machine may be faulty: convert again.",
        )

    def _tensors_in(self, file: SourceFile, member: ZipMember) -> str:
        names = list(
            dict.fromkeys(
                str(getattr(leaf, "name", entry.name))
                for shard in self._shards
                for entry in shard.entries
                for leaf in entry.tensor.leaves()
                for piece in leaf.extents()
                if piece.member == member and piece.file == file
            )
        )
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        return f"; in it: {', '.join(names[:_NAMES])}{more}"


def _extents(shard: Shard) -> Iterable[FileRange]:
    return (piece for entry in shard.entries for piece in entry.tensor.extents())


def _total(file: SourceFile, member: ZipMember, sums: Sequence[RangeSum]) -> int | None:
    """The CRC-32 of the whole entry, made of `sums`; None if one of them contradicts the file.

    Gaps between them are read, and so is what two of them overlap in.
    """
    total, end = 0, member.offset
    for found in sorted(sums, key=lambda found: (found.offset, -found.length)):
        if found.offset < end:
            if crc32_of(FileRange(file, found.offset, found.length)) != found.crc32:
                return None
            continue
        gap = FileRange(file, end, found.offset - end)
        if gap.length:
            total = crc32_combine(total, crc32_of(gap), gap.length)
        total = crc32_combine(total, found.crc32, found.length)
        end = found.offset + found.length
    rest = FileRange(file, end, member.offset + member.length - end)
    return crc32_combine(total, crc32_of(rest), rest.length) if rest.length else total
