"""CRC-32 sums that the source files carry: every flipped bit that is used is found."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.cases import CASES
from xtuner2llava import ConversionError, CorruptFileError, VerificationError, convert, plan
from xtuner2llava.storage.torch_file import TorchFile
from xtuner2llava.storage.weights import tensor_references
from xtuner2llava.tensors.computed import Transpose, cast
from xtuner2llava.tensors.dtype import FLOAT16
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.rows import Piece, Rows, split
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.shards import plan_shards
from xtuner2llava.writing.writer import write_shards

BITS = random.Random(5)  # noqa: S311


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    torch.save(tensors, path)
    file = TorchFile(path)
    return file.tensors(tensor_references(file.value, str(path)))


def flip(path: Path, offset: int) -> None:
    """Flips a bit, and hides it from the time of the last change."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << BITS.randrange(8)]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def data_offset(path: Path, name: str) -> tuple[int, int]:
    """Where the entry whose name ends so lies, and its length."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = next(e for e in archive.infolist() if e.filename.endswith(name))
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)
        start = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return entry.header_offset + 30 + start, entry.file_size


def write(out: Path, tensors: dict[str, LazyTensor], **more: Any) -> None:
    with OutputFolder(out, "") as folder:
        write_shards(folder, plan_shards(tensors, more.pop("size", "1GB")).shards, **more)
        folder.publish()


# Each: what is made of a tensor `w` of 600 x 400, which lies in one entry.
USES: dict[str, Callable[[LazyTensor], dict[str, LazyTensor]]] = {
    "copied": lambda w: {"w": w},
    "cast": lambda w: {"w": cast(w, FLOAT16)},
    "split": lambda w: dict(zip("abc", split(w, [200, 100, 300]), strict=True)),
    "split and cast": lambda w: {
        n: cast(part, FLOAT16) for n, part in zip("ab", split(w, [1, 599]), strict=True)
    },
    "some rows": lambda w: {"w": Rows([Piece(w, 10, 20), Piece(w, 5, 8)])},
    "overlapping rows": lambda w: {"a": Rows([Piece(w, 0, 400)]), "b": Rows([Piece(w, 300, 600)])},
    "twice": lambda w: {"a": w, "b": w},
    "transposed": lambda w: {"w": Transpose(w)},
    "row by row": lambda w: {"w": Rows([Piece(w, i ^ 1, (i ^ 1) + 1) for i in range(600)] * 2)},
    "copied and cast": lambda w: {"a": w, "b": cast(w, FLOAT16)},
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("size", ["1GB", "200KB"])
@pytest.mark.parametrize("use", USES)
def test_a_flipped_bit_is_found_whatever_is_made_of_it(
    use: str, size: str, verify: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    values = {"other": torch.ones(5), "w": torch.randn(600, 400), "last": torch.ones(5)}
    tensors = saved(path, values)
    write(tmp_path / "right", USES[use](tensors["w"]), size=size, verify=verify)
    offset, length = data_offset(path, "data/1")
    for place in (0, length - 1, BITS.randrange(length)):
        flip(path, offset + place)
        with pytest.raises(CorruptFileError) as caught:
            write(tmp_path / "out", USES[use](tensors["w"]), size=size, verify=verify)
        (fault,) = caught.value.faults
        assert fault.where == str(path)
        assert fault.what.startswith("entry 'x/data/1' is damaged: its bytes have the CRC-32 ")
        assert fault.what.endswith("; in it: w")
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        tensors = saved(path, values)


def test_what_is_not_used_may_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    tensors = saved(path, {"w": torch.randn(50), "adam": torch.randn(50)})
    flip(path, data_offset(path, "data/1")[0])
    write(tmp_path / "out", {"w": tensors["w"]})


def test_a_copy_that_differs_from_a_right_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum that the source carries proves the copy too, and the difference is named."""
    tensors = saved(tmp_path / "x.bin", {"w": torch.zeros(600, 400)})
    copy = os.copy_file_range

    def wrong(source: int, target: int, count: int, start: int, offset: int) -> int:
        done = copy(source, target, count, start, offset)
        os.pwrite(target, b"\x01", offset + 4 * 401)
        return done

    monkeypatch.setattr(os, "copy_file_range", wrong)
    for verify in (True, False):
        with pytest.raises(
            VerificationError, match=r"w: element \[1, 1\] .* is 01000000, expected"
        ):
            write(tmp_path / "out", {"w": tensors["w"]}, verify=verify)
        assert not (tmp_path / "out").exists()


def test_kernels_and_file_systems_that_do_not_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    tensors = saved(tmp_path / "x.bin", {"w": torch.randn(600, 4000)})
    write(tmp_path / "expected", tensors)
    expected = (tmp_path / "expected/model.safetensors").read_bytes()
    copy = os.copy_file_range
    for refusal in (*"ENOSYS EXDEV EOPNOTSUPP EINVAL EPERM EBADF EIO".split(), "short", "zero"):
        calls = []

        def refuse(*arguments: int) -> int:
            calls.append(arguments)  # noqa: B023
            if refusal == "zero":  # noqa: B023
                return 0
            if len(calls) == 1:  # noqa: B023 - some refuse only when they have begun
                source, target, count, start, offset = arguments
                return copy(source, target, min(count, 1000), start, offset)
            if refusal == "short":  # noqa: B023
                return copy(*arguments)
            number = getattr(errno, refusal)  # noqa: B023
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "copy_file_range", refuse)
        write(tmp_path / f"out-{refusal}", tensors)
        assert (tmp_path / f"out-{refusal}/model.safetensors").read_bytes() == expected
    monkeypatch.delattr(os, "copy_file_range")
    write(tmp_path / "out", tensors)
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected


def test_zeros_in_place_of_sums_are_said(checkpoints: Path, tmp_path: Path) -> None:
    """As torch.save writes after `torch.serialization.set_crc32_options(False)`."""
    case = "qwen2_e_full_fullvis"
    path = tmp_path / "iter_2.pth"
    shutil.copy(checkpoints / case / "iter_2.pth", path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
        for entry in archive.infolist():
            assert data[start : start + 4] == b"PK\x01\x02"
            data[start + 16 : start + 20] = bytes(4)
            lengths = [
                int.from_bytes(data[start + i : start + i + 2], "little") for i in (28, 30, 32)
            ]
            start += 46 + sum(lengths)
            assert entry.CRC
    path.write_bytes(data)
    options = {**CASES[case].options(checkpoints), "dtype": "keep"}
    report = convert(path, tmp_path / "zeros", **options)
    (note,) = [note for note in report.plan.notes if "Not checked for damage" in note]
    sizes = sum(planned.tensor.nbytes for planned in report.plan.tensors)
    assert note == (
        f"Not checked for damage: {len(report.plan.tensors)} tensors, {sizes:,} bytes of "
        "iter_2.pth, which carries no CRC-32."
    )
    assert note in plan(path, **options).notes
    with_sums = convert(checkpoints / case / "iter_2.pth", tmp_path / "sums", **options)
    assert not [note for note in with_sums.plan.notes if "CRC-32" in note]
    name = "model.safetensors"
    assert (tmp_path / "zeros" / name).read_bytes() == (tmp_path / "sums" / name).read_bytes()


def damage_everywhere(source: Path, files: list[Path], options: dict[str, Any], tmp_path: Path,
                      places: int) -> dict[str, int]:  # fmt: skip
    """How many of `places` flipped bits were refused, changed nothing, or changed the output."""
    convert(source, tmp_path / "right", **options)
    names = [p.name for p in (tmp_path / "right").glob("*") if p.name not in ("conversion.json",)]
    expected = {name: (tmp_path / "right" / name).read_bytes() for name in names}
    sizes = [file.stat().st_size for file in files]
    counts = {"refused": 0, "unused": 0, "wrong": 0}
    for _ in range(places):
        (file,) = BITS.choices(files, sizes)
        offset, before = BITS.randrange(file.stat().st_size), file.read_bytes()
        flip(file, offset)
        try:
            convert(source, tmp_path / "out", **options)
        except ConversionError:
            counts["refused"] += 1
            assert not (tmp_path / "out").exists()
        else:
            found = {name: (tmp_path / "out" / name).read_bytes() for name in names}
            counts["unused" if found == expected else "wrong"] += 1
        file.write_bytes(before)
        for left in tmp_path.glob("out*"):
            shutil.rmtree(left)
    return counts


@pytest.mark.parametrize("dtype", ["keep", "auto"])
@pytest.mark.parametrize("case", ["qwen2_e_full_fullvis", "qwen2_f_zero3_full",
                                  "llama_d_lora_vislora", "bin"])  # fmt: skip
def test_bits_flipped_at_random(case: str, dtype: str, checkpoints: Path, tmp_path: Path) -> None:
    named = "qwen2_e_full_fullvis" if case == "bin" else case
    options = {**CASES[named].options(checkpoints), "dtype": dtype}
    source = tmp_path / "iter_2.pth"
    original = checkpoints / named / "iter_2.pth"
    (shutil.copytree if original.is_dir() else shutil.copy)(original, source)
    files = [source] if source.is_file() else sorted(source.glob("*.pt"))
    if case == "bin":
        source = as_bin(checkpoints / named / "iter_2_xtuner", tmp_path / "iter_2_xtuner")
        files = sorted(source.rglob("*.bin"))
    counts = damage_everywhere(source, files, options, tmp_path, int(os.environ.get("PLACES", "6")))
    print(f"\n{case} {dtype}: {json.dumps(counts)}")
    assert counts["wrong"] == 0


def as_bin(folder: Path, copy: Path) -> Path:
    """The XTuner folder with `.bin` files in place of safetensors."""
    from safetensors.torch import load_file

    shutil.copytree(folder, copy)
    for path in sorted(copy.rglob("*.safetensors")):
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    for index in copy.rglob("*.index.json"):
        index.unlink()
    return copy
