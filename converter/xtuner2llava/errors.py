"""Everything that can go wrong, as one tree.

    ConversionError
    ├── UsageError          the call contradicts itself (exit status 2)
    ├── CheckpointError     the input is not what it should be
    │   ├── CorruptFileError    truncated, inconsistent, or changed while it was read
    │   ├── UnsafeFileError     a pickle asks for something outside the allow-list
    │   └── UnsupportedError    understood, and refused with the reason
    ├── MappingError        a YAML mapping is wrong, or does not fit the checkpoint
    ├── PlanError           the conversion cannot be exact as asked
    ├── OutputError         the target folder, the disk, the file system
    ├── HubError            the Hub refuses, or cannot be reached
    └── VerificationError   what was written is not what was planned

Each message says where, what was expected, what was found, and what to do next. A stage that finds
several faults raises one error that carries them all, see `Fault` and `raise_faults`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MAX_PLACES = 10  # as many kinds of tensors as a layer has


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: where it is, what it is, and what to do about it."""

    where: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return _text(f"{self.where}: {self.what}" if self.where else self.what, self.advice)

    @classmethod
    def about(cls, where: str, names: Sequence[str], what: str, advice: str = "") -> Fault:
        """One fault for what is wrong with all of `names`, of which the first is shown."""
        others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        return cls(f"{where}, {names[0]}{others}", what, advice)


class ConversionError(Exception):
    """Base of all errors that a user can cause or correct; `faults` lists each of them."""

    exit_status = 1

    def __init__(self, what: str, *, where: str = "", advice: str = "") -> None:
        self.faults: tuple[Fault, ...] = (Fault(where, what, advice),)
        super().__init__(str(self.faults[0]))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).from_faults, (self.faults,)

    @classmethod
    def from_faults(cls, faults: Sequence[Fault]) -> ConversionError:
        """One error for all faults of a stage, equal ones once; `faults` must not be empty."""
        faults = tuple(dict.fromkeys(faults))
        error = cls(faults[0].what, where=faults[0].where, advice=faults[0].advice)
        error.faults = faults
        if len(faults) > 1:
            error.args = (
                "\n".join([f"{len(faults)} faults:", *(f"- {f}" for f in listed(faults))]),
            )
        return error


class UsageError(ConversionError):
    exit_status = 2


class CheckpointError(ConversionError):
    pass


class CorruptFileError(CheckpointError):
    pass


class UnsafeFileError(CheckpointError):
    pass


class UnsupportedError(CheckpointError):
    pass


class MappingError(ConversionError):
    pass


class PlanError(ConversionError):
    pass


class OutputError(ConversionError):
    pass


class HubError(ConversionError):
    pass


class VerificationError(ConversionError):
    pass


def refused_path(error: OSError) -> OutputError:
    """What the operating system says of a path, such as one in a folder that only others read."""
    what = f"cannot be read or written ({error.strerror})"
    advice = "Give a path that exists here, and that you may read, or write where it is the output."
    if error.filename is None:
        return OutputError(f"a file or stdout {what}")
    return OutputError(what, where=str(error.filename), advice=advice)


def listed(faults: Iterable[Fault]) -> list[str]:
    """`faults` as text. What holds of several places is said once, with the first of them."""
    places: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        places.setdefault((fault.what, fault.advice), []).append(fault.where)
    texts = []
    for (what, advice), (first, *others) in places.items():
        if others:
            more = "place" if len(others) == 1 else "places"
            shown = "; ".join(others[:_MAX_PLACES]) + ("; ..." if len(others) > _MAX_PLACES else "")
            same = f"The same at {len(others):,} more {more}: {shown}"
            texts.append(_text(str(Fault(first, what)), same, advice))
        else:
            texts.append(str(Fault(first, what, advice)))
    return texts


def _text(*lines: str) -> str:
    """Each in one line, as a name in an untrusted file may have line feeds; empty ones left out."""
    return "\n    ".join(line.replace("\n", "\\n") for line in lines if line)


def raise_faults(kind: type[ConversionError], faults: Sequence[Fault]) -> None:
    """Raises one `kind` that carries all `faults`, or returns if there are none."""
    if faults:
        raise kind.from_faults(faults)
