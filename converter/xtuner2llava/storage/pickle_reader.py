"""Pickles read as data: the opcodes are interpreted here, and nothing in them is ever called.

A pickle is a program for a stack machine that may import and call anything. This reader gives each
opcode a meaning only where it builds plain data: numbers, text, lists, dicts, references to tensor
storages, and `Record`s in place of objects of the classes in `allowlist`. Imports are never made,
calls only produce records. The opcodes come from the standard library's disassembler
(`pickletools.genops`), which executes nothing either. A global outside the allow-list is refused
by name.

`torch.load(weights_only=True)` is as safe, but imports torch (a second) before a checkpoint can
even be inspected, and gives tensors, not file ranges.
"""

from __future__ import annotations

import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xtuner2llava.errors import CorruptFileError, UnsafeFileError
from xtuner2llava.storage.allowlist import ALLOWED, STORAGES
from xtuner2llava.tensors.dtype import BY_NAME, DType

# Shapes, offsets and seeds are shorter.
_MAX_INTEGER_BITS = 512
# Python hashes integers, and tuples of them, by fixed formulas: many keys with one hash make a dict
# quadratic. Few integers of this length share one.
_MAX_KEY_BITS = 63
_MAX_DIMENSIONS = 16
# Opcodes, and elements copied by them: a few seconds and some hundred megabytes. The largest
# checkpoints need a tenth of it, about 25 a tensor.
_MAX_WORK = 5_000_000
_NAME_SHOWN = 120  # characters
_PUSH_THEIR_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_TO_MARKER, _AND_ONE_BELOW = -1, -2
_ELEMENTS = "elements for something that is not a list"
_ITEMS = "items for something that is not a dict"
_CALL = "a call of something that is not an allowed global"
_STORAGE = "a storage reference of unknown form"
_UNKNOWN = "opcode {} has no place in a checkpoint"
# How many values an opcode takes from the stack, and what is wrong where they are of other kinds.
_OPERANDS = {
    **{f"TUPLE{count}": (count, "") for count in (1, 2, 3)},
    **dict.fromkeys(("TUPLE", "LIST", "FROZENSET", "DICT", "POP_MARK"), (_TO_MARKER, "")),
    "APPEND": (2, _ELEMENTS),
    "APPENDS": (_AND_ONE_BELOW, _ELEMENTS),
    "ADDITEMS": (_AND_ONE_BELOW, _ELEMENTS),
    "SETITEM": (3, _ITEMS),
    "SETITEMS": (_AND_ONE_BELOW, _ITEMS),
    "STACK_GLOBAL": (2, "a global whose name is not text"),
    "BINPERSID": (1, _STORAGE),
    "REDUCE": (2, _CALL),
    "NEWOBJ": (2, _CALL),
    "BUILD": (2, "state for something that has none"),
}


@dataclass(frozen=True, slots=True)
class StorageReference:
    """A storage of `elements` elements of `dtype`, in the file's entry `data/{key}`."""

    key: str
    dtype: DType
    elements: int


@dataclass(frozen=True, slots=True)
class TensorReference:
    """A view of a storage; `offset` and `strides` count elements."""

    storage: StorageReference
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A class or function that the pickle names; it is never looked up."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """An object of the class `name` as data: what it was made of, not what was put into it."""

    name: str
    arguments: tuple[Value, ...]


Value = (
    None
    | bool
    | int
    | float
    | str
    | bytes
    | tuple["Value", ...]
    | list["Value"]
    | dict["Value", "Value"]
    | StorageReference
    | TensorReference
    | GlobalName
    | Record
)


def as_dict(value: Value) -> dict[Value, Value]:
    """`value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


class _Mark:
    """The stack's marker object."""


_MARK = _Mark()


def read_pickle(data: bytes, where: str) -> Value:
    """The value that the pickle `data` describes.

    Raises `UnsafeFileError` for a global outside the allow-list, `CorruptFileError` for anything
    that is not a well-formed pickle of plain data.
    """
    machine = _Machine(where)
    try:
        for opcode, argument, position in pickletools.genops(data):
            machine.position = position or 0
            machine.count(1)
            if opcode.name == "STOP":
                return machine.take(1)[0]
            machine.step(opcode.name, argument)
    # The disassembler reports damage by errors of many kinds, and by a warning where the caller
    # wants those as errors.
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError, Warning) as error:
        raise CorruptFileError(
            f"its pickle breaks off or is damaged near byte {machine.position:,} ({error})",
            where=where,
            advice="The file is truncated or not a checkpoint; copy or download it again.",
        ) from error
    raise CorruptFileError("its pickle has no end", where=where)


class _Machine:
    """The stack machine: one opcode a step."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Value | _Mark] = []
        # A dict, so that a huge memo index costs nothing.
        self._memo: dict[Value, Value | _Mark] = {}
        self._work = 0
        self.position = 0

    def step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        # Most opcodes are of the first kinds here and below.
        if opcode in _PUSH_THEIR_ARGUMENT:
            if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
                raise self._damaged("an integer of absurd length")
            stack.append(argument)
            return
        if opcode in _PUT:
            self._memo[self._key(argument)] = stack[-1]
            return
        count, wrong = _OPERANDS.get(opcode, (0, ""))
        match opcode, self.take(count) if count else []:
            case "BINGET" | "LONG_BINGET" | "GET", _:
                stack.append(self._memo[argument])
            case "MARK", _:
                stack.append(_MARK)
            case "TUPLE" | "TUPLE2" | "EMPTY_TUPLE" | "TUPLE1" | "TUPLE3", values:
                stack.append(tuple(values))
            case "REDUCE" | "NEWOBJ", [GlobalName(name), tuple(arguments)]:
                stack.append(self._call(name, arguments))
            case "BINPERSID", [("storage", GlobalName(kind), str(key), _, int(elements))]:
                stack.append(self._storage(kind, key, elements))
            case "NEWFALSE" | "NEWTRUE" | "NONE", _:
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "MEMOIZE", _:
                self._memo[len(self._memo)] = stack[-1]
            case "POP", _:
                stack.pop()
            case "DUP", _:
                stack += self.take(1) * 2
            case "PROTO" | "FRAME" | "POP_MARK", _:
                pass
            case "EMPTY_LIST" | "EMPTY_SET" | "LIST" | "FROZENSET", values:
                stack.append(values)
            case "EMPTY_DICT" | "DICT", pairs:
                stack.append(self._filled({}, pairs))
            case "APPEND" | "APPENDS" | "ADDITEMS", [list() | Record() as target, *values]:
                if isinstance(target, list):
                    target += values
                stack.append(target)
            case "SETITEM" | "SETITEMS", [dict() | Record() as target, *pairs]:
                self._filled(target if isinstance(target, dict) else {}, pairs)
                stack.append(target)
            case "GLOBAL", _:
                stack.append(self._global(argument.replace(" ", ".", 1)))
            case "INST", _:
                self._global(argument.replace(" ", ".", 1))  # Mostly refused by its name.
                raise self._damaged(_UNKNOWN.format(opcode))
            case "STACK_GLOBAL", [str(module), str(name)]:
                stack.append(self._global(f"{module}.{name}"))
            case "BUILD", [Record() | dict() | list() | TensorReference() as target, _]:
                stack.append(target)  # Attributes do not concern the weights.
            case _:
                raise self._damaged(wrong or _UNKNOWN.format(opcode))

    def take(self, count: int) -> list[Value]:
        """Takes values from the stack; the last was on top."""
        taken: list[Value] = []
        if count < 0:
            while not isinstance(value := self._stack.pop(), _Mark):
                taken.append(value)
        for _ in range(1 if count == _AND_ONE_BELOW else count):
            value = self._stack.pop()
            if isinstance(value, _Mark):
                raise self._damaged("a marker where a value is expected")
            taken.append(value)
        return taken[::-1]

    def count(self, work: int) -> None:
        self._work += work
        if self._work > _MAX_WORK:
            raise self._damaged("more objects than any checkpoint needs")

    def _damaged(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"pickle byte {self.position:,}: {what}", where=self._where)

    def _filled(self, target: dict[Value, Value], pairs: Sequence[Value]) -> dict[Value, Value]:
        """`target` with these keys, each followed by its value."""
        if len(pairs) % 2:
            raise self._damaged(_ITEMS)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[self._key(key)] = value
        return target

    def _key(self, key: Value) -> Value:
        """`key`, if many of its kind cannot share one hash."""
        if isinstance(key, (list, dict, tuple, StorageReference, TensorReference)):
            raise self._damaged(f"a dict key of type {type(key).__name__}")
        if isinstance(key, int) and key.bit_length() > _MAX_KEY_BITS:
            raise self._damaged("a dict key of absurd length")
        return key

    def _global(self, name: str) -> GlobalName:
        # Protocol 2 uses the names of Python 2.
        if name.startswith("__builtin__."):
            name = name.replace("__builtin__", "builtins", 1)
        if name not in ALLOWED:
            shown = name[:_NAME_SHOWN].encode("unicode_escape").decode("ascii")
            more = "…" if len(name) > _NAME_SHOWN else ""
            raise UnsafeFileError(
                f"its pickle imports '{shown}{more}', which is not on the list of allowed names; "
                "nothing was executed",
                where=self._where,
                advice="Do not load this file with anything else unless you trust its author. "
                "If XTuner wrote it, report the name so that it can be allowed as data.",
            )
        return GlobalName(name)

    def _storage(self, kind: str, key: str, elements: int) -> StorageReference:
        if kind not in STORAGES:
            raise self._damaged(f"'{kind}' is not a storage class")
        if elements < 0:
            raise self._damaged(_STORAGE)
        return StorageReference(key, BY_NAME[STORAGES[kind]], elements)

    def _call(self, function: str, arguments: tuple[Value, ...]) -> Value:
        """What the call of an allowed global makes; mostly a `Record`."""
        match function.removeprefix("torch._utils._rebuild_"), arguments:
            case "torch._tensor._rebuild_from_type_v2", (GlobalName(inner), _, tuple(of_inner), _):
                if inner == function:  # A chain of wrappers is not a tensor.
                    raise self._damaged("a tensor wrapped in itself")
                return self._call(inner, of_inner)
            case "parameter" | "parameter_with_state", _:
                if arguments and isinstance(arguments[0], TensorReference):
                    return arguments[0]
                raise self._damaged("a parameter without a tensor")
            case "tensor_v2", _:
                if any(arguments[6:7]):
                    raise self._damaged("a tensor with a conjugate or negative bit")
                return self._tensor(arguments)
            case "tensor_v3", _:  # Of a dtype that has no storage class of its own: uint16, float8.
                tensor = self._tensor(arguments)
                kind = arguments[6] if len(arguments) > 6 else None
                name = kind.name.removeprefix("torch.") if isinstance(kind, GlobalName) else ""
                if name not in BY_NAME:
                    raise self._damaged("a tensor of unknown dtype")
                old, dtype = tensor.storage, BY_NAME[name]
                elements = old.elements * old.dtype.itemsize // dtype.itemsize
                return replace(tensor, storage=StorageReference(old.key, dtype, elements))
            case "collections.OrderedDict" | "builtins.set" | "torch.Size", _:
                values = arguments[0] if arguments else []
                if not isinstance(values, (list, tuple)):
                    raise self._damaged(f"{function} of something that is not a list")
                self.count(len(values))
                if function == "torch.Size":
                    return tuple(values)
                return list(values) if function == "builtins.set" else self._ordered_dict(values)
        return Record(function, arguments)

    def _ordered_dict(self, pairs: Sequence[Value]) -> dict[Value, Value]:
        flat: list[Value] = []
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise self._damaged("an OrderedDict of unknown form")
            flat += pair
        return self._filled({}, flat)

    def _tensor(self, arguments: tuple[Value, ...]) -> TensorReference:
        match arguments:
            case (StorageReference() as storage, int(offset), sizes, steps, *_):
                shape, strides = _integers(sizes), _integers(steps)
                if shape is not None and strides is not None:
                    return TensorReference(storage, offset, shape, strides)
        raise self._damaged("a tensor of unknown form")


def _integers(value: Value) -> tuple[int, ...] | None:
    """A shape or strides; None for anything else."""
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS:
        return None
    numbers = tuple(n for n in value if isinstance(n, int))
    return numbers if len(numbers) == len(value) else None
