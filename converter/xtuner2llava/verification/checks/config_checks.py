"""What must hold between the config, the tensors and the generation settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from xtuner2llava.errors import ConversionError
from xtuner2llava.planning.generation import valid_settings
from xtuner2llava.planning.image_processor import (
    PREPROCESSOR,
    PROCESSOR,
    image_processor_faults,
    processor_faults,
)
from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.layout import LLM, VISUAL_ENCODER
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import OK, SKIPPED, WARNING, Check
from xtuner2llava.verification.plain_model import plain_config


def config_checks(out: OutFolder) -> Iterator[Check]:
    """Checks of small files against the headers."""
    missing = out.layout.key_faults()
    architecture = out.layout.architecture
    yield Check.of("config keys", missing, f"{architecture} finds what it reads")
    yield _guarded("vocabulary size", out, _vocabulary)
    yield _guarded("tied embeddings", out, _tie)
    yield _guarded("dtype", out, _dtype)
    yield _guarded("vision tower in the folder", out, _tower)
    yield _guarded("generation config", out, _generation)
    yield _guarded("image processor", out, _image_processor)


def _guarded(name: str, out: OutFolder, check: object) -> Check:
    try:
        result, detail = check(out)  # type: ignore[operator]
    except ConversionError as error:
        return Check.failed(name, error)
    if isinstance(result, list):
        return Check.of(name, result, detail)
    return Check(name, result, detail)


_Found = tuple[list[str] | str, str]


def _vocabulary(out: OutFolder) -> _Found:
    claimed = out.layout.text.get("vocab_size")
    llm = out.component(LLM)
    rows = {name: llm[name][1].shape[0] for name in _HEADS if name in llm and llm[name][1].shape}
    faults = [f"{name} has {n} rows, vocab_size is {claimed}" for name, n in rows.items()
              if n != claimed]  # fmt: skip
    return faults, f"{claimed} = rows of {' and '.join(rows)}"


_HEADS = ("model.embed_tokens.weight", "lm_head.weight")


def _tie(out: OutFolder) -> _Found:
    config = plain_config(out.layout.text)
    flag = bool(getattr(config, "tie_word_embeddings", False))
    if out.layout.format == "hf":
        # What stands at the top counts for the whole model.
        flag = bool(out.layout.config.get("tie_word_embeddings", flag))
    has_head = _HEADS[1] in out.component(LLM)
    if flag and has_head:
        return ["tie_word_embeddings is true, and lm_head.weight is there, to be overwritten"], ""
    if not flag and not has_head:
        return ["tie_word_embeddings is false, and there is no lm_head.weight"], ""
    return [], "tied, the head is left out" if flag else "not tied, the head is there"


def _dtype(out: OutFolder) -> _Found:
    claimed = out.layout.dtype
    sizes: dict[str, int] = {}
    for entry in out.tensors.values():
        if entry.is_float:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.stop - entry.start
    if out.record.get("dtype") == "keep":
        most = max(sizes, key=lambda name: sizes[name], default=None)
        fine = f"kept as stored: {', '.join(sorted(sizes))}; most bytes are {claimed}"
        return ([] if most == claimed or claimed in sizes else [f"none is {claimed}"]), fine
    wrong = [n for n, e in out.tensors.items() if e.is_float and e.dtype != claimed]
    faults = [f"{name} is {out.tensors[name].dtype}, torch_dtype says {claimed}" for name in wrong]
    return faults, f"all tensors are {claimed}"


def _tower(out: OutFolder) -> _Found:
    there = bool(out.component(VISUAL_ENCODER))
    if out.layout.format == "hf":
        return ([] if there else ["its tensors are not there"]), "there, as the class needs it"
    flag = out.layout.config.get("unfreeze_mm_vision_tower")
    if there and flag is not True:
        return ["its tensors are there, but unfreeze_mm_vision_tower is not true, so that LLaVA "
                "silently takes those of mm_vision_tower"], ""  # fmt: skip
    if not there and flag is not False:
        return ["unfreeze_mm_vision_tower is not false, and its tensors are not there"], ""
    if not there:
        return WARNING, "it is not here: LLaVA takes mm_vision_tower, LLaVA-NeXT computes NaN"
    return OK, "there, with unfreeze_mm_vision_tower: true, which both LLaVA and NeXT load right"


def _ids(values: Mapping[str, Json], key: str) -> list[int]:
    value = values.get(key)
    listed = value if isinstance(value, list) else [value]
    return [n for n in listed if isinstance(n, int) and not isinstance(n, bool)]


def _generation(out: OutFolder) -> _Found:
    generation = out.small_json("generation_config.json")
    if not generation:
        return ["there is none, or it is empty"], ""
    rows = out.layout.text.get("vocab_size")
    size = rows if isinstance(rows, int) else 0
    faults = []
    # In the `hf` format, ids may stand at the top or with the language model.
    config = {**out.layout.text, **out.layout.config}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        here, there = _ids(generation, key), _ids(config, key)
        faults += [f"{key} {n} is beyond the {size} rows" for n in (*here, *there)
                   if not 0 <= n < size]  # fmt: skip
        if there and not here:
            faults.append(f"{key} is {there} in config.json and missing in generation_config.json")
        elif here and not there and key != "pad_token_id" and out.layout.format == "llava":
            faults.append(f"{key} is {here} in generation_config.json and missing in config.json")
        elif there and not set(there) <= set(here):
            faults.append(f"{key} is {there} in config.json, {here} in generation_config.json")
    if not _ids(generation, "eos_token_id"):
        faults.append("there is no eos_token_id, so it never stops")
    faults += valid_settings(generation)[1]
    eos = _ids(generation, "eos_token_id")
    return faults, f"eos {eos}, bos {_ids(generation, 'bos_token_id')}, all below {size}"


def _image_processor(out: OutFolder) -> _Found:
    """The size that images are cut to against the number of positions of the tower."""
    values = out.small_json(PREPROCESSOR)
    if not values:
        return [f"{PREPROCESSOR} is missing"], ""
    crop = values.get("crop_size", values.get("size"))
    if isinstance(crop, dict):
        crop = crop.get("height", crop.get("shortest_edge"))
    tower = out.component(VISUAL_ENCODER)
    patch = tower.get("vision_model.embeddings.patch_embedding.weight")
    positions = tower.get("vision_model.embeddings.position_embedding.weight")
    faults = [
        f"{key} is {values.get(key)!r}, expected three numbers"
        for key in ("image_mean", "image_std")
        if key in values and not _is_colour(values[key])
    ]
    faults += image_processor_faults(values)
    if out.layout.format == "hf":
        edge = patch[1].shape[-1] if patch is not None else None
        faults += processor_faults(out.small_json(PROCESSOR), edge)
    if patch is None or positions is None or not isinstance(crop, int):
        return faults or SKIPPED, "the tower or the crop size is not there"
    edge = patch[1].shape[-1]
    if (crop // edge) ** 2 + 1 != positions[1].shape[0]:
        faults.append(
            f"crops to {crop} pixels, {(crop // edge) ** 2} patches of {edge}; the tower has "
            f"{positions[1].shape[0] - 1}"
        )
    return faults, f"crops to {crop} pixels, as many patches as the tower has positions"


def _is_colour(value: Json) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(
        isinstance(n, int | float) and not isinstance(n, bool) for n in value
    )  # fmt: skip
