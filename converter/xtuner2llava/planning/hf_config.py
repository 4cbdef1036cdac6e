"""`config.json` with the LLM's and the tower's configs nested in it.

In the vocabulary of transformers 4.37, which 5 still reads: `rope_theta` and `rope_scaling` become
`rope_parameters` there, `torch_dtype` becomes `dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping

from xtuner2llava.mapping import PlainClass
from xtuner2llava.planning.generation import TokenIds
from xtuner2llava.planning.llava_config import VOCABULARY
from xtuner2llava.storage.json_file import Json


def text_config(
    plain: PlainClass, values: Mapping[str, Json], dtype: str, ids: TokenIds
) -> dict[str, Json]:
    """The LLM's config, every key of its class explicit: defaults differ between versions."""
    keys: dict[str, Json] = {
        **values,
        "architectures": [plain.architecture],
        "model_type": plain.model_type,
        "torch_dtype": dtype,
        "use_cache": True,
        **_token_keys(ids),
    }
    return dict(sorted(keys.items()))


def vision_config(plain: PlainClass, values: Mapping[str, Json]) -> dict[str, Json]:
    """The tower's config; what CLIP's text tower would need of it is left to defaults."""
    return dict(sorted({**values, "model_type": plain.model_type}.items()))


def nested_config(
    nested: Mapping[str, Mapping[str, Json]],
    format_keys: Mapping[str, Json],
    *,
    architecture: str,
    model_type: str,
    dtype: str,
    ids: TokenIds,
) -> dict[str, Json]:
    """The whole config, sorted by name."""
    values: dict[str, Json] = {
        **_token_keys(ids),
        **{key: dict(inner) for key, inner in nested.items()},
        **format_keys,
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": dtype,
        "transformers_version": VOCABULARY,
    }
    return dict(sorted(values.items()))


def _token_keys(ids: TokenIds) -> dict[str, Json]:
    keys: dict[str, Json] = {
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos[0] if ids.eos else None,
    }
    if ids.pad is not None:
        keys["pad_token_id"] = ids.pad
    return keys
