"""Changes to an input that keep most of its structure, so that they reach what lies behind it.

Each takes the input and a random generator, and returns another input. Nothing here needs atheris.
"""

from __future__ import annotations

import copy
import pickletools
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from fuzz_targets.inputs import dump, load

Mutator = Callable[[bytes, Random], bytes]

_INTEGERS = (
    *(-1, 0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 64, 255, 256, 4096, 65535, 65536, 10**6, 10**9),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**64 - 1, -(2**63), 10**30),
    *(10**400, -(10**20)),
)
_FLOATS = (0.0, -0.0, 0.5, 1.0, 2.0, 1e-5, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "../x",
        "/etc/passwd",
        "~",
        "~root",
        "a/b",
        "a\\b",
        "\0",
        "\n",
        "%s",
    ),
    *("{}", "{0}", "{i}", "weight", "bias", "null", "true", "\x1b[31m", "\ud800", "\u202e", "é"),
    *("model.safetensors", "pytorch_model.bin", "float16", "torch.float64", "F32", "BF16", "I64"),
    *("llama", "qwen2", "linear", "dynamic", "yarn", "llama3", "default", "longrope", "LORA"),
    *("model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "x" * 300, "a" * 5000),
    *("__metadata__", "__class__", "__reduce__", "$tensor", "$call", "os.system", "posix.system"),
    *("llm.", "llm.x", "projector.model.0.weight", "projector.model.99999999999999999999.weight"),
    *("$length", "$data", "q_proj", "model.layers.{i}", "**", "*", "0" * 40, "9" * 40, "1e400"),
)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Changes one to a few places of a JSON text."""
    value = load(data)
    if value is None:
        return mutate_bytes(data, random)
    try:
        for _ in range(1 + random.randrange(3)):
            _change_place(value, random)
        return dump(value)
    except (ValueError, RecursionError):  # Nested too deeply by earlier changes.
        return data


def _change_place(root: Any, random: Random) -> None:
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting and len(places) < 5000:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            places.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    if not places:
        return
    container, key = random.choice(places)
    kind = random.randrange(12)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[random.choice([str(key) + "x", *_TEXTS])] = container.pop(key)
    elif kind == 2:
        other, its_key = random.choice(places)
        if its_key in other if isinstance(other, dict) else its_key < len(other):
            container[key] = copy.deepcopy(other[its_key])
    elif kind == 3 and isinstance(container, dict):
        container[random.choice(_TEXTS)] = _any_value(random, 0)
    elif kind == 4 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == 5 and isinstance(container, list):
        random.shuffle(container)
    elif kind == 6:
        container[key] = [container[key]]
    elif kind == 7:
        container[key] = _nested(container[key], random)
    elif kind == 8 and isinstance(container[key], int):
        container[key] += random.choice((-2, -1, 1, 2, 8))
    elif kind == 9 and isinstance(container[key], str):
        text = container[key].encode("utf-8", "surrogatepass")
        container[key] = mutate_bytes(text, random).decode("utf-8", "replace")
    else:
        container[key] = _any_value(random, 0)


def _any_value(random: Random, depth: int) -> Any:
    kind = random.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return random.random() < 0.5
    if kind == 2:
        return random.choice(_FLOATS)
    if kind in (3, 4):
        return random.choice(_INTEGERS)
    if kind == 5:
        return random.choice(_TEXTS)
    if kind == 6:
        return [_any_value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {random.choice(_TEXTS): _any_value(random, depth + 1) for _ in range(3)}
    return random.choice(
        (
            {"$tensor": ["float32", [random.choice(_INTEGERS[:14])], None, 0, "0"]},
            {"$tensor": ["float16", [4, 4], [1, 4], 0]},
            {"$global": random.choice(("os.system", "builtins.eval", "torch.Size", "numpy.dtype"))},
            {"$call": [random.choice(("posix.system", "torch.Size", "builtins.set")), [["x"]]]},
        )
    )


def _nested(value: Any, random: Random) -> Any:
    for _ in range(random.choice((2, 10, 30, 70, 90, 300))):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
_SNIPPETS = (
    *(b"(", b"N", b"]", b"}", b")", b"t", b"R", b"b", b"a", b"e", b"s", b"u", b"0", b"1", b"2"),
    *(b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"Q", b"\x81", b"\x92", b"\x93", b"\x94"),
    *(b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\xff"),
    *(b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"G" + b"\x7f\xf8" + bytes(6), b"\x8a\x00"),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000"),
    *(
        b"X\x03\x00\x00\x00cpu",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ),
    *(b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_parameter\n", b"c__builtin__\nset\n"),
    *(b"c__builtin__\ngetattr\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cos\nsystem\n"),
    *(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nSize\n", b"ctorch\nTensor\n"),
    *(
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"c_codecs\nencode\n",
        b"I1\n",
        b"I01\n",
        b"L1L\n",
    ),
    *(b"S'x'\n", b"Vx\n", b"F1.5\n", b"p0\n", b"g0\n", b"iposix\nsystem\n", b"oposix\n", b"P1\n"),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8),
    *(b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x97", b"\x98", b"\x96" + bytes(8)),
    *(
        b"I" + b"9" * 5000 + b"\n",
        b"F1e999999\n",
        b"X\x03\x00\x00\x00\xed\xa0\x80",
        b"\x8f",
        b"\x91",
    ),
)


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """Changes opcodes: leaves out, doubles, exchanges, or puts in one with its argument."""
    pieces = _opcodes_of(data)
    if len(pieces) < 2:
        return mutate_bytes(data, random)
    for _ in range(1 + random.randrange(4)):
        place = random.randrange(len(pieces))
        kind = random.randrange(7)
        if kind == 0 and len(pieces) > 1:
            del pieces[place]
        elif kind == 1:
            pieces.insert(place, pieces[place])
        elif kind == 2:
            other = random.randrange(len(pieces))
            pieces[place], pieces[other] = pieces[other], pieces[place]
        elif kind == 3:
            start = random.randrange(len(pieces))
            part = pieces[start : start + random.randrange(1, 12)]
            pieces[place:place] = part * random.choice((1, 1, 2, 20, 200))
        elif kind == 4:
            pieces[place] = random.choice(_SNIPPETS)
        elif kind == 5:
            pieces.insert(place, random.choice(_OPCODES))
        else:
            pieces.insert(place, random.choice(_SNIPPETS))
    return b"".join(pieces)[: 1 << 18]


def _opcodes_of(data: bytes) -> list[bytes]:
    starts = []
    try:
        for _, _, position in pickletools.genops(data):
            starts.append(position or 0)
    except Exception:  # noqa: S110 - whatever the disassembler says: the rest stays as it is
        pass
    if not starts:
        return []
    ends = [*starts[1:], len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def mutate_zip(data: bytes, random: Random) -> bytes:
    """Changes numbers in the headers of a zip, or moves its parts."""
    result = bytearray(data)
    spots = [
        (start, magic)
        for magic in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")
        for start in _all(data, magic)
    ]
    for _ in range(1 + random.randrange(3)):
        kind = random.randrange(8)
        if kind == 0 or not spots:
            return mutate_bytes(bytes(result), random)
        start, magic = random.choice(spots)
        if kind == 1:
            cut = random.randrange(len(result) + 1)
            result = result[:cut] + result[random.randrange(len(result) + 1) :]
            break
        length = {b"PK\x03\x04": 30, b"PK\x01\x02": 46}.get(magic, 22)
        width = random.choice((1, 2, 4, 8))
        at = start + random.randrange(4, max(5, length - width + 1))
        if at + width <= len(result):
            old = int.from_bytes(result[at : at + width], "little")
            sizes = (0, 1, len(result), len(result) - 1, 2 ** (8 * width) - 1, old + 1, old - 1)
            number = random.choice((*sizes, random.choice(_INTEGERS))) % 2 ** (8 * width)
            result[at : at + width] = number.to_bytes(width, "little")
    return bytes(result)


def _all(data: bytes, part: bytes) -> list[int]:
    found, start = [], data.find(part)
    while start >= 0 and len(found) < 100:
        found.append(start)
        start = data.find(part, start + 1)
    return found


def mutate_protobuf(data: bytes, random: Random) -> bytes:
    """Changes a field at the top level of a protobuf message: its order, number, or length."""
    pieces = _fields_of(data)
    if not pieces or random.random() < 0.3:
        return mutate_bytes(data, random)
    place = random.randrange(len(pieces))
    kind = random.randrange(5)
    if kind == 0:
        del pieces[place]
    elif kind == 1:
        pieces.insert(place, pieces[random.randrange(len(pieces))])
    elif kind == 2:
        pieces[place] = mutate_bytes(pieces[place], random)
    elif kind == 3:
        pieces[place] = bytes([random.randrange(256)]) + pieces[place][1:]
    else:
        pieces.insert(place, struct.pack("<BB", random.randrange(256), random.randrange(256)))
    return b"".join(pieces)


def _fields_of(data: bytes) -> list[bytes]:
    pieces, position = [], 0
    while position < len(data):
        start = position
        length = 0
        if data[position] & 7 == 2 and position + 1 < len(data):
            length = data[position + 1]
        elif data[position] & 7 == 5:
            length = 3
        position += 2 + length
        pieces.append(data[start:position])
    return pieces


def mutate_lines(words: Sequence[str]) -> Mutator:
    """A mutator of texts: changes lines, and puts in `words` of the language."""

    def mutate(data: bytes, random: Random) -> bytes:
        lines = data.split(b"\n")
        for _ in range(1 + random.randrange(3)):
            place = random.randrange(len(lines))
            kind = random.randrange(9)
            if kind == 0 and len(lines) > 1:
                del lines[place]
            elif kind == 1:
                lines.insert(place, lines[random.randrange(len(lines))])
            elif kind == 2:
                other = random.randrange(len(lines))
                lines[place], lines[other] = lines[other], lines[place]
            elif kind == 3:
                lines[place] = b" " * random.randrange(9) + lines[place].lstrip()
            elif kind == 4:
                start = random.randrange(len(lines))
                lines[place:place] = lines[start : start + random.randrange(1, 8)] * random.choice(
                    (1, 2, 30)
                )
            elif kind == 5:
                lines[place] = mutate_bytes(lines[place], random)
            else:
                lines[place] = _with_word(lines[place], words, random)
        return b"\n".join(lines)[: 1 << 17]

    return mutate


def _with_word(line: bytes, words: Sequence[str], random: Random) -> bytes:
    """`line` with one of its words replaced, or one put in."""
    word = random.choice(words) if random.random() < 0.8 else str(random.choice(_INTEGERS))
    new = word.encode("utf-8", "surrogatepass")
    spaces = [i for i, byte in enumerate(line) if byte in b" ,:([{=."]
    at = random.choice(spaces) + 1 if spaces else 0
    end = at
    while random.random() < 0.9 and end < len(line) and line[end] not in b" ,:)]}=.":
        end += 1
    return line[:at] + new + line[end:]


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Changes bytes anywhere."""
    result = bytearray(data)
    for _ in range(1 + random.randrange(3)):
        at = random.randrange(len(result) + 1)
        kind = random.randrange(6)
        if kind == 0 and result:
            result[at % len(result)] ^= 1 << random.randrange(8)
        elif kind == 1:
            result[at:at] = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
        elif kind == 2:
            del result[at : at + random.randrange(1, 9)]
        elif kind == 3 and result:
            start = random.randrange(len(result))
            result[at:at] = result[start : start + random.randrange(1, 33)]
        elif kind == 4:
            del result[at:]
        elif result:
            result[at % len(result)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x7B))
    return bytes(result)
