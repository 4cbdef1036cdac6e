"""`config.json` of the output, as plain JSON in the vocabulary of transformers 4.37.

Never through `save_pretrained` of a newer transformers: LLaVA's pinned 4.37.2 reads its
`rope_parameters` and `dtype` as nothing at all, and silently takes defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from xtuner2llava.planning.generation import TokenIds
from xtuner2llava.storage.json_file import Json

VOCABULARY = "4.37.2"


def output_config(
    llm: Mapping[str, Json],
    format_keys: Mapping[str, Json],
    *,
    architecture: str,
    model_type: str,
    dtype: str,
    ids: TokenIds,
) -> dict[str, Json]:
    """The whole config: the plain LLM's keys, the format's, and who may load it, sorted by name."""
    values: dict[str, Json] = {
        **llm,
        **format_keys,
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": dtype,
        "transformers_version": VOCABULARY,
    }
    # One eos id, which is all that LlamaConfig promises; generation_config has the whole list.
    first_eos = ids.eos[0] if ids.eos else None
    for key, value in (("bos_token_id", ids.bos), ("eos_token_id", first_eos)):
        values[key] = value
    if ids.pad is not None:
        values["pad_token_id"] = ids.pad
    return dict(sorted(values.items()))


def json_bytes(values: Mapping[str, Json]) -> bytes:
    """JSON as transformers writes it: two spaces, sorted keys, a newline at the end."""
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode("utf-8")
