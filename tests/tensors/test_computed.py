"""Tensors that are computed: what they are made of, and what they cost."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from storing import stored
from xtuner2llava.tensors.computed import Columns, Fill, Normalize, Transpose, cast
from xtuner2llava.tensors.dtype import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.lora import Merge, Reshaped
from xtuner2llava.tensors.mean import Mean
from xtuner2llava.tensors.rounding import first_overflow
from xtuner2llava.tensors.rows import concat, split

INF = float("inf")


def matrix(tmp_path: Path, *rows: list[float]) -> LazyTensor:
    return stored(tmp_path, "w", torch.tensor(rows))


def test_a_cast_to_the_same_dtype_is_the_tensor_itself(tmp_path: Path) -> None:
    source = matrix(tmp_path, [1.0])
    assert cast(source, FLOAT32) is source
    other = cast(source, FLOAT16)
    assert (other.dtype, other.stored_dtype, other.ranges()) == (FLOAT16, FLOAT32, None)


def test_a_cast_rounds_half_to_even(tmp_path: Path) -> None:
    half = 2.0**-11
    source = matrix(tmp_path, [1 + half, 1 + 3 * half, 1 + half + 2.0**-23, 65519.9])
    assert cast(source, FLOAT16).read(0, 1).tolist() == [[1.0, 1 + 4 * half, 1 + 2 * half, 65504.0]]


def test_a_value_that_becomes_infinite_is_found(tmp_path: Path) -> None:
    source = matrix(tmp_path, [INF, 1.0], [65519.0, 2.0], [3.0, -65520.0])

    def found(dtype: DType, start: int, stop: int) -> tuple[int, float] | None:
        return first_overflow(source.read(start, stop), cast(source, dtype).read(start, stop))

    assert found(FLOAT16, 0, 3) == (5, -65520.0)
    assert found(FLOAT16, 2, 3) == (1, -65520.0)
    assert found(FLOAT16, 0, 2) is None
    assert found(BFLOAT16, 0, 3) is None
    assert found(FLOAT32, 0, 3) is None


def test_one_long_row_can_be_cut_where_that_is_elementwise(tmp_path: Path) -> None:
    source = matrix(tmp_path, [1.0, 2.0, 3.0, 4.0])
    flat = cast(source, FLOAT16).flat()
    assert (flat.shape, flat.read(1, 3).tolist()) == ((4,), [2.0, 3.0])
    assert Fill(FLOAT32, (2, 3), 7).flat().read(4, 6).tolist() == [7.0, 7.0]
    for whole in (Transpose(source), Normalize(source), Columns(source, 0, 2)):
        assert whole.flat() is whole


def test_normalize_divides_rows_by_their_length(tmp_path: Path) -> None:
    source = matrix(tmp_path, [3.0, 4.0], [0.0, 0.0], [1e-20, 0.0], [0.0, -2.0])
    tensor = Normalize(source)
    assert (tensor.dtype, tensor.stored_dtype, tensor.shape) == (FLOAT64, FLOAT32, (4, 2))
    rows = tensor.read(0, 4)
    # Like Baichuan2's own, it never divides by less than 1e-12.
    small = float(torch.tensor(1e-20).double() / 1e-12)
    assert rows.tolist() == [[3 / 5, 4 / 5], [0.0, 0.0], [small, 0.0], [0.0, -1.0]]
    assert torch.equal(tensor.read(3, 4), rows[3:])


def test_normalize_is_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch.randn(500, 300)
    exact = dense.double() / dense.double().pow(2).sum(1, keepdim=True).sqrt()
    got = cast(Normalize(stored(tmp_path, "w", dense)), FLOAT16).read(0, 500)
    # numpy goes from float64 to float16 directly.
    assert (got.numpy() == exact.numpy().astype("float16")).all()
    twice = torch.nn.functional.normalize(dense).half()
    assert int((got != twice).sum()) > 0


def test_what_a_row_costs_bounds_a_block(tmp_path: Path) -> None:
    source = matrix(tmp_path, [1.0, 2.0, 3.0, 4.0])  # 16 bytes a row
    assert source.row_cost == 16
    assert cast(source, FLOAT16).row_cost == 8 + 16
    assert Columns(source, 0, 1).row_cost == 4 + 16
    assert Normalize(source).row_cost == 32 + 16
    assert Reshaped(source, (2, 2)).row_cost == 16
    assert cast(Fill(FLOAT32, (2, 3), 0), FLOAT16).row_cost == 6 + 12


def test_a_mean_is_stored_as_its_source_is(tmp_path: Path) -> None:
    half = stored(tmp_path, "half", torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float16))
    assert Mean(cast(half, FLOAT32), 3).stored_dtype is FLOAT16


def test_a_mean_goes_to_another_process(tmp_path: Path) -> None:
    mean = Mean(matrix(tmp_path, [1.0, 2.0], [3.0, 6.0]), 3)
    assert mean.read(0, 1).tolist() == [[2.0, 4.0]]
    again = pickle.loads(pickle.dumps(mean))  # noqa: S301 - its own
    assert again.read(1, 3).tolist() == [[2.0, 4.0]] * 2


def test_what_is_held_beside_the_rows_is_counted(tmp_path: Path) -> None:
    weight = stored(tmp_path, "w", torch.ones(3, 4))
    left, right = stored(tmp_path, "b", torch.ones(3, 2)), stored(tmp_path, "a", torch.ones(2, 4))
    magnitude = stored(tmp_path, "m", torch.ones(3))
    assert weight.fixed_cost == 0
    # The right factor as it is stored and in float64, and a length and a magnitude for each row.
    merged = Merge(weight, left, right, 1.0, magnitude)
    assert Merge(weight, left, right, 1.0).fixed_cost == 0 and merged.fixed_cost == 2 * 3 * 8
    # One factor is read whole, once for all threads; of two tensors, each has its own.
    assert merged.shared_cost == cast(merged, FLOAT16).shared_cost == 2 * 4 * (4 + 8)
    assert concat([merged, Merge(weight, left, right, 1.0)]).shared_cost == 2 * merged.shared_cost
    assert split(merged, [1, 2])[1].shared_cost == merged.shared_cost
    # The sum and the mean in float64, and a block as it is stored and in float64.
    assert Mean(weight, 1).fixed_cost == 2 * 4 * 8 + 3 * (1 << 20)


def test_leaves_are_the_stored_tensors(tmp_path: Path) -> None:
    source = matrix(tmp_path, [1.0, 2.0])
    for computed in (
        cast(source, FLOAT16),
        Columns(source, 0, 1),
        Transpose(source),
        Normalize(source),
        Reshaped(source, (2, 1)),
    ):
        assert list(computed.leaves()) == [source]
    assert list(Fill(FLOAT32, (1,), 0).leaves()) == []


@pytest.mark.parametrize("kind", [Transpose, Normalize])
def test_only_matrices(kind: type[LazyTensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a matrix is needed, shape \(1,\) is none"):
        kind(stored(tmp_path, "b", torch.ones(1)))  # type: ignore[call-arg]
