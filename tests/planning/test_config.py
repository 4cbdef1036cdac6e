"""The parts of config.json and generation_config.json: token ids, settings, one vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.family import Generation
from xtuner2llava.planning.config import (
    TokenIds,
    generation_config,
    json_bytes,
    output_config,
    token_ids,
    valid_settings,
)
from xtuner2llava.tokenizers.tokenizer import Tokenizer

IDS = {"<s>": 1, "</s>": 2, "<|end|>": 7, "<|im_end|>": 8}


def ids(
    named: Generation | None = None,
    stop_words: tuple[str, ...] = (),
    generation: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> TokenIds:
    tokenizer = Tokenizer(Path(), (), {}, IDS, {})
    return token_ids(tokenizer, named or Generation(), stop_words, generation or {}, config or {})


def test_the_family_s_tokens_come_first() -> None:
    named = Generation("<s>", ("<|im_end|>", "</s>"), "</s>")
    assert ids(named, (), {"bos_token_id": 9, "eos_token_id": 9}) == TokenIds(1, (8, 2), 2)


def test_tokens_that_the_tokenizer_lacks_do_not_count() -> None:
    named = Generation("<bos>", ("<eos>",), "<pad>")
    base = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}
    assert ids(named, (), base) == TokenIds(1, (2, 7), 0)


def test_generation_config_counts_before_config() -> None:
    assert ids(generation={"eos_token_id": 7}, config={"eos_token_id": 2, "bos_token_id": 1}) == (
        TokenIds(1, (7,), None)
    )


def test_stop_words_stand_before_the_base_s_eos() -> None:
    assert ids(stop_words=("<|end|>", "no token"), generation={"eos_token_id": 2}).eos == (7, 2)
    assert ids(stop_words=("<|end|>",), generation={"eos_token_id": [2, 7]}).eos == (7, 2)


@pytest.mark.parametrize("value", [True, "2", 2.0, None, [], ["x"], {"a": 1}])
def test_what_is_no_id_is_none(value: Any) -> None:
    assert ids(config={"eos_token_id": value, "bos_token_id": value}) == TokenIds(None, (), None)


def test_generation_settings_are_the_base_s() -> None:
    base = {
        "_from_model_config": True,
        "transformers_version": "4.41.2",
        "top_p": 0.8,
        "eos_token_id": 5,
    }
    kept, notes = generation_config(base, TokenIds(1, (8, 2), None))
    assert kept == {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": [8, 2],
        "top_p": 0.8,
    }
    (note,) = notes
    assert "do_sample true: the base sets top_p without it" in note
    empty = generation_config({}, TokenIds(None, (2,), 0))
    assert empty == ({"eos_token_id": 2, "pad_token_id": 0}, ())


# Each was tried with `from_pretrained` and `save_pretrained` of transformers 4.37.2, 4.40.2,
# 4.57.1 and 5.24.0; some of these refuse what is on the left, none what is on the right.
@pytest.mark.parametrize(
    ("base", "valid"),
    [
        # lmsys/vicuna-7b-v1.5
        (
            {"max_length": 4096, "temperature": 0.9, "top_p": 0.6},
            {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "do_sample": True},
        ),
        ({"top_k": 20}, {"top_k": 20, "do_sample": True}),
        ({"do_sample": None, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False}),
        ({"do_sample": False, "top_k": None}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 0, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"penalty_alpha": 0.6, "top_k": 4}, {}),
        ({"num_beams": 1, "early_stopping": True}, {"num_beams": 1}),
        ({"length_penalty": 2.0}, {}),
        ({"num_beams": 4, "num_beam_groups": 2}, {"num_beams": 4}),
        ({"num_beams": 3, "early_stopping": "often"}, {"num_beams": 3}),
        ({"num_beams": 2, "num_return_sequences": 3}, {"num_beams": 2}),
        # What 4.37.2 to 4.57 compare with a number.
        ({"num_return_sequences": None, "num_beams": None, "max_length": None}, {}),
        ({"num_return_sequences": 2}, {}),
        ({"max_new_tokens": 0}, {}),
        ({"max_new_tokens": "256", "num_return_sequences": [1], "temperature": "0.6"}, {}),
        ({"do_sample": "true", "top_p": 0.8}, {"do_sample": True, "top_p": 0.8}),
        ({"do_sample": True, "top_k": {}, "min_p": True}, {"do_sample": True}),
        ({"cache_implementation": "dynamic", "compile_config": {"fullgraph": True}}, {}),
        ({"output_attentions": True, "return_dict_in_generate": True}, {}),
    ],
)
def test_settings_that_transformers_would_not_save(
    base: dict[str, Any], valid: dict[str, Any]
) -> None:
    kept, notes = valid_settings(base)
    assert kept == valid
    assert all(any(key in note for note in notes) for key in {*base} - {*valid} - {"do_sample"})
    assert notes
    assert valid_settings(valid) == (valid, ())


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"do_sample": True, "top_k": None},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 50},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 0.8},
        {"repetition_penalty": 1.05, "max_new_tokens": 512, "chat_format": "chatml"},
    ],
)
def test_settings_that_stay_as_they_are(settings: dict[str, Any]) -> None:
    assert valid_settings(settings) == (settings, ())


def test_an_id_below_0_is_none(tmp_path: Path) -> None:
    """LLaMA's first configs have `pad_token_id` -1."""
    tokenizer = Tokenizer(tmp_path, (), {}, {"<s>": 1, "</s>": 2}, {})
    found = token_ids(tokenizer, Generation(), (), {}, {"pad_token_id": -1, "eos_token_id": 2})
    assert found == TokenIds(None, (2,), None)


# config.json


def test_the_config_has_one_eos_id_and_the_vocabulary_of_4_37() -> None:
    shipped = Catalogue.shipped()
    made = output_config(
        shipped.formats["llava"],
        (shipped.classes["qwen2"], {"hidden_size": 4, "rope_theta": 1e4}),
        (shipped.classes["clip_vision_model"], {"hidden_size": 3}),
        {"mm_hidden_size": 3},
        dtype="bfloat16",
        ids=TokenIds(1, (8, 2), None),
    )
    assert made == {
        "architectures": ["LlavaQwenForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 8,
        "hidden_size": 4,
        "mm_hidden_size": 3,
        "model_type": "llava_qwen",
        "rope_theta": 1e4,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
    }
    assert list(made) == sorted(made)
    assert json_bytes({"b": "é", "a": None}) == b'{\n  "a": null,\n  "b": "\xc3\xa9"\n}\n'
