"""What `torch.load` finds in files of `torch.save`, as JSON; run in a process of its own.

`torch.load(weights_only=True)` refuses the classes of mmengine and DeepSpeed unless they are
registered, which is global state of torch. So this registers inert stand-ins in a process that does
nothing else, maps the files, and says where each tensor lies.

A line of standard input is the path of a file as JSON; the line of standard output that answers it
is {"error": text} or {"value": value}. A value is a JSON scalar, {"list": […]},
{"dict": [[key, value], …]}, {"tensor": [dtype, shape, strides, byte of the first element in the
file, bytes that the file holds from there]}, or {"other": [values]} for a stand-in.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from typing import Any

# Of the top level of a checkpoint, and of an optimizer state; the rest may be large.
_WANTED = frozenset(
    "state_dict meta module optimizer_state_dict param_shapes frozen_param_shapes "
    "frozen_param_fragments shared_params buffer_names".split()
)
_WANTED_BELOW = {
    "meta": frozenset({"cfg", "iter"}),
    "optimizer_state_dict": frozenset(
        "single_partition_of_fp32_groups fp32_flat_groups zero_stage partition_count "
        "group_paddings".split()
    ),
}
# Modules whose classes may be stood in for: all that checkpoints of XTuner name.
_KNOWN = ("mmengine.", "numpy.", "deepspeed.", "_codecs.", "builtins.getattr", "builtins.set",
          "torch.", "collections.")  # fmt: skip
_MAX_PICKLE_BYTES = 256 << 20
_MAX_DEPTH = 20


def main() -> None:
    # Libraries may print; only answers go to the real standard output.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with out:
        for line in sys.stdin:
            answer: dict[str, object]
            try:
                answer = {"value": _index(json.loads(line))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
            json.dump(answer, out)
            out.write("\n")
            out.flush()


def _index(file: str) -> object:
    import torch

    with zipfile.ZipFile(file) as archive:
        sizes = [e.file_size for e in archive.infolist() if e.filename.endswith("data.pkl")]
    if sum(sizes) > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {sum(sizes):,} bytes")
    # Offsets are distances from where the file is mapped, which torch keeps to itself.
    starts: list[int] = []
    map_file = torch.UntypedStorage.from_file

    def remember(*arguments: Any, **named: Any) -> Any:
        storage = map_file(*arguments, **named)
        starts.append(storage.data_ptr())
        return storage

    torch.UntypedStorage.from_file = remember  # type: ignore[method-assign]
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        strange = [name for name in names if not name.startswith(_KNOWN)]
        if strange:
            raise ValueError(f"its pickle asks for {', '.join(sorted(strange))}")
        stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    finally:
        torch.UntypedStorage.from_file = map_file  # type: ignore[method-assign]
    if isinstance(value, dict) and any(key in value for key in ("state_dict", "module")):
        value = {key: _below(key, value[key]) for key in value if key in _WANTED}
    elif isinstance(value, dict) and "optimizer_state_dict" in value:
        key = "optimizer_state_dict"
        value = {key: _below(key, value[key])}
    return _described(value, starts[0], 0)


def _below(key: str, value: Any) -> Any:
    wanted = _WANTED_BELOW.get(key)
    if wanted is None or not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if name in wanted}


def _stand_in(name: str) -> type:
    class StandIn:
        """Keeps what it is called with, and does nothing."""

        def __init__(self, *arguments: object, **named: object) -> None:
            self.arguments = arguments

        def __setstate__(self, state: object) -> None:
            pass

        def __setitem__(self, key: object, value: object) -> None:
            pass

    StandIn.__qualname__ = StandIn.__name__ = name.rpartition(".")[2]
    return StandIn


def _described(value: Any, start: int, depth: int) -> Any:
    import torch

    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        first = value.storage_offset() * value.element_size()
        place = storage.data_ptr() - start + first if storage.nbytes() else 0
        return {
            "tensor": [
                str(value.dtype).removeprefix("torch."),
                list(value.shape),
                list(value.stride()),
                place,
                storage.nbytes() - first,
            ]
        }
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _described(inner, start, depth + 1)]
                for key, inner in value.items()
                if isinstance(key, str)
            ]
        }
    if isinstance(value, list | tuple | set):
        return {"list": [_described(inner, start, depth + 1) for inner in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    inner = getattr(value, "arguments", ())
    return {"other": [_described(item, start, depth + 1) for item in inner]}
