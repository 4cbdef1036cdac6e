"""Values that do not fit: overflow is refused, NaN and infinity are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storing import stored
from xtuner2llava.errors import PlanError
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import BFLOAT16, FLOAT16, FLOAT32, DType
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.rows import concat, split
from xtuner2llava.tensors.stored import Stored
from xtuner2llava.writing.disk import BLOCK_BYTES
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.nonfinite import NonFinite, count_nonfinite
from xtuner2llava.writing.shards import plan_shards
from xtuner2llava.writing.writer import Written, write_shards

NAN, INF = float("nan"), float("inf")


def write(tmp_path: Path, tensors: dict[str, LazyTensor]) -> Written:
    plan = plan_shards(tensors)
    with OutputFolder(tmp_path / "out", plan.fingerprint("")) as folder:
        written = write_shards(folder, plan.shards)
        folder.publish()
    return written


@pytest.mark.parametrize(
    ("dtype", "value", "text"),
    [
        (FLOAT16, 65520.0, "65520, which overflows float16, whose largest value is 65504"),
        (FLOAT16, -1e6, "-1e+06, which overflows float16, whose largest value is 65504"),
        (BFLOAT16, 3.4e38, "3.4e+38, which overflows bfloat16, whose largest value is 3.38953e+38"),
    ],
)
def test_a_finite_value_that_becomes_infinite_is_refused(
    dtype: DType, value: float, text: str, tmp_path: Path
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    # Wide enough for several blocks; the fault is in the last of them, behind an honest infinity.
    tensor = torch.zeros(3, 2_000_000)
    tensor[2, 1_999_997] = INF
    tensor[2, 1_999_998] = value
    path = sources / "big.bin"
    path.write_bytes(tensor.numpy().tobytes())
    piece = FileRange(SourceFile.of(path), 0, 24_000_000)
    lazy = Stored("llm.w", FLOAT32, (3, 2_000_000), (piece,))
    with pytest.raises(PlanError) as caught:
        write(tmp_path, {"model.w": cast(lazy, dtype)})
    (fault,) = caught.value.faults
    assert fault.where == "model.w"
    assert fault.what == f"element [2, 1999998] is {text}"
    expected = "bfloat16 or --dtype float32" if dtype == FLOAT16 else "float32"
    assert fault.advice == f"Convert with --dtype {expected}."
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_what_overflows_is_named_in_a_tensor_made_of_rows_of_others(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    values = torch.zeros(40, 40_000)
    values[11, 39_990] = INF
    values[12, 7] = 70_000.0
    parts = split(stored(sources, "qkv", values), [20, 20])
    swapped = concat([parts[1], parts[0]])
    with pytest.raises(PlanError) as caught:
        write(tmp_path, {"model.w": cast(swapped, FLOAT16)})
    (fault,) = caught.value.faults
    assert fault.what.startswith("element [32, 7] is 70000, which overflows float16")


def test_the_largest_value_that_rounds_down_is_no_overflow(tmp_path: Path) -> None:
    tensor = stored(tmp_path, "w", torch.tensor([65519.0, -65504.0]))
    assert write(tmp_path, {"w": cast(tensor, FLOAT16)}).nonfinite == ()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_nan_and_infinity_in_copied_tensors_are_reported(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    values = torch.tensor([0.0, NAN, 1.0, INF, -INF, -NAN, -2.0, NAN], dtype=dtype)
    written = write(
        tmp_path,
        {
            "bad": stored(tmp_path, "bad", values),
            "negative": stored(tmp_path, "negative", values[4:5]),
            "good": stored(tmp_path, "good", torch.tensor([1.0, -1.0], dtype=dtype)),
        },
    )
    assert written.nonfinite == (NonFinite("bad", 3, 2), NonFinite("negative", 0, 1))


def test_nan_and_infinity_in_cast_tensors_are_reported(tmp_path: Path) -> None:
    tensor = stored(tmp_path, "w", torch.tensor([[1.0, NAN], [INF, -INF]]))
    written = write(tmp_path, {"w": cast(tensor, FLOAT16)})
    assert written.nonfinite == (NonFinite("w", 1, 2),)


def test_findings_are_counted_over_all_blocks_of_a_tensor(tmp_path: Path) -> None:
    end = BLOCK_BYTES // 4  # of the first block
    values = torch.zeros(2 * end + 1)
    values[[0, end - 1, end, -1]] = torch.tensor([NAN, INF, NAN, -INF])
    written = write(tmp_path, {"w": stored(tmp_path, "w", values)})
    assert written.nonfinite == (NonFinite("w", 2, 2),)


def test_integers_are_never_nan(tmp_path: Path) -> None:
    values = torch.full((4,), -1, dtype=torch.int32)  # As float32, all of these bits are NaN.
    assert write(tmp_path, {"w": stored(tmp_path, "w", values)}).nonfinite == ()


@given(st.binary(max_size=400).map(lambda data: data[: len(data) // 8 * 8]))
def test_counting_agrees_with_numpy_on_any_bits(data: bytes) -> None:
    for code, kind in (("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2")):
        values = np.frombuffer(data, dtype=kind)
        expected = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        assert count_nonfinite(memoryview(data), code) == expected
    brain = torch.tensor(list(data), dtype=torch.uint8).view(torch.bfloat16)
    expected = int(brain.isnan().sum()), int(brain.isinf().sum())
    assert count_nonfinite(memoryview(data), "BF16") == expected
