"""`config.json` of the output, as plain JSON in the vocabulary of transformers 4.37.

Never through `save_pretrained` of a newer transformers: LLaVA's pinned 4.37.2 reads its
`rope_parameters` and `dtype` as nothing at all, and silently takes defaults. Version 5 still reads
`rope_theta`, `rope_scaling` and `torch_dtype`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from xtuner2llava.mapping import Format, PlainClass
from xtuner2llava.planning.generation import TokenIds
from xtuner2llava.storage.json_file import Json

VOCABULARY = "4.37.2"


def output_config(
    format_: Format,
    llm: tuple[PlainClass, Mapping[str, object]],
    tower: tuple[PlainClass, Mapping[str, object]],
    format_keys: Mapping[str, object],
    *,
    model_type: str | None = None,
    dtype: str,
    ids: TokenIds,
) -> dict[str, Json]:
    """The whole config: the LLM's keys at the top, or nested where the format says so.

    Of `llm` and `tower`, these are the class and its config, every key explicit: defaults differ
    between versions. `model_type`, if given, is written in place of the format's own.
    """
    plain, values = llm
    described = format_.classes[plain.name]
    # One eos id, which is all that LlamaConfig promises; generation_config has the whole list.
    tokens: dict[str, object] = {
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos[0] if ids.eos else None,
    }
    if ids.pad is not None:
        tokens["pad_token_id"] = ids.pad
    if "llm" in format_.nest:
        inner = {
            **values,
            "architectures": [plain.architecture],
            "model_type": plain.model_type,
            "torch_dtype": dtype,
            "use_cache": True,
            **tokens,
        }
        values = {format_.nest["llm"]: _sorted(inner)}
    if "vision" in format_.nest:
        # What CLIP's text tower would need of it is left to defaults.
        vision = {**tower[1], "model_type": tower[0].model_type}
        values = {**values, format_.nest["vision"]: _sorted(vision)}
    return _sorted(
        {
            **values,
            **format_keys,
            "architectures": [described.architecture],
            "model_type": model_type or described.model_type,
            "torch_dtype": dtype,
            "transformers_version": VOCABULARY,
            **tokens,
        }
    )


def json_bytes(values: Mapping[str, Json]) -> bytes:
    """JSON as transformers writes it: two spaces, sorted keys, a newline at the end."""
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode("utf-8")


def _sorted(values: Mapping[str, object]) -> dict[str, Json]:
    """Values of YAML expressions and JSON, which are JSON by construction, by their names."""
    return cast("dict[str, Json]", dict(sorted(values.items())))
