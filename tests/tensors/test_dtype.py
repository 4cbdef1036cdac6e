"""The table of dtypes: what torch and safetensors say of each."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from xtuner2llava.tensors.dtype import BY_CODE, BY_NAME, DType


@pytest.mark.parametrize("dtype", BY_NAME.values(), ids=str)
def test_sizes_and_codes_are_those_of_torch_and_safetensors(dtype: DType) -> None:
    assert dtype.itemsize == dtype.torch.itemsize
    assert dtype.is_float == dtype.torch.is_floating_point
    file = save({"w": torch.zeros(3, dtype=dtype.torch)})
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    assert BY_CODE[header["w"]["dtype"]] is dtype
    assert header["w"]["data_offsets"] == [0, 3 * dtype.itemsize]
