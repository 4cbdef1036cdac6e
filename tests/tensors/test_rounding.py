"""Values between two neighbours of a dtype go to the nearer one; in the middle, to the even one."""

from __future__ import annotations

import pytest
import torch

from xtuner2llava.tensors.rounding import round_to

INF = float("inf")
# dtype, number of its finite values from zero on, and what follows the largest of them.
FLOATS = [(torch.float16, 0x7C00, 65536.0), (torch.bfloat16, 0x7F80, 2.0**128)]


def neighbours(dtype: torch.dtype, finite: int, beyond: float) -> tuple[torch.Tensor, torch.Tensor]:
    """All numbers from zero on, as bits and as float64, and what follows the largest."""
    bits = torch.arange(finite + 1, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).double()
    values[-1] = beyond
    return bits, values


@pytest.mark.parametrize(("dtype", "finite", "beyond"), FLOATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_gap_of_a_dtype(dtype: torch.dtype, finite: int, beyond: float, sign: int) -> None:
    bits, values = neighbours(dtype, finite, beyond)
    middle = (values[:-1] + values[1:]) / 2
    below = torch.nextafter(middle, torch.zeros(1, dtype=torch.float64))
    above = torch.nextafter(middle, torch.full((1,), INF, dtype=torch.float64))

    def rounded(exact: torch.Tensor) -> torch.Tensor:
        alone = round_to(sign * exact, dtype).view(torch.int16) & 0x7FFF
        # Where they are few, each is looked at, and else only what float32 does not hold.
        among_others = torch.full((len(exact), 65), 0.1, dtype=torch.float64)
        among_others[:, 7] = sign * exact
        found = round_to(among_others, dtype)[:, 7].view(torch.int16) & 0x7FFF
        assert torch.equal(found, alone)
        return alone

    assert torch.equal(rounded(values[:-1]), bits[:-1])
    assert torch.equal(rounded(below), bits[:-1])
    assert torch.equal(rounded(above), bits[1:])
    assert torch.equal(rounded(middle), (bits[:-1] + 1) & ~1)
    # What it is for: torch rounds twice, and so to the wrong neighbour.
    assert int((above.to(dtype).view(torch.int16) != bits[1:]).sum()) > finite // 3


@pytest.mark.parametrize(("dtype", "finite", "beyond"), FLOATS)
def test_signs_infinities_and_nan_stay(dtype: torch.dtype, finite: int, beyond: float) -> None:
    exact = torch.tensor([-0.0, 0.0, INF, -INF, 1e300, -1e300, 5e-324, -5e-324, float("nan")])
    rounded = round_to(exact.double(), dtype)
    assert str(rounded.tolist()) == "[-0.0, 0.0, inf, -inf, inf, -inf, 0.0, -0.0, nan]"


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_a_float32_on_the_way_does_not_decide(dtype: torch.dtype) -> None:
    # 1, half of the gap above it, and very little: as float32, exactly half-way.
    gap = torch.finfo(dtype).eps
    exact = torch.tensor(
        [1 + gap / 2 + 1e-12, 1 + gap / 2, 1 + gap / 2 - 1e-12, -1 - gap / 2 - 1e-12],
        dtype=torch.float64,
    )
    assert round_to(exact, dtype).double().tolist() == [1 + gap, 1.0, 1.0, -1 - gap]


def test_other_casts_are_those_of_torch() -> None:
    values = torch.tensor([1.5, -2.25, 70000.0])
    assert torch.equal(round_to(values, torch.float16), values.half())
    assert torch.equal(round_to(values.double(), torch.float32), values)
    assert torch.equal(round_to(values.double(), torch.int16), values.double().to(torch.int16))
    assert round_to(values.view(3, 1).double(), torch.bfloat16).shape == (3, 1)
    assert round_to(values[:0].double(), torch.bfloat16).shape == (0,)


def test_many_values_are_rounded_as_one_by_one() -> None:
    # More than are worked on at a time, and not a multiple of that.
    exact = torch.linspace(-4, 4, 600_000, dtype=torch.float64).view(3, 200_000)
    expected = torch.cat([round_to(row, torch.float16) for row in exact.reshape(1000, 600)])
    assert torch.equal(round_to(exact, torch.float16).flatten(), expected)
    transposed = exact.T
    assert torch.equal(round_to(transposed, torch.float16), round_to(exact, torch.float16).T)
