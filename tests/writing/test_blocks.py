"""Whatever a tensor is made of, its blocks are its bytes; what overflows is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storages import Storages, trees
from storing import bytes_of
from xtuner2llava.errors import PlanError
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import BY_NAME
from xtuner2llava.writing import blocks as module
from xtuner2llava.writing.blocks import blocks, position
from xtuner2llava.writing.nonfinite import count_nonfinite
from xtuner2llava.writing.shards import Entry

FLOATS = ("float16", "bfloat16", "float32", "float64")


@pytest.fixture(scope="module")
def storages(tmp_path_factory: pytest.TempPathFactory) -> Storages:
    """Values that float16 cannot hold, and some that are not finite, are rare but everywhere."""
    values = torch.arange(120) % 97 - 13.0
    values[5::11] = torch.tensor([7e4, torch.inf, -1e30]).repeat(4)[:11]
    values[[15, 90]] = torch.nan
    return Storages(tmp_path_factory.mktemp("storages") / "all.bin", values)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_any_tree_is_written_as_torch_computes_it(storages: Storages, data: st.DataObject) -> None:
    tree, exact = data.draw(trees(storages, ("int32", *FLOATS), least=2))
    dense = exact
    if tree.dtype.is_float:
        others = [name for name in FLOATS if name != str(tree.dtype)]
        target = data.draw(st.sampled_from(others + [None] * (tree.unrounded() is None)))
        if target is not None:
            tree, dense = cast(tree, BY_NAME[target]), exact.to(getattr(torch, target))
    lost = (exact.isfinite() & dense.isinf()).flatten().nonzero().flatten().tolist()
    entry = Entry("t", tree, 0)
    with pytest.MonkeyPatch.context() as patch:
        # Blocks of a few elements, so that most trees have several.
        patch.setattr(module, "BLOCK_BYTES", data.draw(st.sampled_from((8, 24))))
        patch.setattr(module, "_ELEMENTS_BYTES", 40)
        patch.setattr(module, "_ROWS_BYTES", 100)
        if lost:
            with pytest.raises(PlanError) as caught:
                list(blocks(entry))
            element = list(position(lost[0], tree.shape))
            assert caught.value.faults[0].what.startswith(f"element {element} is ")
            return
        data_found = bytearray(b"".join(bytes(block) for block in blocks(entry)))
    assert len(data_found) == len(bytes_of(dense))
    found = torch.frombuffer(data_found + bytes(8), dtype=dense.dtype)[: dense.numel()]
    # Which NaN a NaN becomes, torch says otherwise at the end of a block than within.
    assert bytes_of(_without_nan(found)) == bytes_of(_without_nan(dense.flatten()))
    if tree.dtype.is_float:
        expected = int(dense.isnan().sum()), int(dense.isinf().sum())
        assert count_nonfinite(memoryview(data_found), tree.dtype.code) == expected


def _without_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.where(~tensor.isnan(), -7) if tensor.is_floating_point() else tensor
