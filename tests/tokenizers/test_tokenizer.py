"""A tokenizer's tokens are read from whichever files a base has, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import ConversionError
from xtuner2llava.tokenizers.conversion import prepare_tokenizer
from xtuner2llava.tokenizers.tokenizer import read_tokenizer

LISTED: dict[str, Any] = {"added_tokens_decoder": {}}


def write(folder: Path, **files: object) -> Path:
    """Files by name, with `_` for the dot of `.json`; a text is written as it is."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


def test_tokenizer_json_with_a_table(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer={
            "model": {"vocab": {"a": 0, "b": 1}},
            "added_tokens": [{"id": 2, "content": "<x>"}],
        },
    )
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.ids == {"a": 0, "b": 1, "<x>": 2}
    assert (tokenizer.length, tokenizer.highest_id) == (3, 2)


def test_tokenizer_json_with_a_list_as_unigram_models_have(tmp_path: Path) -> None:
    write(tmp_path, tokenizer={"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}})
    assert read_tokenizer(tmp_path).ids == {"<unk>": 0, "a": 1}


def test_vocab_json_and_what_was_added(tmp_path: Path) -> None:
    write(
        tmp_path,
        vocab={"a": 0, "b": 1},
        added_tokens={"<x>": 2},
        tokenizer_config={"added_tokens_decoder": {"3": {"content": "<y>"}, "no": {}, "4": []}},
    )
    assert read_tokenizer(tmp_path).ids == {"a": 0, "b": 1, "<x>": 2, "<y>": 3}


def test_sentencepiece(checkpoints: Path, tmp_path: Path) -> None:
    model = checkpoints / "bases/llm_llama/tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.length, tokenizer.highest_id) == (384, 383)
    assert [tokenizer.ids[text] for text in ("<unk>", "<s>", "</s>", "<0x00>", "▁a")] == [
        0,
        1,
        2,
        3,
        259,
    ]
    assert tokenizer.ids == read_tokenizer(model.parent).ids  # its tokenizer.json says the same


def test_of_two_ids_that_of_tokenizer_json_counts(tmp_path: Path) -> None:
    """A fast tokenizer leaves a token of its file where it is (transformers 4.37.2 to 4.57.1)."""
    write(
        tmp_path,
        tokenizer={"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<x>"}]},
        tokenizer_config={"added_tokens_decoder": {"2": {"content": "<x>"}}},
    )
    assert read_tokenizer(tmp_path).ids == {"a": 0, "<x>": 1}


def test_tokens_with_two_names_count_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        vocab={"a": 0, "[UNUSED]": 1},
        tokenizer_config={"added_tokens_decoder": {"1": {"content": "<|im_end|>"}}},
    )
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.length == 2
    assert tokenizer.ids["<|im_end|>"] == 1


@pytest.mark.parametrize(
    ("config", "special_map", "found"),
    [
        ({"bos_token": "<s>", **LISTED}, {"bos_token": "<t>"}, "<s>"),
        ({"bos_token": None, **LISTED}, {"bos_token": "<t>"}, None),
        # Without a list of added tokens, as before transformers 4.34, the map counts first.
        ({"bos_token": "<s>"}, {"bos_token": "<t>"}, "<t>"),
        ({"bos_token": ""}, {"bos_token": {"content": "<t>"}}, "<t>"),
        ({"bos_token": "<s>"}, {"eos_token": "<t>"}, "<s>"),
        ({"bos_token": {"content": "<s>"}}, {}, "<s>"),
        ({"bos_token": None}, {"bos_token": "<t>"}, "<t>"),
        ({}, {"bos_token": {"content": "<t>"}}, "<t>"),
        ({"bos_token": 5}, {}, None),
    ],
)
def test_special_tokens(
    tmp_path: Path, config: dict[str, Any], special_map: dict[str, Any], found: str | None
) -> None:
    write(tmp_path, vocab={"a": 0}, tokenizer_config=config, special_tokens_map=special_map)
    assert read_tokenizer(tmp_path).special("bos_token") == found


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={})
    with pytest.raises(ConversionError, match="holds no tokenizer, expected one of"):
        read_tokenizer(tmp_path)


def test_files_are_copied_and_python_files_are_not(tmp_path: Path) -> None:
    write(tmp_path, vocab={"a": 0}, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenization_evil.py").write_text("raise SystemExit")
    prepared = prepare_tokenizer(read_tokenizer(tmp_path))
    assert prepared.tokenizer.copied == ("tokenizer_config.json", "vocab.json", "merges.txt")
    assert not prepared.tokenizer.made and not prepared.notes


# What transformers could not load


def test_a_tokenizer_of_remote_code_is_refused(tmp_path: Path) -> None:
    config = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    write(tmp_path, vocab={"a": 0}, tokenizer_config=config)
    with pytest.raises(ConversionError) as error:
        prepare_tokenizer(read_tokenizer(tmp_path))
    assert "ChatGLMTokenizer is code of the model's repository" in str(error.value)
    assert "--mapping" in str(error.value)


def test_a_class_of_transformers_beside_remote_code_is_not(tmp_path: Path) -> None:
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]},
    }
    write(tmp_path, vocab={"a": 0}, tokenizer_config=config)
    assert not prepare_tokenizer(read_tokenizer(tmp_path)).notes


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"model": {"vocab": 3}, "added_tokens": 4}',
        '{"model": {"vocab": [[1], 2, ["a"]]}, "added_tokens": [{"id": "x"}, 7, {"content": 5}]}',
        '{"added_tokens": [{"id": true, "content": "a"}]}',
    ],
)
def test_a_damaged_tokenizer_json_is_an_error_or_has_no_tokens(
    tmp_path: Path, content: str
) -> None:
    write(tmp_path, tokenizer=content)
    try:
        ids = read_tokenizer(tmp_path).ids
    except ConversionError:
        return
    assert set(ids) <= {"a"}
