"""Rows for the tokens that the Hugging Face format adds.

An LLM often has more rows than tokens (Qwen 2: 151,936 and 151,646); new tokens take those that are
free, as they are. Where there are too few, each tensor over the vocabulary grows by rows that are
the mean of its others. A mean has two advantages over zeros: in the head its logit is the
mean of all others, so a token without training is never the likeliest; and transformers before
4.45 takes text positions whose embedding is zero for places of images (`modeling_llava.py`,
`_merge_input_ids_with_image_features`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xtuner2llava.mapping import PlainClass
from xtuner2llava.tensors import LazyTensor, Mean, concat

# What XTuner's export and the models of llava-hf pad to: matrix products like it.
_MULTIPLE = 64


def rows_for(rows: int, tokens: int) -> int:
    """How many rows a vocabulary of `rows` needs for ids below `tokens`."""
    return rows if tokens <= rows else -(-tokens // _MULTIPLE) * _MULTIPLE


def vocabulary_tensors(plain: PlainClass, values: Mapping[str, object]) -> list[str]:
    """The tensors of a class that have a row for each token, such as `lm_head.weight`."""
    return [
        name
        for name, expected in plain.tensors(values).items()
        if expected.formulas and expected.formulas[0].strip() == "vocab_size"
    ]


def with_rows(
    tensors: Mapping[str, LazyTensor], names: Iterable[str], rows: int
) -> dict[str, LazyTensor]:
    """`tensors`, of which `names` have `rows` rows: new ones are the mean of those that are there.

    Names that are not among `tensors`, such as a tied head, are passed over.
    """
    result = dict(tensors)
    for name in names:
        tensor = result.get(name)
        if tensor is not None and rows > tensor.rows:
            result[name] = concat([tensor, Mean(tensor, rows - tensor.rows)])
    return result
