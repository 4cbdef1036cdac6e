"""Pickles read as data: the opcodes are interpreted here, and nothing in them is ever called.

A pickle is a program for a stack machine that may import and call anything. This reader gives each
opcode a meaning only where it builds plain data: numbers, text, lists, dicts, references to tensor
storages, and `Record`s that stand for objects of the classes in `allowlist`. Imports are never
made, calls only produce records. The opcodes come from the standard library's disassembler
(`pickletools.genops`), which executes nothing either. A global outside the allow-list is refused
by name.

It does not go through `torch.load(weights_only=True)`, which is as safe, because that needs torch
imported (a second) before a checkpoint can even be inspected, and gives tensors, not file ranges.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field

from xtuner2llava.errors import CorruptFileError, UnsafeFileError
from xtuner2llava.storage import allowlist
from xtuner2llava.tensors import BY_NAME, DType

# Integers longer than this are no shape, offset or seed.
_MAX_INTEGER_BYTES = 64
# Python hashes integers by a fixed formula: many long ones with one hash make a dict quadratic.
_MAX_KEY_BITS = 63
_MAX_DEPTH_OF_KEYS = 8
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
    """What is left of an object of the class `name`: how it was made and filled."""

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
    that is no well-formed pickle of plain data.
    """
    machine = _Machine(where)
    try:
        for opcode, argument, position in pickletools.genops(data):
            machine.position = position or 0
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except (CorruptFileError, UnsafeFileError):
        raise
    # The disassembler reports damage by whatever its decoders happen to raise; a warning where the
    # caller wants those as errors.
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError, Warning) as error:
        raise CorruptFileError(
            f"its pickle breaks off or is damaged near byte {machine.position:,} ({error})",
            where=where,
            advice="The file is truncated or no checkpoint; copy or download it again.",
        ) from error
    raise CorruptFileError("its pickle has no end", where=where)


class _Machine:
    """The stack machine: one method an opcode, found by name."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Value | _Mark] = []
        self._memo: dict[int, Value | _Mark] = {}
        self._work = 0
        self.position = 0

    def result(self) -> Value:
        return self._pop()

    def step(self, name: str, argument: object) -> None:
        self._count(1)
        if name in _PUSHES_ARGUMENT:
            self._push_argument(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _IGNORED:
            pass
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise self._damaged(f"opcode {name} has no place in a checkpoint")

    def _count(self, work: int) -> None:
        self._work += work
        if self._work > _MAX_WORK:
            raise self._damaged("more objects than any checkpoint needs")

    def _damaged(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"pickle byte {self.position:,}: {what}", where=self._where)

    # Stack and memo

    def _push_argument(self, argument: object) -> None:
        if not isinstance(argument, (int, float, str, bytes)):
            raise self._damaged(f"a constant of type {type(argument).__name__}")
        if isinstance(argument, int) and argument.bit_length() > 8 * _MAX_INTEGER_BYTES:
            raise self._damaged("an integer of absurd length")
        self._stack.append(argument)

    def _pop(self) -> Value:
        value = self._stack.pop()
        if isinstance(value, _Mark):
            raise self._damaged("a marker where a value is expected")
        return value

    def _top(self) -> Value:
        value = self._stack[-1]
        if isinstance(value, _Mark):
            raise self._damaged("a marker where a value is expected")
        return value

    def _pop_to_mark(self) -> list[Value]:
        values: list[Value] = []
        while True:
            value = self._stack.pop()
            if isinstance(value, _Mark):
                values.reverse()
                return values
            values.append(value)

    def mark(self, argument: object) -> None:
        self._stack.append(_MARK)

    def pop(self, argument: object) -> None:
        self._stack.pop()

    def pop_mark(self, argument: object) -> None:
        self._pop_to_mark()

    def dup(self, argument: object) -> None:
        self._stack.append(self._top())

    def put(self, argument: object) -> None:
        # A dict, so that a huge memo index costs nothing.
        self._memo[self._integer(argument)] = self._stack[-1]

    def memoize(self, argument: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, argument: object) -> None:
        self._stack.append(self._memo[self._integer(argument)])

    def _integer(self, value: object) -> int:
        if not isinstance(value, int):
            raise self._damaged(f"{type(value).__name__} where an integer is expected")
        return value

    # Containers

    def tuple_of(self, values: list[Value]) -> None:
        self._stack.append(tuple(values))

    def tuple1(self, argument: object) -> None:
        self.tuple_of([self._pop()])

    def tuple2(self, argument: object) -> None:
        second, first = self._pop(), self._pop()
        self.tuple_of([first, second])

    def tuple3(self, argument: object) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self.tuple_of([first, second, third])

    def tuple_mark(self, argument: object) -> None:
        self.tuple_of(self._pop_to_mark())

    def list_mark(self, argument: object) -> None:
        self._stack.append(self._pop_to_mark())

    def dict_mark(self, argument: object) -> None:
        pairs = self._pop_to_mark()
        self._stack.append({})
        self._set_items(pairs)

    def append(self, argument: object) -> None:
        self._extend([self._pop()])

    def appends(self, argument: object) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Value]) -> None:
        target = self._top()
        if isinstance(target, Record):
            target = target.elements
        if not isinstance(target, list):
            raise self._damaged("elements for something that is no list")
        target.extend(values)

    def setitem(self, argument: object) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def setitems(self, argument: object) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, pairs: list[Value]) -> None:
        target = self._top()
        if isinstance(target, Record):
            target = target.items
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self._damaged("items for something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[self._key(key)] = value

    def _key(self, key: Value, depth: int = 0) -> Value:
        """`key`, if it can be hashed at once: nested tuples can take exponential time."""
        if isinstance(key, tuple) and depth < _MAX_DEPTH_OF_KEYS and len(key) <= 64:
            if any(isinstance(part, tuple) for part in key) and depth:
                raise self._damaged("a dict key of nested tuples")
            return tuple(self._key(part, depth + 1) for part in key)
        if isinstance(key, (list, dict, tuple)):
            raise self._damaged(f"a dict key of type {type(key).__name__}")
        if isinstance(key, int) and key.bit_length() > _MAX_KEY_BITS:
            raise self._damaged("a dict key of absurd length")
        return key

    # Globals and objects

    def global_name(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self._push_global(module, name)

    def stack_global(self, argument: object) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._damaged("a global whose name is no text")
        self._push_global(module, name)

    def inst(self, argument: object) -> None:
        self.global_name(argument)
        raise self._damaged("opcode INST has no place in a checkpoint")

    def _push_global(self, module: str, name: str) -> None:
        full = allowlist.canonical(f"{module}.{name}")
        if not allowlist.is_allowed(full):
            raise UnsafeFileError(
                f"its pickle wants to use '{_shown(full)}', which no XTuner checkpoint needs; "
                "nothing was run",
                where=self._where,
                advice="Do not load this file with anything else unless you trust its author. "
                "If XTuner wrote it, report the name so that it can be allowed as data.",
            )
        self._stack.append(GlobalName(full))

    def persistent_id(self, argument: object) -> None:
        identity = self._pop()
        if (
            not isinstance(identity, tuple)
            or len(identity) != 5
            or identity[0] != "storage"
            or not isinstance(identity[1], GlobalName)
            or not isinstance(identity[2], str)
            or not isinstance(identity[4], int)
            or identity[4] < 0
        ):
            raise self._damaged("a storage reference of unknown form")
        dtype = allowlist.storage_dtype(identity[1].name)
        if dtype is None:
            raise self._damaged(f"'{identity[1].name}' is no storage class")
        self._stack.append(StorageReference(identity[2], BY_NAME[dtype], identity[4]))

    def reduce(self, argument: object) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
            raise self._damaged("a call of something that is no allowed global")
        self._stack.append(self._call(function.name, arguments))

    def newobj(self, argument: object) -> None:
        self.reduce(argument)

    def newobj_ex(self, argument: object) -> None:
        keywords, arguments, kind = self._pop(), self._pop(), self._pop()
        if not isinstance(kind, GlobalName) or not isinstance(arguments, tuple):
            raise self._damaged("an object of something that is no allowed global")
        self._stack.append(Record(kind.name, (*arguments, keywords)))

    def build(self, argument: object) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, (dict, list, TensorReference)):
            raise self._damaged("state for something that has none")
        # An OrderedDict's or a parameter's extra attributes say nothing about the weights.

    def _call(self, name: str, arguments: tuple[Value, ...]) -> Value:
        """What the call of an allowed global stands for; most become a `Record`."""
        if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
            inner, _, inner_arguments, _ = arguments
            if isinstance(inner, GlobalName) and isinstance(inner_arguments, tuple):
                # Once more only: a chain of wrappers is no tensor.
                if inner.name == name:
                    raise self._damaged("a tensor wrapped in itself")
                return self._call(inner.name, inner_arguments)
        if name in (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
        ):
            if arguments and isinstance(arguments[0], TensorReference):
                return arguments[0]
            raise self._damaged("a parameter without a tensor")
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return self._tensor(name, arguments)
        if name == "collections.OrderedDict":
            return self._ordered_dict(arguments)
        if name in ("builtins.set", "torch.Size"):
            values = arguments[0] if arguments else []
            if not isinstance(values, (list, tuple)):
                raise self._damaged(f"{name} of something that is no list")
            self._count(len(values))
            return tuple(values) if name == "torch.Size" else list(values)
        return Record(name, arguments)

    def _ordered_dict(self, arguments: tuple[Value, ...]) -> Value:
        pairs = arguments[0] if arguments else []
        if not isinstance(pairs, list):
            raise self._damaged("an OrderedDict of unknown form")
        self._count(len(pairs))
        result: dict[Value, Value] = {}
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise self._damaged("an OrderedDict of unknown form")
            result[self._key(pair[0])] = pair[1]
        return result

    def _tensor(self, name: str, arguments: tuple[Value, ...]) -> TensorReference:
        storage, offset, shape, strides = (*arguments[:4], None, None, None, None)[:4]
        if (
            not isinstance(storage, StorageReference)
            or not isinstance(offset, int)
            or not _is_shape(shape)
            or not _is_shape(strides)
        ):
            raise self._damaged("a tensor of unknown form")
        if len(arguments) > 6 and name.endswith("v2") and arguments[6]:
            raise self._damaged("a tensor with a conjugate or negative bit")
        if name.endswith("v3"):
            dtype = arguments[6] if len(arguments) > 6 else None
            if (
                not isinstance(dtype, GlobalName)
                or dtype.name.removeprefix("torch.") not in BY_NAME
            ):
                raise self._damaged("a tensor of unknown dtype")
            kind = BY_NAME[dtype.name.removeprefix("torch.")]
            size = storage.elements * storage.dtype.itemsize // kind.itemsize
            storage = StorageReference(storage.key, kind, size)
        return TensorReference(storage, offset, _as_shape(shape), _as_shape(strides))


def _shown(name: str) -> str:
    """`name` for an error message: bounded, and without control characters."""
    text = name[:_NAME_SHOWN].encode("unicode_escape").decode("ascii")
    return text if len(name) <= _NAME_SHOWN else f"{text}…"


def _is_shape(value: Value) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) <= 16
        and all(isinstance(n, int) for n in value)
    )


def _as_shape(value: Value) -> tuple[int, ...]:
    return tuple(n for n in value if isinstance(n, int)) if isinstance(value, (tuple, list)) else ()


_PUSHES_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
_CONSTANTS: dict[str, Callable[[], Value]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_IGNORED = frozenset({"PROTO", "FRAME"})
_STEPS: dict[str, Callable[[_Machine, object], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE1": _Machine.tuple1,
    "TUPLE2": _Machine.tuple2,
    "TUPLE3": _Machine.tuple3,
    "TUPLE": _Machine.tuple_mark,
    "LIST": _Machine.list_mark,
    "FROZENSET": _Machine.list_mark,
    "DICT": _Machine.dict_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.inst,
    "BINPERSID": _Machine.persistent_id,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "BUILD": _Machine.build,
}
