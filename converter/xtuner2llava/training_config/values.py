"""What a config can hold: plain values, names of imported things, and what could not be read.

`Section` is a dict of it with typed access, whose errors say on which line the fault is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard, TypeVar

from xtuner2llava.errors import CheckpointError

Key: TypeAlias = "str | int | float | bool | None"
Value: TypeAlias = "Key | Reference | Unknown | Table | list[Value] | tuple[Value, ...]"

ANY_NAME = "*"  # not an identifier, so it cannot clash
_SHOWN_CHARACTERS = 80
_SHOWN_KEYS = 8
_DOTTED_CHARACTERS = 1000
_DOTTED = re.compile(r"<?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)>?", re.ASCII)
_T = TypeVar("_T")
_RESOLVED = (
    "Name a config that says it as a constant with --xtuner-config FILE.py: the text that mmengine "
    'stored in the .pth as meta["cfg"], saved to a file, always does.'
)
_LLM, _VISION = "Name the base LLM with --llm.", "Name the base vision tower with --vision."
_ADVICE = {
    "model.llm": _LLM,
    "model.llm.pretrained_model_name_or_path": _LLM,
    "model.visual_encoder": _VISION,
    "model.visual_encoder.pretrained_model_name_or_path": _VISION,
    "model.llm_lora.lora_alpha": "Give the value that the training used with --lora-alpha.",
    "model.visual_encoder_lora.lora_alpha": (
        "Give the value that the training used with --vision-lora-alpha."
    ),
}
_LARGEST = 1 << 40


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

    `dict.update` and the like leave `lines` alone; `put` keeps both.
    """

    __slots__ = ("lines",)

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Key, int] = {}

    def put(self, key: Key, value: Value, line: int) -> None:
        self[key] = value
        self.lines[key] = line


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


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One dict: `path` is its dotted name in the config, `where` the file.

    Every method but `known` raises `CheckpointError` where the key's value is unknown or of another
    type; a key that is missing or None has its default.
    """

    table: Table
    path: str
    where: str

    def name(self, key: Key) -> str:
        return f"{self.path}.{key}" if self.path else str(key)

    def error(
        self, key: Key, what: str, line: int | None = None, *, advice: str | None = None
    ) -> CheckpointError:
        line = line or self.table.lines.get(key)
        where = f"{self.where}:{line}" if line else self.where
        advice = advice or _ADVICE.get(self.name(key), _RESOLVED)
        return CheckpointError(f"{self.name(key)} {what}", where=where, advice=advice)

    def value(self, key: Key) -> Value:
        """The value as it was read, None where it is missing."""
        value = self.table.get(key)
        if key not in self.table and not self.path:
            value = self.table.get(ANY_NAME)
        if isinstance(value, Unknown):
            raise self.error(key, f"is not known without running code: {value.reason}", value.line)
        return value

    def _as(self, key: Key, expected: str, convert: Callable[[Value], _T | None]) -> _T | None:
        """The value as `convert` gives it; that is None for a value that is not `expected`."""
        value = self.value(key)
        found = None if value is None else convert(value)
        if value is not None and found is None:
            raise self.error(key, f"is {shown(value)}, {expected} was expected")
        return found

    def text(self, key: Key) -> str | None:
        return self._as(
            key,
            "a text of printable characters",
            lambda value: value if isinstance(value, str) and value.isprintable() else None,
        )

    def texts(self, key: Key) -> tuple[str, ...]:
        """A list of texts, of any characters."""
        return self._as(key, "a list of texts", _texts) or ()

    def path_of(self, key: Key) -> str | None:
        """The full dotted path of what the key names, see `values.dotted`."""
        return self._as(key, "the name of something importable", dotted)

    def integer(self, key: Key, default: int) -> int:
        found = self._as(key, "an integer", _integer)
        return default if found is None else found

    def positive(self, key: Key, default: int) -> int:
        found = self._as(key, "a positive integer", _positive)
        return default if found is None else found

    def number(self, key: Key, default: float) -> float:
        found = self._as(key, "a finite number", _number)
        return default if found is None else found

    def flag(self, key: Key) -> bool:
        """True or False, which is the default."""
        return bool(
            self._as(
                key,
                "True or False",
                lambda value: value if isinstance(value, int) and value in (0, 1) else None,
            )
        )

    def section(self, key: Key) -> Section | None:
        table = self._as(key, "a dict", lambda value: value if isinstance(value, Table) else None)
        return None if table is None else Section(table, self.name(key), self.where)

    def known(self, key: Key) -> Section | None:
        """The dict under `key`; None where there is none, or it is not known."""
        return self.section(key) if isinstance(self.table.get(key), Table) else None

    def others(self, known: Iterable[str]) -> dict[str, Value]:
        """All values under keys that are not `known`; unknown ones are errors."""
        skipped = frozenset(known)
        return {str(key): self.value(key) for key in self.table if key not in skipped}


def _number(value: Value) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= _LARGEST else None


def _integer(value: Value) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _positive(value: Value) -> int | None:
    number = _integer(value)
    return number if number is not None and number > 0 else None


def _texts(value: Value) -> tuple[str, ...] | None:
    items = value if isinstance(value, (list, tuple)) else [None]
    found = [item for item in items if isinstance(item, str)]
    return tuple(found) if len(found) == len(items) else None
