"""`config.json` of a plan: the LLM's keys at the top, or nested where the format says so."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner2llava.mapping import Format, PlainClass
from xtuner2llava.planning.generation import TokenIds
from xtuner2llava.planning.hf_config import nested_config, text_config, vision_config
from xtuner2llava.planning.llava_config import output_config
from xtuner2llava.storage.json_file import Json


def config_json(
    format_: Format,
    target_class: PlainClass,
    values: Mapping[str, object],
    format_keys: Mapping[str, object],
    tower_class: PlainClass,
    tower: Mapping[str, object],
    *,
    model_type: str | None,
    dtype: str,
    ids: TokenIds,
) -> dict[str, Json]:
    """The whole config. `model_type`, if given, stands in place of the format's own."""
    described = format_.classes[target_class.name]
    keys, kind = _json(format_keys), model_type or described.model_type
    nest = format_.nest
    if "llm" not in nest:
        return output_config(
            _json(values),
            keys,
            architecture=described.architecture,
            model_type=kind,
            dtype=dtype,
            ids=ids,
        )
    nested = {nest["llm"]: text_config(target_class, _json(values), dtype, ids)}
    if "vision" in nest:
        nested[nest["vision"]] = vision_config(tower_class, _json(tower))
    return nested_config(
        nested,
        keys,
        architecture=described.architecture,
        model_type=kind,
        dtype=dtype,
        ids=ids,
    )


def _json(values: Mapping[str, object]) -> dict[str, Json]:
    """Config values from YAML expressions and JSON, which are JSON by construction."""
    return {key: value for key, value in values.items()}  # type: ignore[misc]
