"""A dict of the config with typed access, whose errors say on which line the fault is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from xtuner2llava.errors import CheckpointError
from xtuner2llava.training_config.values import ANY_NAME, Key, Table, Unknown, Value, dotted, shown

_RESOLVED = (
    "Name a config that says it as a constant with --xtuner-config FILE.py: the text that mmengine "
    'stored in the .pth as meta["cfg"], saved to a file, always does.'
)
_ADVICE = {
    "model.llm": "Name the base LLM with --llm.",
    "model.llm.pretrained_model_name_or_path": "Name the base LLM with --llm.",
    "model.visual_encoder": "Name the base vision tower with --vision.",
    "model.visual_encoder.pretrained_model_name_or_path": (
        "Name the base vision tower with --vision."
    ),
    "model.llm_lora.lora_alpha": "Give the value that the training used with --lora-alpha.",
    "model.visual_encoder_lora.lora_alpha": (
        "Give the value that the training used with --vision-lora-alpha."
    ),
}
_INTEGER_LIMIT = 1 << 40


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One dict: `path` is its dotted name in the config, `where` the file.

    Every method raises `CheckpointError` where the key's value is unknown or of another type; a
    key that is missing or None has its default.
    """

    table: Table
    path: str
    where: str

    def name(self, key: Key) -> str:
        return f"{self.path}.{key}" if self.path else str(key)

    def line(self, key: Key) -> int | None:
        return self.table.lines.get(key)

    def error(
        self, key: Key, what: str, line: int | None = None, *, advice: str | None = None
    ) -> CheckpointError:
        line = line or self.line(key)
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

    def _wrong(self, key: Key, expected: str, value: Value) -> CheckpointError:
        return self.error(key, f"is {shown(value)}, {expected} was expected")

    def text(self, key: Key) -> str | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        if not value.isprintable():
            raise self._wrong(key, "a text of printable characters", value)
        return value

    def texts(self, key: Key) -> tuple[str, ...]:
        """A list of texts, of any characters; a set comes sorted."""
        value = self.value(key)
        if value is None:
            return ()
        items = value if isinstance(value, (list, tuple, frozenset)) else [value]
        found = [item for item in items if isinstance(item, str)]
        if len(found) < len(items) or isinstance(value, str):
            raise self._wrong(key, "a list of texts", value)
        return tuple(sorted(found) if isinstance(value, frozenset) else found)

    def path_of(self, key: Key) -> str | None:
        """The full dotted path of what the key names, see `values.dotted`."""
        value = self.value(key)
        if value is None:
            return None
        name = dotted(value)
        if name is None:
            raise self._wrong(key, "the name of something importable", value)
        return name

    def integer(self, key: Key, default: int) -> int:
        value = self.value(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _INTEGER_LIMIT:
            raise self._wrong(key, "an integer", value)
        return value

    def positive(self, key: Key, default: int) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self._wrong(key, "a positive integer", value)
        return value

    def number(self, key: Key, default: float) -> float:
        value = self.value(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "a number", value)
        if not math.isfinite(value) or abs(value) > _INTEGER_LIMIT:
            raise self._wrong(key, "a finite number", value)
        return value

    def flag(self, key: Key, default: bool = False) -> bool:
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise self._wrong(key, "True or False", value)
        return bool(value)

    def section(self, key: Key) -> Section | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, Table):
            raise self._wrong(key, "a dict", value)
        return Section(value, self.name(key), self.where)

    def others(self, known: Iterable[str]) -> dict[str, Value]:
        """All values under keys that are not `known`; unknown ones are errors."""
        skipped = frozenset(known)
        return {str(key): self.value(key) for key in self.table if key not in skipped}
