"""What a config can hold: plain values, names of imported things, and what could not be read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

Key: TypeAlias = "str | int | float | bool | None"
Value: TypeAlias = "Key | Reference | Unknown | Table | list[Value] | tuple[Value, ...]"

ANY_NAME = "*"  # not an identifier, so it cannot clash
_SHOWN_CHARACTERS = 80
_SHOWN_KEYS = 8
_DOTTED_CHARACTERS = 1000
_DOTTED = re.compile(r"<?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)>?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """An imported name by its full path, `transformers.AutoTokenizer.from_pretrained`."""

    path: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value that would need the config to be run: why, and on which line (from 1)."""

    reason: str
    line: int


class Table(dict[Key, "Value"]):
    """A dict of the config that knows on which line each key was set (from 1).

    `dict.update` and the like leave `lines` alone; only `put` keeps both.
    """

    __slots__ = ("lines",)

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Key, int] = {}

    def put(self, key: Key, value: Value, line: int) -> None:
        self[key] = value
        self.lines[key] = line

    def merge(self, other: Table) -> None:
        """Takes over all of `other`, as `dict.update` does, with its lines."""
        self.update(other)
        self.lines.update(other.lines)


def dotted(value: Value) -> str | None:
    """The full path that `value` names, in one form for both kinds of config; None for no name.

    A config file imports and names things; in the text that mmengine keeps in a checkpoint's meta
    the same name is a string, `'transformers.AutoModelForCausalLM.from_pretrained'`, in some
    versions with `<>` around it (mmengine/config/config.py, `_lazy2string`; config/lazy.py,
    `dump_str`).
    """
    if isinstance(value, Reference):
        return value.path
    if isinstance(value, str) and len(value) <= _DOTTED_CHARACTERS:
        match = _DOTTED.fullmatch(value)
        return match[1] if match else None
    return None


def is_scalar(value: Value) -> TypeGuard[Key]:
    """Whether `value` can be a key: nothing that holds other values, no name, not unknown."""
    return value is None or isinstance(value, (bool, int, float, str))


def shown(value: Value) -> str:
    """A short text for messages, for a `value` of any size."""
    match value:
        case Reference():
            text = value.path
        case Unknown():
            text = f"unknown ({value.reason})"
        case Table():
            keys = [shown(key) if not isinstance(key, str) else key for key in value]
            more = ", …" if len(keys) > _SHOWN_KEYS else ""
            text = f"a dict with {', '.join(keys[:_SHOWN_KEYS])}{more}" if keys else "an empty dict"
        case str():
            text = repr(value[: _SHOWN_CHARACTERS + 1])
        case list() | tuple():
            return f"a {type(value).__name__} of {len(value)}"
        case _:
            text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
