"""What identifies a weight file in records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies a weight file without reading all of it.

    `digest` is the sha256 of a safetensors header, of a checkpoint's with some blocks of the data,
    or of the names, sizes and CRC-32 sums of a zip's entries; `size` is in bytes.
    """

    name: str
    size: int
    digest: str
