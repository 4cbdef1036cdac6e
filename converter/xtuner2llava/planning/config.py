"""`config.json` and `generation_config.json` of the output, in the vocabulary of transformers 4.37.

Plain JSON, never through `save_pretrained` of a newer transformers: LLaVA's pinned 4.37.2 reads its
`rope_parameters` and `dtype` as nothing at all, and silently takes defaults. Version 5 still reads
`rope_theta`, `rope_scaling` and `torch_dtype`.

LLaVA generates from `inputs_embeds`. transformers before 4.40 then demands a bos id, which it takes
from `generation_config.bos_token_id`; a chat model without its end-of-turn token among the eos ids
never stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import cast

from xtuner2llava.mapping.family import Generation
from xtuner2llava.mapping.format import Format
from xtuner2llava.mapping.plain_class import PlainClass
from xtuner2llava.planning.redaction import redact_text
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.tokenizer import Tokenizer

VOCABULARY = "4.37.2"
_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
# Those, which are written anew, and keys about the library that wrote the file.
_HOUSEKEEPING = _TOKENS | {"_from_model_config", "transformers_version"}

# What counts only where tokens are drawn, or only with beams, and the values that say nothing.
# transformers refuses to save a model with others (`GenerationConfig.validate` and
# `save_pretrained` in `generation/configuration_utils.py`, 4.37.2 to 4.57.1).
_SAMPLING: dict[str, Json] = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "top_k": 50,
                              "min_p": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
                              "top_h": None}  # fmt: skip
_BEAMS: dict[str, Json] = {"early_stopping": False, "length_penalty": 1.0, "num_beam_groups": 1,
                           "diversity_penalty": 0.0, "constraints": None,
                           "force_words_ids": None}  # fmt: skip
# How a program keeps its cache and what `generate` returns. Each has values that some version of
# transformers from 4.37 on does not load or save, and none changes which tokens are generated.
_OF_THE_RUN = ("cache_implementation", "cache_config", "compile_config", "output_attentions",
               "output_hidden_states", "output_scores", "output_logits",
               "return_dict_in_generate", "return_legacy_cache")  # fmt: skip
# Texts in their place end in a TypeError of some version (`GenerationConfig.validate`).
_NUMBERS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "num_beams",
            "num_return_sequences", "no_repeat_ngram_size", "repetition_penalty", "penalty_alpha",
            "guidance_scale", *_SAMPLING, "length_penalty", "num_beam_groups",
            "diversity_penalty")  # fmt: skip
_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Where generation starts, stops and pads; None where the model has no such token."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


def token_ids(
    tokenizer: Tokenizer,
    named: Generation,
    stop_words: Sequence[str],
    base_generation: Mapping[str, Json],
    base_config: Mapping[str, Json],
) -> TokenIds:
    """The ids to generate with.

    A token that the family has `named` counts if the tokenizer has it; else what the base's
    `generation_config.json`, then its `config.json` say; else, for bos and eos, without which
    nothing can be generated, the tokenizer's own. Of `stop_words`, with which the prompt
    template ends a turn, those that are single tokens are put before the base's eos ids. The
    tokenizer's eos token, which XTuner puts after an answer (`xtuner/dataset/utils.py`), is always
    one of them.
    """

    def of_base(key: str) -> list[int]:
        for values in (base_generation, base_config):
            value = values.get(key)
            found = value if isinstance(value, list) else [value]
            ids = [n for n in found if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
            if ids:
                return ids
        return []

    def of_texts(*texts: str | None) -> list[int]:
        return [tokenizer.ids[text] for text in texts if text is not None and text in tokenizer.ids]

    eos = [
        *(of_texts(*named.eos) or of_base("eos_token_id")),
        *of_texts(tokenizer.special("eos_token")),
    ]
    bos = of_texts(named.bos) or of_base("bos_token_id") or of_texts(tokenizer.special("bos_token"))
    pad = of_texts(named.pad) or of_base("pad_token_id")
    ends = tuple(dict.fromkeys([*of_texts(*stop_words), *eos]))
    return TokenIds(bos[0] if bos else None, ends, pad[0] if pad else None)


def ids_with_rows(values: Mapping[str, Json], rows: int) -> tuple[dict[str, Json], tuple[str, ...]]:
    """The `values` of a base's config, of token ids those with a row, and a note on each other.

    The first configs of Llama 2 pad with 32000, which is the number of rows.
    """
    kept, notes = dict(values), []
    for key in _TOKENS & values.keys():
        value = values[key]
        listed = value if isinstance(value, list) else [value]
        beyond = [n for n in listed if isinstance(n, int) and n >= rows]
        if beyond:
            kept[key] = [n for n in listed if n not in beyond]
            found = ", ".join(map(str, beyond))
            notes.append(f"The base's {key} {found} is left out: the vocabulary has {rows} rows.")
    return kept, tuple(sorted(notes))


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
    common: dict[str, object] = {
        "torch_dtype": dtype,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos[0] if ids.eos else None,
        **({} if ids.pad is None else {"pad_token_id": ids.pad}),
    }
    if "llm" in format_.nest:
        named = {"architectures": [plain.architecture], "model_type": plain.model_type}
        values = {format_.nest["llm"]: _sorted({**values, **named, "use_cache": True, **common})}
    if "vision" in format_.nest:
        # What CLIP's text tower would need of it is left to defaults.
        vision = _sorted({**tower[1], "model_type": tower[0].model_type})
        values = {**values, format_.nest["vision"]: vision}
    return _sorted(
        {
            **values,
            **format_keys,
            "architectures": [described.architecture],
            "model_type": model_type or described.model_type,
            "transformers_version": VOCABULARY,
            **common,
        }
    )


def _sorted(values: Mapping[str, object]) -> dict[str, Json]:
    """Values of YAML expressions and JSON, which are JSON by construction, by their names."""
    return cast("dict[str, Json]", dict(sorted(values.items())))


def json_bytes(values: Mapping[str, object]) -> bytes:
    """JSON as transformers writes it: two spaces, sorted keys, a newline at the end.

    What is not Unicode, as in a file name of another encoding, becomes a question mark: many
    readers of JSON refuse the escape of half a surrogate pair.
    """
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "replace")


def generation_config(
    base: Mapping[str, Json], ids: TokenIds
) -> tuple[dict[str, Json], tuple[str, ...]]:
    """The base's generation settings with `ids`, and a note on each that had to be changed."""
    kept, notes = valid_settings({k: v for k, v in base.items() if k not in _HOUSEKEEPING})
    eos: Json = list(ids.eos) if len(ids.eos) > 1 else next(iter(ids.eos), None)
    tokens = {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}
    kept |= {key: value for key, value in tokens.items() if value is not None}
    return dict(sorted(kept.items())), notes


def valid_settings(values: Mapping[str, Json]) -> tuple[dict[str, Json], tuple[str, ...]]:
    """Generation settings that transformers from 4.37.2 to 5 load and save, and what was changed.

    Without notes, `values` are such already.
    """
    result, notes = dict(values), list[str]()

    def drop(keys: Iterable[str], why: str) -> None:
        found = [key for key in dict.fromkeys(keys) if key in result]
        for key in found:
            del result[key]
        if found:
            notes.append(f"{_FILE} is written without {', '.join(found)}{why}")

    wrong = [key for key in _NUMBERS if type(result.get(key)) not in (int, float, NoneType)]
    wrong += ["do_sample"] * (type(result.get("do_sample")) not in (bool, NoneType))
    drop(wrong, ": of another kind than transformers reads.")
    length = result.get("max_new_tokens")
    senseless = ["max_new_tokens"] if isinstance(length, int) and length < 1 else []
    nulls = [k for k, v in values.items() if v is None and k not in (*_SAMPLING, "do_sample")]
    drop([*_OF_THE_RUN, *senseless, *nulls], ", which not every transformers loads.")
    # Stop strings are words of a prompt.
    texts = {key: json.dumps(value) for key, value in result.items() if key != "stop_strings"}
    private = [key for key, text in texts.items() if redact_text(text) != text]
    drop(private, ": a path of the machine that it was written on.")
    if result.get("penalty_alpha") is not None and result.get("do_sample") is not True:
        drop(
            ["penalty_alpha", "top_k"],
            ": transformers 4.57 does not save the settings of contrastive search, and 5 has none. "
            "Give them to `generate`.",
        )
    # Either tokens are drawn, with the settings for it, or the best one is taken, without.
    asked = [k for k, neutral in _SAMPLING.items() if result.get(k, neutral) not in (None, neutral)]
    temperature = result.get("temperature")
    if isinstance(temperature, int | float) and temperature == 0:
        # The most likely token: `generate` refuses to divide by it.
        result["do_sample"] = False
    elif asked and result.get("do_sample") is None:
        result["do_sample"] = True
        notes.append(
            f"{_FILE} has do_sample true: the base sets {', '.join(asked)} without it, and "
            "transformers does not save such a model. Give do_sample=False to `generate` for the "
            "most likely answer."
        )
    if result.get("do_sample") is not True:
        drop(
            [key for key in _SAMPLING if key in asked or result.get(key, 0) is None],
            ": do_sample is false, and transformers does not save a model with both.",
        )
    drop(
        _wrong_for_beams(result),
        ", which do not fit its num_beams, and with which transformers does not save a model.",
    )
    return result, tuple(notes)


def _wrong_for_beams(settings: Mapping[str, Json]) -> list[str]:
    beams = settings.get("num_beams")
    width = beams if isinstance(beams, int) and beams > 1 else 1
    wrong = ["num_beams"] if beams is not None and beams != width else []
    if width == 1:
        wrong += [key for key, neutral in _BEAMS.items() if settings.get(key, neutral) != neutral]
    else:
        groups = settings.get("num_beam_groups", 1) not in (None, 1)
        if groups != bool(settings.get("diversity_penalty")):
            wrong += ["num_beam_groups", "diversity_penalty"]
        if settings.get("early_stopping", False) not in (True, False, "never"):
            wrong.append("early_stopping")
    answers = settings.get("num_return_sequences")
    drawn = settings.get("do_sample") is True and width == 1
    if isinstance(answers, int) and answers > width and not drawn:
        wrong.append("num_return_sequences")
    return wrong
