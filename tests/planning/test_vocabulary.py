"""New rows of a vocabulary: how many, what they are, and that they cost no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storing import stored
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.planning.language_model import LanguageModel, vocabulary_tensors
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.mean import Mean

FAMILY = Catalogue.shipped().families["qwen2"]
QWEN2: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [
        (151936, 151647, 151936),  # Qwen 2: free rows are enough
        (32000, 32002, 32064),  # Llama 2: as XTuner's export and llava-hf have it
        (151851, 151852, 151872),
        (384, 384, 384),
        (384, 385, 448),
        (400, 448, 448),
        (400, 449, 512),
    ],
)
def test_how_many_rows(rows: int, tokens: int, expected: int) -> None:
    llm = LanguageModel(FAMILY, {**QWEN2, "vocab_size": rows}, {}, {}, ())
    assert llm.with_rows_for(tokens).rows == expected


def test_only_tensors_over_the_vocabulary_grow() -> None:
    """Sizes do not say which: here every size is 8."""
    names = vocabulary_tensors(Catalogue.shipped().classes["qwen2"], QWEN2)
    assert names == ["model.embed_tokens.weight", "lm_head.weight"]


def read(tensor: LazyTensor) -> Any:
    return tensor.read(0, tensor.rows)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_row_is_the_mean_rounded_once(tmp_path: Path, dtype: str) -> None:
    import torch

    # In float16 the sum would be infinite, and in bfloat16 it would stop growing.
    rows = (torch.arange(3000.0).view(1000, 3) * 20).to(getattr(torch, dtype))
    mean = Mean(stored(tmp_path, "w", rows), 2)
    assert (mean.shape, mean.dtype.name, mean.ranges()) == ((2, 3), dtype, None)
    expected = rows.double().mean(0).to(rows.dtype)
    assert torch.equal(read(mean), expected.expand(2, 3))
    assert torch.equal(mean.read(1, 2), expected[None])


def test_rows_are_added_behind_and_others_stay(tmp_path: Path) -> None:
    import torch

    weight = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    embed, norm = "model.embed_tokens.weight", "model.norm.weight"
    tensors = {embed: stored(tmp_path, "embed", weight), norm: stored(tmp_path, "n", weight)}
    llm = LanguageModel(FAMILY, {**QWEN2, "vocab_size": 2}, tensors, {}, ())
    made = llm.with_rows_for(4)
    assert made.values["vocab_size"] == 64
    assert read(made.tensors[embed])[:4].tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert made.tensors[norm] is tensors[norm] and {*made.tensors} == {embed, norm}
    assert llm.with_rows_for(2) is llm


def test_the_mean_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    import torch

    rows = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(0))
    source = stored(tmp_path, "w", rows)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(read(Mean(source, 1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_it_is_read_in_blocks_and_once(tmp_path: Path) -> None:
    import torch

    class Counting(LazyTensor):
        def __init__(self) -> None:
            self.inner = stored(tmp_path, "w", torch.ones(40_000, 64))
            self.dtype, self.shape = self.inner.dtype, self.inner.shape
            self.blocks: list[int] = []

        def read(self, start: int, stop: int) -> torch.Tensor:
            self.blocks.append(stop - start)
            return self.inner.read(start, stop)

        def leaves(self) -> Any:
            yield self.inner

    source = Counting()
    mean = Mean(source, 64)
    assert source.blocks == []  # planning reads nothing
    read(mean), mean.read(3, 9)
    assert sum(source.blocks) == 40_000
    assert max(source.blocks) * 64 * 4 <= 4 << 20


@pytest.mark.parametrize("shape", [(0, 4), (4,), ()])
def test_what_has_no_mean(tmp_path: Path, shape: tuple[int, ...]) -> None:
    import torch

    with pytest.raises(ValueError, match="no rows to take the mean of"):
        Mean(stored(tmp_path, "w", torch.zeros(shape)), 1)


# The format's file


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("config: {nest: {llm: text_config, audio: audio_config}}", "`nest` has no key `audio`"),
        ("config: {nest: {llm: [a]}}", "`llm` is a text"),
        ("tokens: {picture: '<image>'}", "`tokens` has no key `picture`"),
        ("processor: 5", "`processor` is a text"),
        ("require: [{that: projector.depth == 2}]", "a requirement needs `because`"),
    ],
)
def test_faults_of_a_format_file(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    parts = "{llm: [], projector: [], visual_encoder: []}"
    path.write_text(f"schema: 1\nformat: mine\nclasses: {{}}\ntensors: {parts}\n{lines}\n")
    (fault,) = Catalogue.shipped().check(path)
    assert message in fault.what
    assert fault.where == "mine.yaml:5"
