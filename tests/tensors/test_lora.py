"""LoRA merges: right in every bit, whatever the rank and the dtype."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from storing import stored
from xtuner2llava.tensors.computed import Columns, Transpose, cast
from xtuner2llava.tensors.dtype import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.lora import Merge, Reshaped
from xtuner2llava.tensors.rows import concat, deinterleave, split

ROWS, COLUMNS = 512, 2048


def whole(tensor: LazyTensor) -> torch.Tensor:
    return tensor.read(0, tensor.rows)


def lazy(folder: Path) -> Callable[[torch.Tensor], LazyTensor]:
    return lambda tensor: stored(folder, "w", tensor)


def correctly_rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`exact` rounded once. numpy does so for float16; bfloat16 is done on the bits of float64."""
    if dtype == torch.float16:
        return torch.from_numpy(exact.numpy().astype(np.float16))
    if dtype == torch.float32:
        return torch.from_numpy(exact.numpy().astype(np.float32))
    bits = exact.numpy().view(np.uint64)
    lost = np.uint64(52 - 7)
    even = (bits >> lost) & np.uint64(1)
    rounded = (bits + (np.uint64(1) << (lost - np.uint64(1))) - np.uint64(1) + even) >> lost << lost
    return torch.from_numpy(rounded.view(np.float64)).bfloat16()  # all of these are bfloat16s


def spacing(values: torch.Tensor) -> torch.Tensor:
    """The distance from each value to the next one of its dtype, as float64."""
    magnitude = values.abs()
    integers = {2: torch.int16, 4: torch.int32}[values.itemsize]
    after = (magnitude.view(integers) + 1).view(values.dtype)
    return after.double() - magnitude.double()


class Random:
    """A weight as large as those of LLMs, and an adapter that changes it as training does."""

    def __init__(self, rank: int, stored_as: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(rank)
        self.weight = (torch.randn(ROWS, COLUMNS) * 0.02).to(stored_as)
        self.left = torch.randn(ROWS, rank) * 0.02
        self.right = torch.randn(rank, COLUMNS) * 0.02
        self.scale = 5 / math.sqrt(rank)
        product = self.left.double() @ self.right.double()
        self.exact = self.weight.double() + self.scale * product

    def merged(self, folder: Path) -> Merge:
        as_lazy = lazy(folder)
        return Merge(as_lazy(self.weight), as_lazy(self.left), as_lazy(self.right), self.scale)

    def in_float32(self) -> torch.Tensor:
        return torch.addmm(self.weight.float(), self.left, self.right, alpha=self.scale)


def test_the_sum_on_readable_values(tmp_path: Path) -> None:
    as_lazy = lazy(tmp_path)
    weight = as_lazy(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float16))
    left, right = as_lazy(torch.tensor([[1.0], [10.0]])), as_lazy(torch.tensor([[1.0, 0.0, -1.0]]))
    merged = Merge(weight, left, right, 0.5)
    assert (merged.dtype, merged.stored_dtype, merged.ranges()) == (FLOAT64, FLOAT16, None)
    assert whole(merged).tolist() == [[1.5, 2.0, 2.5], [9.0, 5.0, 1.0]]
    assert merged.read(1, 2).tolist() == [[9.0, 5.0, 1.0]]
    assert list(merged.leaves()) == [weight, left, right]


@pytest.mark.parametrize("rank", [8, 64, 512])
@pytest.mark.parametrize("target", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_no_element_is_further_than_half_a_unit_from_float64(
    rank: int, target: DType, tmp_path: Path
) -> None:
    random = Random(rank)
    merged = cast(random.merged(tmp_path), target)
    # In blocks, as a writer reads it.
    blocks = [merged.read(start, min(start + 100, ROWS)) for start in range(0, ROWS, 100)]
    got = torch.cat(blocks)
    error = (got.double() - random.exact).abs() / spacing(got)
    assert float(error.max()) <= 0.5 + 1e-6
    if target != FLOAT32:  # of that, float64 itself may leave one in doubt
        assert torch.equal(got, correctly_rounded(random.exact, target.torch))

    # The same sum in float32, rounded to nearest, is wrong in many places.
    naive = random.in_float32().to(target.torch)
    assert int((naive != got).sum()) > 5
    error = (naive.double() - random.exact).abs() / spacing(naive)
    assert float(error.max()) > 0.5005


def test_float64_rounded_by_way_of_float32_would_be_wrong_too(tmp_path: Path) -> None:
    random = Random(64)
    expected = correctly_rounded(random.exact, torch.float16)
    assert int((random.exact.half() != expected).sum()) > 20
    assert int((random.exact.float().half() != expected).sum()) > 20


def test_small_values_are_right_too(tmp_path: Path) -> None:
    # Below 2**-14, float16 has fewer and fewer bits.
    random = Random(16)
    random.weight, random.scale = (random.weight.float() * 2.0**-9).bfloat16(), 2.0**-8
    random.exact = random.weight.double() + random.scale * (
        random.left.double() @ random.right.double()
    )
    got = whole(cast(random.merged(tmp_path), FLOAT16))
    assert torch.equal(got, correctly_rounded(random.exact, torch.float16))
    assert float(got.abs().median()) < 2.0**-14


@pytest.mark.parametrize("stored_as", [torch.float32, torch.float16])
def test_weights_of_other_dtypes(stored_as: torch.dtype, tmp_path: Path) -> None:
    random = Random(16, stored_as)
    got = whole(cast(random.merged(tmp_path), FLOAT16))
    assert torch.equal(got, correctly_rounded(random.exact, torch.float16))


def test_a_magnitude_sets_the_length_of_rows(tmp_path: Path) -> None:
    as_lazy = lazy(tmp_path)
    weight = as_lazy(torch.tensor([[2.0, 4.0], [0.0, 5.0]]))
    left, right = as_lazy(torch.tensor([[1.0], [12.0]])), as_lazy(torch.tensor([[1.0, 0.0]]))
    magnitude = as_lazy(torch.tensor([10.0, 26.0]))
    # The sums are [3, 4], 5 long, and [12, 5], 13 long.
    merged = Merge(weight, left, right, 1.0, magnitude)
    assert whole(merged).tolist() == [[6.0, 8.0], [24.0, 10.0]]
    assert merged.read(1, 2).tolist() == [[24.0, 10.0]]
    assert list(merged.leaves())[-1] is magnitude
    with pytest.raises(ValueError, match=r"a magnitude of shape \[1\] for 2 rows"):
        Merge(weight, left, right, 1.0, as_lazy(torch.ones(1)))


@pytest.mark.parametrize(
    ("weight", "left", "right"),
    [
        ((4, 6), (4, 2), (3, 6)),
        ((4, 6), (5, 2), (2, 6)),
        ((4, 6), (4, 2), (2, 5)),
        ((4, 6), (2, 4), (6, 2)),
        ((4, 6), (4,), (1, 6)),
        ((4, 6), (4, 1, 1), (1, 6)),
        ((), (1, 2), (2, 2)),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    weight: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], tmp_path: Path
) -> None:
    as_lazy = lazy(tmp_path)
    with pytest.raises(ValueError, match=r"factors of shapes .* do not fit a weight of shape"):
        Merge(*(as_lazy(torch.ones(shape)) for shape in (weight, left, right)), 1.0)


def test_what_is_made_of_a_merge_is_the_same_of_its_values(tmp_path: Path) -> None:
    random = Random(4)
    merged, exact = random.merged(tmp_path), correctly_rounded(random.exact, torch.float16)
    query, key = split(merged, [384, 128])
    wqkv = deinterleave(merged, 16, [16, 8, 8])
    grouped = exact.view(16, 32, COLUMNS)
    for part, expected in [
        (query, exact[:384]),
        (key, exact[384:]),
        (wqkv[1], grouped[:, 16:24].reshape(-1, COLUMNS)),
        (concat([key, query]), torch.cat([exact[384:], exact[:384]])),
        (Columns(merged, 5, 50), exact[:, 5:50]),
        (Transpose(merged), exact.T),
        (Reshaped(merged, (8, 256)), exact.view(ROWS, 8, 256)),
    ]:
        assert part.stored_dtype == BFLOAT16
        got = cast(part, FLOAT16)
        assert torch.equal(whole(got), expected)
        assert torch.equal(got.read(3, 70), expected[3:70])


def test_two_weights_read_in_turn_do_not_get_each_others_factor(tmp_path: Path) -> None:
    # A factor is kept while its weight is read; threads and other weights must not see it.
    first, second = Random(2), Random(3)
    merges = [(random.merged(tmp_path), random.exact) for random in (first, second)]
    for start in range(0, 500, 100):
        for merged, exact in merges:
            close = torch.isclose(merged.read(start, start + 100), exact[start : start + 100])
            assert bool(close.all())
    failures: list[object] = []

    def read(merged: Merge, exact: torch.Tensor) -> None:
        for start in range(0, 500, 50):
            if not torch.allclose(merged.read(start, start + 50), exact[start : start + 50]):
                failures.append(start)

    threads = [threading.Thread(target=read, args=pair) for pair in merges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_convolution_is_a_matrix_of_its_filters(tmp_path: Path) -> None:
    as_lazy = lazy(tmp_path)
    weight = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    left, right = torch.tensor([[1.0], [2.0]]), torch.arange(12.0).view(1, 12)
    merged = Merge(as_lazy(weight), as_lazy(left), as_lazy(right), 2.0)
    expected = weight + 2 * (left @ right).view(2, 3, 2, 2)
    assert torch.equal(whole(merged), expected.double())
