"""The few functions that configs call and that only compute: what each gives, with limits."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass

from xtuner2llava.recipe.values import Table, Unknown, Value, is_scalar

_TEXT_LIMIT = 100  # characters of a number; int() of a long text takes quadratic time
_DIGITS_LIMIT = 100


class Unreadable(Exception):
    """An expression whose value is not known, and why."""

    def __init__(self, why: Unknown | str) -> None:
        self.unknown = why if isinstance(why, Unknown) else None
        super().__init__(why.reason if isinstance(why, Unknown) else why)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a call was given; `spend` bounds the length of what it makes (characters, items)."""

    positional: list[Value]
    named: Table
    line: int
    spend: Callable[[int], None]

    def only(self, least: int, most: int) -> list[Value]:
        """The positional arguments, all known, when there are `least` to `most` and no others."""
        if self.named or not least <= len(self.positional) <= most:
            raise Unreadable("a call with these arguments is not read")
        for value in self.positional:
            if isinstance(value, Unknown):
                raise Unreadable(value)
        return self.positional


def _number(value: Value) -> int | float | str:
    if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= _TEXT_LIMIT):
        return value
    raise Unreadable("a number was expected")


def _numbers(values: list[Value]) -> list[int | float]:
    numbers = [value for value in values if isinstance(value, (int, float))]
    if len(numbers) < len(values) or not numbers:
        raise Unreadable("numbers were expected")
    return numbers


def _int(arguments: Arguments) -> Value:
    return int(_number(arguments.only(1, 1)[0]))


def _float(arguments: Arguments) -> Value:
    return float(_number(arguments.only(1, 1)[0]))


def _str(arguments: Arguments) -> Value:
    value = arguments.only(1, 1)[0]
    if not is_scalar(value):
        raise Unreadable("str() is read for constants only")
    return str(value)


def _bool(arguments: Arguments) -> Value:
    value = arguments.only(1, 1)[0]
    if not is_scalar(value):
        raise Unreadable("bool() is read for constants only")
    return bool(value)


def _abs(arguments: Arguments) -> Value:
    return abs(_numbers(arguments.only(1, 1))[0])


def _round(arguments: Arguments) -> Value:
    number, *digits = _numbers(arguments.only(1, 2))
    if not digits:
        return round(number)
    if not isinstance(digits[0], int) or abs(digits[0]) > _DIGITS_LIMIT:
        raise Unreadable("round() to this place is not read")
    return round(number, digits[0])


def _max(arguments: Arguments) -> Value:
    return max(_numbers(arguments.only(2, 100)))


def _min(arguments: Arguments) -> Value:
    return min(_numbers(arguments.only(2, 100)))


def _len(arguments: Arguments) -> Value:
    value = arguments.only(1, 1)[0]
    if isinstance(value, (str, list, tuple, frozenset, Table)):
        return len(value)
    raise Unreadable("len() of this value is not read")


def _sequence(arguments: Arguments) -> list[Value]:
    values = arguments.only(0, 1)
    if not values:
        return []
    if not isinstance(values[0], (list, tuple)):
        raise Unreadable("a list was expected")
    arguments.spend(len(values[0]))
    return list(values[0])


def _list(arguments: Arguments) -> Value:
    return _sequence(arguments)


def _tuple(arguments: Arguments) -> Value:
    return tuple(_sequence(arguments))


def _dict(arguments: Arguments) -> Value:
    table = Table()
    _update(table, arguments)
    return table


def _print(arguments: Arguments) -> Value:
    return None


def _join(arguments: Arguments) -> Value:
    parts = [part for part in arguments.only(1, 100) if isinstance(part, str)]
    if len(parts) < len(arguments.positional):
        raise Unreadable("texts were expected")
    arguments.spend(sum(map(len, parts)) + len(parts))
    return posixpath.join(*parts)


def _update(self: Value, arguments: Arguments) -> Value:
    if not isinstance(self, Table) or len(arguments.positional) > 1:
        raise Unreadable("a dict was expected")
    for other in (*arguments.positional, arguments.named):
        if not isinstance(other, Table):
            raise Unreadable(other if isinstance(other, Unknown) else "a dict was expected")
        arguments.spend(len(other))
        self.merge(other)
    return None


def _append(self: Value, arguments: Arguments) -> Value:
    if not isinstance(self, list) or len(arguments.positional) != 1 or arguments.named:
        raise Unreadable("a list was expected")
    self.append(arguments.positional[0])
    return None


def _extend(self: Value, arguments: Arguments) -> Value:
    if not isinstance(self, list) or len(arguments.positional) != 1:
        raise Unreadable("a list was expected")
    self.extend(_sequence(arguments))
    return None


def _copy(self: Value, arguments: Arguments) -> Value:
    arguments.only(0, 0)
    if isinstance(self, Table):
        return _dict(Arguments([self], Table(), arguments.line, arguments.spend))
    return _list(Arguments([self], Table(), arguments.line, arguments.spend))


def _get(self: Value, arguments: Arguments) -> Value:
    key, *default = arguments.only(1, 2)
    if not isinstance(self, Table) or not (key is None or isinstance(key, (int, float, str))):
        raise Unreadable("a key was expected")
    return self.get(key, default[0] if default else None)


# By the name that a config calls, or the full path of what it imported.
FUNCTIONS: dict[str, Callable[[Arguments], Value]] = {
    "abs": _abs,
    "bool": _bool,
    "dict": _dict,
    "float": _float,
    "int": _int,
    "len": _len,
    "list": _list,
    "max": _max,
    "min": _min,
    "mmengine.ConfigDict": _dict,
    "mmengine.config.ConfigDict": _dict,
    "os.path.join": _join,
    "print": _print,
    "round": _round,
    "str": _str,
    "tuple": _tuple,
}

METHODS: dict[tuple[type, str], Callable[[Value, Arguments], Value]] = {
    (Table, "copy"): _copy,
    (Table, "get"): _get,
    (Table, "update"): _update,
    (list, "append"): _append,
    (list, "copy"): _copy,
    (list, "extend"): _extend,
}

MUTATORS = frozenset({"append", "extend", "update"})
