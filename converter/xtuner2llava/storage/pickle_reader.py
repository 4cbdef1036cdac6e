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
from dataclasses import dataclass, field, replace
from typing import Any

from xtuner2llava.errors import CorruptFileError, UnsafeFileError
from xtuner2llava.storage.allowlist import ALLOWED, STORAGES
from xtuner2llava.tensors import BY_NAME, DType

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


@dataclass(slots=True)
class Record:
    """An object of the class `name` as data: how it was made and filled."""

    name: str
    arguments: tuple[Value, ...] = ()
    state: Value = None
    items: dict[Value, Value] = field(default_factory=dict)
    elements: list[Value] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)


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
                return machine.pop()
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
        push = self._stack.append
        match opcode:
            case _ if opcode in _PUSHES_ARGUMENT:
                if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
                    raise self._damaged("an integer of absurd length")
                push(argument)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[self._key(argument)] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(opcode == "NEWTRUE")
            case "EMPTY_LIST" | "EMPTY_SET":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_DICT":
                push({})
            case "MARK":
                push(_MARK)
            case "POP":
                self._stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                push(self._top())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self.pop() for _ in range(int(opcode[-1]))][::-1]))
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "LIST" | "FROZENSET":
                push(self._pop_to_mark())
            case "DICT":
                pairs = self._pop_to_mark()
                push({})
                self._set_items(pairs)
            case "APPEND":
                self._extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case _:
                self._object_step(opcode, argument)

    def _object_step(self, opcode: str, argument: Any) -> None:
        """The opcodes that name globals or make objects."""
        push = self._stack.append
        match opcode:
            case "GLOBAL" | "INST":
                push(self._global(argument.replace(" ", ".", 1)))
                if opcode == "INST":
                    raise self._damaged("opcode INST has no place in a checkpoint")
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise self._damaged("a global whose name is not text")
                push(self._global(f"{module}.{name}"))
            case "BINPERSID":
                push(self._storage(self.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
                    raise self._damaged("a call of something that is not an allowed global")
                push(self._call(function.name, arguments))
            case "NEWOBJ_EX":
                keywords, arguments, kind = self.pop(), self.pop(), self.pop()
                if not isinstance(kind, GlobalName) or not isinstance(arguments, tuple):
                    raise self._damaged("an object of something that is not an allowed global")
                push(Record(kind.name, (*arguments, keywords)))
            case "BUILD":
                state, target = self.pop(), self._top()
                if isinstance(target, Record):
                    target.state = state
                # The extra attributes of an OrderedDict or a parameter do not concern the weights.
                elif not isinstance(target, (dict, list, TensorReference)):
                    raise self._damaged("state for something that has none")
            case _:
                raise self._damaged(f"opcode {opcode} has no place in a checkpoint")

    def count(self, work: int) -> None:
        self._work += work
        if self._work > _MAX_WORK:
            raise self._damaged("more objects than any checkpoint needs")

    def _damaged(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"pickle byte {self.position:,}: {what}", where=self._where)

    def pop(self) -> Value:
        value = self._top()
        self._stack.pop()
        return value

    def _top(self) -> Value:
        value = self._stack[-1]
        if isinstance(value, _Mark):
            raise self._damaged("a marker where a value is expected")
        return value

    def _pop_to_mark(self) -> list[Value]:
        values: list[Value] = []
        while not isinstance(value := self._stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def _extend(self, values: list[Value]) -> None:
        target = self._top()
        if isinstance(target, Record):
            target = target.elements
        if not isinstance(target, list):
            raise self._damaged("elements for something that is not a list")
        target.extend(values)

    def _set_items(self, pairs: list[Value]) -> None:
        target = self._top()
        if isinstance(target, Record):
            target = target.items
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self._damaged("items for something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[self._key(key)] = value

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

    def _storage(self, identity: Value) -> StorageReference:
        match identity:
            case ("storage", GlobalName(kind), str(key), _, int(elements)) if elements >= 0:
                if kind in STORAGES:
                    return StorageReference(key, BY_NAME[STORAGES[kind]], elements)
                raise self._damaged(f"'{kind}' is not a storage class")
        raise self._damaged("a storage reference of unknown form")

    def _call(self, function: str, arguments: tuple[Value, ...]) -> Value:
        """What the call of an allowed global makes; mostly a `Record`."""
        match function, arguments:
            case "torch._tensor._rebuild_from_type_v2", (GlobalName(inner), _, tuple(of_inner), _):
                if inner == function:  # A chain of wrappers is not a tensor.
                    raise self._damaged("a tensor wrapped in itself")
                return self._call(inner, of_inner)
            case (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                _,
            ):
                if arguments and isinstance(arguments[0], TensorReference):
                    return arguments[0]
                raise self._damaged("a parameter without a tensor")
            case "torch._utils._rebuild_tensor_v2", _:
                if any(arguments[6:7]):
                    raise self._damaged("a tensor with a conjugate or negative bit")
                return self._tensor(arguments)
            case "torch._utils._rebuild_tensor_v3", _:
                return self._typed_tensor(arguments)
            case "collections.OrderedDict", _:
                return self._ordered_dict(arguments[0] if arguments else [])
            case "builtins.set" | "torch.Size", _:
                values = arguments[0] if arguments else []
                if not isinstance(values, (list, tuple)):
                    raise self._damaged(f"{function} of something that is not a list")
                self.count(len(values))
                return tuple(values) if function == "torch.Size" else list(values)
        return Record(function, arguments)

    def _ordered_dict(self, pairs: Value) -> dict[Value, Value]:
        if not isinstance(pairs, list):
            raise self._damaged("an OrderedDict of unknown form")
        self.count(len(pairs))
        result: dict[Value, Value] = {}
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise self._damaged("an OrderedDict of unknown form")
            result[self._key(pair[0])] = pair[1]
        return result

    def _tensor(self, arguments: tuple[Value, ...]) -> TensorReference:
        match arguments:
            case (StorageReference() as storage, int(offset), sizes, steps, *_):
                shape, strides = _integers(sizes), _integers(steps)
                if shape is not None and strides is not None:
                    return TensorReference(storage, offset, shape, strides)
        raise self._damaged("a tensor of unknown form")

    def _typed_tensor(self, arguments: tuple[Value, ...]) -> TensorReference:
        """A tensor of a dtype that has no storage class of its own (uint16, float8)."""
        tensor = self._tensor(arguments)
        match arguments[6:7]:
            case (GlobalName(name),) if name.removeprefix("torch.") in BY_NAME:
                dtype = BY_NAME[name.removeprefix("torch.")]
                old = tensor.storage
                elements = old.elements * old.dtype.itemsize // dtype.itemsize
                return replace(tensor, storage=StorageReference(old.key, dtype, elements))
        raise self._damaged("a tensor of unknown dtype")


def _integers(value: Value) -> tuple[int, ...] | None:
    """A shape or strides; None for anything else."""
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS:
        return None
    numbers = tuple(n for n in value if isinstance(n, int))
    return numbers if len(numbers) == len(value) else None


_PUSHES_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
