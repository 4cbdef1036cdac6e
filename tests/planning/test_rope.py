"""XTuner's change of RoPE for a longer context."""

from __future__ import annotations

import pytest

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.planning.language_model import linear_rope_factor


@pytest.mark.parametrize(
    ("wanted", "original", "factor", "expected"),
    [
        (None, 4096, 1, None),
        (4096, 4096, 1, None),
        (2048, 4096, 1, None),
        (8192, 4096, 1, 2.0),
        (8193, 4096, 1, 3.0),  # rounded up
        (8192, 4096, 2, None),  # the base's own scaling already reaches that far
        (16384, 4096, 2, 2.0),  # and then replaces it: 2, not 4
        (10000, 4096, 1.5, 2.0),
        (8192, None, 1, None),
        (8192, 0, 1, None),
    ],
)
def test_factor(
    wanted: int | None, original: int | None, factor: float, expected: float | None
) -> None:
    found = linear_rope_factor(wanted, original, factor)
    assert found == expected
    assert isinstance(found, float) is (expected is not None)


@pytest.mark.parametrize("factor", [0, -1, 5e-324, float("nan"), float("inf")])
def test_senseless_factors_are_refused(factor: float) -> None:
    with pytest.raises(UnsupportedError, match="rope_scaling"):
        linear_rope_factor(8192, 4096, factor)
