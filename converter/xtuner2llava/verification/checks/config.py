"""What must hold between the config, the tensors, the generation settings and the processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner2llava.planning.config import valid_settings
from xtuner2llava.planning.image_processor import (
    PREPROCESSOR,
    PROCESSOR,
    image_processor_faults,
    processor_faults,
)
from xtuner2llava.sources.artifact import LLM, VISUAL_ENCODER
from xtuner2llava.storage.json_file import Json, integer
from xtuner2llava.verification.folder import LLAVA_CLASSES, ConvertedFolder
from xtuner2llava.verification.outcome import FAILED, OK, SKIPPED, WARNING, Finding, judge
from xtuner2llava.verification.plain_model import plain_config

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LARGEST_CROP = 1 << 16  # pixels
# What loaders must find; of some, only one value is right. LLaVA takes a missing
# `mm_use_im_patch_token` for true, and adds a token (LLaVA `llava/model/builder.py`).
_VALUES: Mapping[str, Mapping[str, Json]] = {
    "llava": {
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "use_cache": True,
    },
    "hf": {
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
    },
}
_KEYS = {
    "llava": (
        "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer", "mm_vision_tower",
        "unfreeze_mm_vision_tower", "image_aspect_ratio", "vocab_size", "eos_token_id",
    ),
    "hf": ("vision_feature_layer", "text_config", "vision_config"),
}  # fmt: skip


def keys(out: ConvertedFolder) -> Finding:
    """Keys that are missing, or have a value that they must not have."""
    config, values = out.config, _VALUES[out.format]
    faults = [f"{key} is missing" for key in (*values, *_KEYS[out.format]) if key not in config]
    faults += [
        f"{key} is {config[key]!r}, expected {value!r}"
        for key, value in values.items()
        if config.get(key, value) != value
    ]
    if out.format == "llava":
        faults += [
            f"{key} is a word of transformers 5, which LLaVA's 4.37.2 does not read"
            for key in ("rope_parameters", "dtype")
            if key in config
        ]
        known = LLAVA_CLASSES[out.architecture][1]
        if config.get("model_type") not in (known, "llava"):
            faults.append(f"model_type is {config.get('model_type')!r}, expected {known}")
    return judge(faults, f"{out.architecture} finds what it reads")


def vocabulary(out: ConvertedFolder) -> Finding:
    """The rows of embedding and head against vocab_size."""
    claimed, llm = out.text.get("vocab_size"), out.part(LLM)
    rows = {name: llm[name].rows for name in (_EMBEDDING, _HEAD) if name in llm}
    wrong = {name: n for name, n in rows.items() if n != claimed}
    faults = [f"{name} has {n} rows, vocab_size is {claimed}" for name, n in wrong.items()]
    return judge(faults, f"{claimed} = rows of {' and '.join(rows)}")


def tie(out: ConvertedFolder) -> Finding:
    """Whether tie_word_embeddings says what the tensors are."""
    tied = bool(getattr(plain_config(out.text), "tie_word_embeddings", False))
    if out.format == "hf":
        # The top level counts for the whole model.
        tied = bool(out.config.get("tie_word_embeddings", tied))
    if tied is not (_HEAD in out.part(LLM)):
        return OK, "tied, the head is left out" if tied else "not tied, the head is there"
    if tied:
        what = "tie_word_embeddings is true, and lm_head.weight is there, to be overwritten"
        return FAILED, what
    return FAILED, "tie_word_embeddings is false, and there is no lm_head.weight"


def dtype(out: ConvertedFolder) -> Finding:
    """The dtype of the config against those of the tensors."""
    claimed = out.dtype
    floats = {name: t for name, t in out.tensors.items() if t.dtype.is_float}
    if out.record.get("dtype") == "keep":
        names = sorted({tensor.dtype.name for tensor in floats.values()})
        fine = f"kept as stored: {', '.join(names)}; most bytes are {claimed}"
        return judge([] if claimed in names else [f"none is {claimed}"], fine)
    wrong = {name: t.dtype for name, t in floats.items() if t.dtype.name != claimed}
    faults = [f"{name} is {kind}, torch_dtype says {claimed}" for name, kind in wrong.items()]
    return judge(faults, f"all tensors are {claimed}")


def tower(out: ConvertedFolder) -> Finding:
    """Whether loaders take the tower's tensors that are in the folder."""
    there = bool(out.part(VISUAL_ENCODER))
    if out.format == "hf":
        found = (OK, "there, as the class needs it")
        return found if there else (FAILED, "its tensors are not there")
    match there, out.config.get("unfreeze_mm_vision_tower"):
        case True, True:
            what = "which both LLaVA and NeXT load right"
            return OK, f"there, with unfreeze_mm_vision_tower: true, {what}"
        case True, _:
            what = "its tensors are there, but unfreeze_mm_vision_tower is not true"
            return FAILED, f"{what}, so that LLaVA silently takes those of mm_vision_tower"
        case False, False:
            what = "it is not here: LLaVA takes mm_vision_tower, LLaVA-NeXT computes NaN"
            return WARNING, what
    return FAILED, "unfreeze_mm_vision_tower is not false, and its tensors are not there"


def generation(out: ConvertedFolder) -> Finding:
    """Token ids within the vocabulary and alike in both configs; settings that all can load."""
    values = out.json("generation_config.json")
    if not values:
        return FAILED, "generation_config.json is missing or empty"
    size = integer(out.text, "vocab_size") or 0
    faults = []
    # In the format `hf`, ids may stand at the top or with the language model.
    config = {**out.text, **out.config}
    found = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        here, there = _ids(values, key), _ids(config, key)
        found[key] = here
        beyond = [n for n in (*here, *there) if not 0 <= n < size]
        faults += [f"{key} {n} is beyond the {size} rows" for n in beyond]
        if there and not here:
            faults.append(f"{key} is {there} in config.json and missing in generation_config.json")
        elif here and not there and key != "pad_token_id" and out.format == "llava":
            faults.append(f"{key} is {here} in generation_config.json and missing in config.json")
        elif not set(there) <= set(here):
            faults.append(f"{key} is {there} in config.json, {here} in generation_config.json")
    if not found["eos_token_id"]:
        faults.append("there is no eos_token_id, so it never stops")
    faults += valid_settings(values)[1]
    return judge(
        faults, f"eos {found['eos_token_id']}, bos {found['bos_token_id']}, all below {size}"
    )


def _ids(values: Mapping[str, Json], key: str) -> list[int]:
    value = values.get(key)
    listed = value if isinstance(value, list) else [value]
    return [n for n in listed if isinstance(n, int) and not isinstance(n, bool)]


def image_processor(out: ConvertedFolder) -> Finding:
    """The size that images are cropped to against the number of positions of the tower."""
    values: dict[str, Any] = out.json(PREPROCESSOR)
    if not values:
        return FAILED, f"{PREPROCESSOR} is missing"
    faults = [*image_processor_faults(values)]
    tower = {name.rpartition("embeddings.")[2]: t for name, t in out.part(VISUAL_ENCODER).items()}
    patch, positions = (tower.get(f"{name}_embedding.weight") for name in ("patch", "position"))
    edge = patch.shape[-1] if patch is not None and patch.shape else None
    if out.format == "hf":
        faults += processor_faults(out.json(PROCESSOR), edge)
    crop = values.get("crop_size", values.get("size"))
    if isinstance(crop, dict):
        crop = crop.get("height", crop.get("shortest_edge"))
    if positions is None or not edge or not isinstance(crop, int) or crop > _LARGEST_CROP:
        return judge(faults, "") if faults else (SKIPPED, "the tower or the crop size is not there")
    patches, there = (crop // edge) ** 2, positions.rows - 1
    if patches != there:
        faults.append(f"crops to {crop} pixels, {patches} patches of {edge}; the tower has {there}")
    return judge(faults, f"crops to {crop} pixels, as many patches as the tower has positions")
