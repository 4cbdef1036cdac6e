"""Pickles that attack: nothing of them is run, the answer comes soon, and it names the attack."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner2llava.errors import CheckpointError, CorruptFileError, UnsafeFileError
from xtuner2llava.storage import pickle_reader
from xtuner2llava.storage.pickle_reader import TensorReference, read_pickle
from xtuner2llava.storage.torch_file import TorchFile

MIB = 1 << 20


class Attack:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self._call


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """The opcodes that call a global, protocol 2."""
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def program(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that every attack would make; and nothing that it would go through may be called."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"called with {arguments}")

    path = tmp_path / "canary"
    for holder, name in [(os, "system"), (subprocess, "Popen"), (builtins, "eval")]:
        monkeypatch.setattr(holder, name, refuse)
    yield path
    assert not path.exists()


# What the pickle names, and a pickle that would make the canary if it were run.
ATTACKS: list[tuple[str, Callable[[str], bytes]]] = [
    ("os.system", lambda c: program(call("os", "system", text(f"touch {c}")))),
    ("posix.system", lambda c: program(call("posix", "system", text(f"touch {c}")))),
    ("nt.system", lambda c: program(call("nt", "system", text(f"touch {c}")))),
    ("builtins.eval", lambda c: program(call("builtins", "eval", text(f"open({c!r}, 'w')")))),
    ("builtins.eval", lambda c: program(call("__builtin__", "eval", text(f"open({c!r}, 'w')")))),
    ("builtins.exec", lambda c: program(call("builtins", "exec", text(f"open({c!r}, 'w')")))),
    ("builtins.open", lambda c: program(call("builtins", "open", text(c), text("w")))),
    ("builtins.compile", lambda c: program(call("builtins", "compile", text("1"), text("x")))),
    ("builtins.__import__", lambda c: program(call("builtins", "__import__", text("os")))),
    ("builtins.getattr.__call__", lambda c: program(call("builtins", "getattr.__call__"))),
    ("subprocess.Popen", lambda c: program(call("subprocess", "Popen", text(f"touch {c}")))),
    ("subprocess.check_output", lambda c: program(call("subprocess", "check_output", text(c)))),
    ("importlib.import_module", lambda c: program(call("importlib", "import_module", text("x")))),
    ("importlib._bootstrap._load", lambda c: program(call("importlib._bootstrap", "_load"))),
    ("runpy.run_path", lambda c: program(call("runpy", "run_path", text(c)))),
    ("runpy._run_code", lambda c: program(call("runpy", "_run_code", text(c)))),
    ("pty.spawn", lambda c: program(call("pty", "spawn", text(c)))),
    ("shutil.rmtree", lambda c: program(call("shutil", "rmtree", text(c)))),
    ("socket.create_connection", lambda c: program(call("socket", "create_connection"))),
    ("webbrowser.open", lambda c: program(call("webbrowser", "open", text(c)))),
    ("ctypes.CDLL", lambda c: program(call("ctypes", "CDLL", text(c)))),
    ("pickle.loads", lambda c: program(call("pickle", "loads", text(c)))),
    ("marshal.loads", lambda c: program(call("marshal", "loads", text(c)))),
    ("types.CodeType", lambda c: program(call("types", "CodeType"))),
    ("types.FunctionType", lambda c: program(call("types", "FunctionType"))),
    ("operator.attrgetter", lambda c: program(call("operator", "attrgetter", text("system")))),
    ("functools.partial", lambda c: program(call("functools", "partial"))),
    ("code.InteractiveInterpreter", lambda c: program(call("code", "InteractiveInterpreter"))),
    ("timeit.timeit", lambda c: program(call("timeit", "timeit", text(c)))),
    ("cProfile.run", lambda c: program(call("cProfile", "run", text(c)))),
    ("pdb.run", lambda c: program(call("pdb", "run", text(c)))),
    ("pip.main", lambda c: program(call("pip", "main"))),
    ("numpy.load", lambda c: program(call("numpy", "load", text(c)))),
    ("numpy.testing._private.utils.runstring",
     lambda c: program(call("numpy.testing._private.utils", "runstring"))),
    ("torch.load", lambda c: program(call("torch", "load", text(c)))),
    ("torch.hub.load", lambda c: program(call("torch.hub", "load", text(c)))),
    ("torch.jit.load", lambda c: program(call("torch.jit", "load", text(c)))),
    ("torch.serialization.load", lambda c: program(call("torch.serialization", "load"))),
    ("torch._utils._rebuild_tensor_v2.__globals__",
     lambda c: program(call("torch._utils", "_rebuild_tensor_v2.__globals__"))),
    ("collections.OrderedDict.__reduce_ex__",
     lambda c: program(call("collections", "OrderedDict.__reduce_ex__"))),
    ("mmengine.config.Config.fromfile",
     lambda c: program(call("mmengine.config", "Config.fromfile", text(c)))),
    # An allowed module whose name hides another.
    ("collections.OrderedDict\\n.system",
     lambda c: b"\x80\x04" + text("collections.OrderedDict\n") + text("system") + b"\x93."),
    # By name on the stack, protocol 4; out of the memo; and hidden behind values that are dropped.
    ("os.system", lambda c: b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(c) + b"\x85R."),
    ("os.system", lambda c: b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93."),
    ("os.system", lambda c: program(b"]", b"cos\nsystem\n", b"0")),
    ("os.system", lambda c: program(b"}(", text("a"), call("os", "system", text(c)), b"u")),
    # Deep inside the arguments of what is allowed.
    ("os.system", lambda c: program(
        call("collections", "OrderedDict", b"](" + call("os", "system", text(c)) + b"e"))),
    ("os.system", lambda c: program(b"ccollections\nOrderedDict\n)R",
                                    b"}(", text("__setstate__"), b"cos\nsystem\nub")),
    ("os.system", lambda c: program(
        call("builtins", "getattr", b"cos\nsystem\n", text("__call__")))),
    # Old opcodes that import, too: INST, and a class below a mark for OBJ.
    ("os.system", lambda c: f"(S'touch {c}'\nios\nsystem\n.".encode()),
    ("os.system", lambda c: f"(cos\nsystem\nS'touch {c}'\no.".encode()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"), ATTACKS, ids=[f"{i}-{a[0]}" for i, a in enumerate(ATTACKS)]
)
def test_a_foreign_global_is_refused_by_name(
    name: str, make: Callable[[str], bytes], canary: Path
) -> None:
    with pytest.raises(UnsafeFileError) as caught:
        read_pickle(make(str(canary)), "bad.pth")
    message = str(caught.value)
    assert f"bad.pth: its pickle imports '{name}'" in message
    assert "nothing was executed" in message
    assert "Do not load this file with anything else" in message


def test_the_attacks_are_real(tmp_path: Path) -> None:
    # What Python's own reader does with such files, and what this does.
    canaries = [tmp_path / f"canary {i}" for i in range(3)]
    attacks = [
        Attack(os.system, f"touch '{canaries[0]}'"),
        Attack(eval, f"open({str(canaries[1])!r}, 'w').close()"),
        Attack(subprocess.call, ["touch", str(canaries[2])]),
    ]
    for i, attack in enumerate(attacks):
        torch.save({"state_dict": {}, "meta": attack}, tmp_path / f"{i}.pth")
        with pytest.raises(UnsafeFileError, match=r"system|eval|call"):
            TorchFile(tmp_path / f"{i}.pth")
    assert not any(canary.exists() for canary in canaries)
    for i in range(3):
        torch.load(tmp_path / f"{i}.pth", weights_only=False)
    assert all(canary.exists() for canary in canaries)


@pytest.mark.parametrize(
    ("opcodes", "text"),
    [
        # Calls of something else than a global, and with something else than arguments.
        (b"\x80\x02]]R.", "a call of something that is not an allowed global"),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "a call of something that is not an allowed"),
        (b"\x80\x02ccollections\nOrderedDict\n)R)\x81.", "something that is not an allowed"),
        (b"\x80\x02X\x02\x00\x00\x00os)R.", "a call of something that is not an allowed global"),
        # State for what has none: a string with __setstate__.
        (b"\x80\x02K\x01}b.", "state for something that has none"),
        (b"\x80\x02ctorch\nTensor\n}b.", "state for something that has none"),
        # The extension registry, persistent ids as text, buffers out of band.
        (b"\x80\x02\x82\x01.", "opcode EXT1 has no place"),
        (b"\x80\x02\x83\x01\x00.", "opcode EXT2 has no place"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4 has no place"),
        (b"Pfile\n.", "opcode PERSID has no place"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER has no place"),
        # It would copy its arguments each time; torch.save writes protocol 2, which lacks it.
        (b"\x80\x04ctorch\nTensor\n)}\x92.", "opcode NEWOBJ_EX has no place"),
        (b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a.", "opcode BYTEARRAY8 has no place"),
        (b"(icollections\nOrderedDict\n.", "opcode INST has no place"),
        (b"(ccollections\nOrderedDict\no.", "opcode OBJ has no place"),
        # Storages and tensors of unknown form.
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "a storage reference of unknown form"),
        (b"\x80\x02(X\x07\x00\x00\x00storagectorch\nTensor\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
         b"K\x01tQ.", "'torch.Tensor' is not a storage class"),
        (b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000N"
         b"J\xff\xff\xff\xfftQ.", "a storage reference of unknown form"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x01\x85K\x01\x85tR.",
         "a tensor of unknown form"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NtR.", "a parameter without a tensor"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00N)NtR.",
         "a tensor wrapped in itself"),
        # Containers that are none.
        (b"\x80\x02K\x01K\x02a.", "elements for something that is not a list"),
        (b"\x80\x02]K\x01K\x02s.", "items for something that is not a dict"),
        (b"\x80\x02}(K\x01u.", "items for something that is not a dict"),
        (b"\x80\x02}]K\x01s.", "a dict key of type list"),
        (b"\x80\x02}K\x01\x85K\x01s.", "a dict key of type tuple"),
        (b"\x80\x02}(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000N"
         b"K\x01tQK\x01s.", "a dict key of type StorageReference"),
        (b"\x80\x02]p99999999999999999999999\n.", "a dict key of absurd length"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",
         "OrderedDict of something that is not a list"),
        (b"\x80\x02ccollections\nOrderedDict\n]K\x05a\x85R.",
         "an OrderedDict of unknown form"),
        (b"\x80\x02ctorch\nSize\nK\x05\x85R.", "torch.Size of something that is not a list"),
        (b"\x80\x02]X\x01\x00\x00\x00a\x93.", "a global whose name is not text"),
        # Nothing, no end, no marker, no memo.
        (b"", "its pickle breaks off"),
        (b"\x80\x02]", "its pickle breaks off"),
        (b"\x80\x02t.", "its pickle breaks off"),
        (b"\x80\x02(.", "a marker where a value is expected"),
        (b"\x80\x02h\x05.", "its pickle breaks off"),
        (b"\x80\x02\xff.", "its pickle breaks off"),
        (b"<!DOCTYPE html>", "its pickle breaks off"),
    ],
)  # fmt: skip
def test_what_is_not_plain_data_is_refused(opcodes: bytes, text: str, canary: Path) -> None:
    with pytest.raises(CorruptFileError, match=text):
        read_pickle(opcodes, "bad.pth")


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
ZERO, ONE, TEXT = b"K\x00", b"K\x01", b"X\x01\x00\x00\x00a"


@pytest.mark.parametrize(
    "arguments",
    [
        (STORAGE,),
        (STORAGE, ZERO, ONE + b"\x85"),
        (TEXT, ZERO, ONE + b"\x85", ONE + b"\x85"),
        (STORAGE, b"N", ONE + b"\x85", ONE + b"\x85"),
        (STORAGE, TEXT, ONE + b"\x85", ONE + b"\x85"),
        (STORAGE, ZERO, TEXT + b"\x85", ONE + b"\x85"),
        (STORAGE, ZERO, ONE + b"\x85", TEXT + b"\x85"),
        (STORAGE, ZERO, ONE + TEXT + b"\x86", ONE + ONE + b"\x86"),
        (STORAGE, ZERO, ONE, ONE),
        (STORAGE, ZERO, b"(" + ONE * 17 + b"t", b"(" + ONE * 17 + b"t"),
    ],
)
def test_a_tensor_of_unknown_form_is_refused(arguments: tuple[bytes, ...]) -> None:
    with pytest.raises(CorruptFileError, match="a tensor of unknown form"):
        read_pickle(tensor(*arguments), "bad.pth")


def test_a_tensor_of_known_form_is_one() -> None:
    dimensions = b"(" + ONE * 16 + b"t"
    found = read_pickle(tensor(STORAGE, ZERO, dimensions, dimensions), "good.pth")
    assert isinstance(found, TensorReference)
    assert (found.offset, found.shape, found.strides) == (0, (1,) * 16, (1,) * 16)


def tensor(*arguments: bytes) -> bytes:
    return program(b"ctorch._utils\n_rebuild_tensor_v2\n(", *arguments, b"tR")


def colliding_keys(count: int) -> bytes:
    # Python hashes integers modulo 2**61 - 1: all of these have one hash.
    numbers = ((n * (2**61 - 1)).to_bytes(12, "little") for n in range(1, count + 1))
    return program(b"}(", b"".join(b"\x8a\x0c" + number + b"N" for number in numbers), b"u")


def repeated_copies(count: int) -> bytes:
    # One list of pairs, made into an OrderedDict over and over.
    pairs = b"](" + b"NN\x86" * count + b"eq\x01"
    return program(pairs, b"ccollections\nOrderedDict\nq\x020", b"h\x02h\x01\x85R0" * count)


def nested_keys(depth: int) -> bytes:
    # Each tuple holds the one before it twice: hashing the last takes 2**depth steps.
    return program(b"}K\x01K\x01\x86", b"2\x86" * depth, b"Ns")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (colliding_keys(200_000), "a dict key of absurd length"),
        (nested_keys(64), "a dict key of type tuple"),
        (program(b"\x8b", struct.pack("<i", MIB), b"\x7f" * MIB), "an integer of absurd length"),
        (b"I" + b"7" * MIB + b"\n.", "breaks off or is damaged"),
        (b"L" + b"7" * MIB + b"L\n.", "breaks off or is damaged"),
        (program(b"X\xff\xff\xff\xff", b"a"), "breaks off or is damaged"),
        (program(b"\x8d" + b"\xff" * 8, b"a"), "breaks off or is damaged"),
        (program(b"\x8b\xff\xff\xff\xff"), "breaks off or is damaged"),
        (program(b"}(", b"N" * 100, b"tNs"), "a dict key of type tuple"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_take_all_time_or_memory_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(CorruptFileError, match=text):
        read_pickle(data, "bad.pth")


@pytest.mark.parametrize(
    "data",
    [program(b"]" * 10_000), program(b"(" * 10_000), program(b"N0" * 5_000), repeated_copies(200)],
    ids=["lists", "marks", "nothing", "copies"],
)
def test_work_is_bounded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # The bound itself takes seconds to reach.
    assert 10**6 < pickle_reader._MAX_WORK <= 10**7
    monkeypatch.setattr(pickle_reader, "_MAX_WORK", 10_000)
    with pytest.raises(CorruptFileError, match="more objects than any checkpoint needs"):
        read_pickle(data, "bad.pth")


def test_a_name_of_any_length_is_shown_short_and_without_control_characters() -> None:
    with pytest.raises(UnsafeFileError) as caught:
        read_pickle(program(call("a" * MIB, "b")), "bad.pth")
    assert len(str(caught.value)) < 600
    with pytest.raises(UnsafeFileError) as caught:
        read_pickle(b"\x80\x04" + text("\x1b[2J") + text("ü\x00") + b"\x93.", "bad.pth")
    assert "'\\x1b[2J.\\xfc\\x00'" in str(caught.value)


def test_a_memo_of_huge_index_costs_nothing() -> None:
    value = read_pickle(program(b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff"), "here")
    assert value == []


def test_depth_is_harmless() -> None:
    value = read_pickle(program(b"]" * 100_000, b"a" * 99_999), "here")
    depth = 0
    while value:
        assert isinstance(value, list)
        value = value[0]
        depth += 1
    assert depth == 99_999
    tuples = read_pickle(program(b")", b"\x85" * 100_000), "here")
    assert isinstance(tuples, tuple)


def test_shared_tuples_that_unfold_beyond_measure_are_not_unfolded() -> None:
    laughs = program(b")q\x00", b"h\x00h\x00\x86q\x00" * 200)
    assert isinstance(read_pickle(laughs, "here"), tuple)


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    """The pickle of a small checkpoint."""
    buffer = io.BytesIO()
    linear = torch.nn.Linear(2, 2)
    value = {"meta": {"cfg": "x = 1", "iter": 2}, "state_dict": linear.state_dict(), "n": [1.5]}
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


def test_a_pickle_cut_anywhere_is_damaged(checkpoint: bytes) -> None:
    assert isinstance(read_pickle(checkpoint, "here"), dict)
    for length in range(len(checkpoint)):
        with pytest.raises(CorruptFileError):
            read_pickle(checkpoint[:length], "here")


def test_a_damaged_pickle_is_an_error_message_or_data(checkpoint: bytes, canary: Path) -> None:
    for place in range(len(checkpoint)):
        for byte in random.Random(place).sample(range(256), 12):  # noqa: S311
            changed = bytearray(checkpoint)
            changed[place] = byte
            try:
                read_pickle(bytes(changed), "here")
            except CheckpointError as error:
                assert error.faults[0].where == "here"


@pytest.mark.parametrize("seed", range(20))
def test_opcodes_at_random_are_an_error_message_or_data(seed: int, canary: Path) -> None:
    import pickletools

    known = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    chance = random.Random(seed)  # noqa: S311
    for _ in range(300):
        data = b"".join(
            chance.choice(known) + chance.choice((b"", b"", b"\x00", b"\x01", b"os\nsystem\n"))
            for _ in range(chance.randrange(40))
        )
        try:
            read_pickle(data + b".", "here")
        except CheckpointError as error:
            assert error.faults[0].where == "here"


def test_protocols_of_python_itself_are_read_the_same(checkpoint: bytes) -> None:
    value = {"a": [1, (2, 3)], "b": "c"}
    assert all(read_pickle(pickle.dumps(value, p), "here") == value for p in range(6))
