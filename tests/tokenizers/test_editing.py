"""Tokens are added to all files of a tokenizer alike, so that fast and slow readers agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import ConversionError
from xtuner2llava.tokenizers.prefix import with_bos_added
from xtuner2llava.tokenizers.tokenizer import Tokenizer, read_tokenizer

BASES = ("llm_llama", "llm_qwen2")


def write(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in tokenizer.copied:
        shutil.copy(tokenizer.folder / name, folder)
    for name, make in tokenizer.made.items():
        (folder / name).write_bytes(make())
    return folder


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").exists():  # else transformers 5 goes by the tokenizer's class
        (folder / "config.json").write_text('{"model_type": "llava"}')
    return AutoTokenizer.from_pretrained(folder, **options)


@pytest.mark.parametrize("base", BASES)
def test_added_tokens_follow_the_others(checkpoints: Path, tmp_path: Path, base: str) -> None:
    before = read_tokenizer(checkpoints / "bases" / base)
    tokenizer = before.with_tokens(["<image>", "<pad>"])
    first = before.highest_id + 1
    assert (tokenizer.ids["<image>"], tokenizer.ids["<pad>"]) == (first, first + 1)
    loaded = load(write(tokenizer, tmp_path / "out"))
    assert len(loaded) == before.length + 2
    ids = loaded("a<image>b <pad>", add_special_tokens=False)["input_ids"]
    assert ids[1] == first and ids[-1] == first + 1
    assert loaded.decode([first, first + 1], skip_special_tokens=True) == ""
    # All else is as it was.
    old = load(write(before, tmp_path / "old"))
    text = "USER: What is it? 图 x\n"
    assert loaded(text)["input_ids"] == old(text)["input_ids"]


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("llm_llama", ["tokenizer.json"]),
        ("llm_qwen2", ["tokenizer.json"]),
        ("llm_qwen2", ["vocab.json", "merges.txt"]),
    ],
)
def test_every_kind_of_base(checkpoints: Path, tmp_path: Path, base: str, kept: list[str]) -> None:
    """A base may lack the list of added tokens, or have no tokenizer.json."""
    source = checkpoints / "bases" / base
    folder = tmp_path / "base"
    folder.mkdir()
    for name in [*kept, "special_tokens_map.json", "added_tokens.json"]:
        if (source / name).exists():
            shutil.copy(source / name, folder)
    config = json.loads((source / "tokenizer_config.json").read_text())
    # For it, fast tokenizers of transformers 4.40 and later ask for a tokenizer.model.
    config.pop("add_prefix_space", None)
    added = {entry["content"] for entry in config.pop("added_tokens_decoder").values()}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        config.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    tokenizer = read_tokenizer(folder).with_tokens(["<image>"])
    written = json.loads(tokenizer.made["tokenizer_config.json"]())
    decoder = written["added_tokens_decoder"]
    assert {entry["content"] for entry in decoder.values()} == {*added, "<image>"}
    assert all(entry["special"] for entry in decoder.values())
    assert written["eos_token"] == tokenizer.special("eos_token") is not None
    loaded = load(write(tokenizer, tmp_path / "out"))
    assert loaded("<image>", add_special_tokens=False)["input_ids"] == [tokenizer.ids["<image>"]]
    assert loaded.eos_token == tokenizer.special("eos_token")


def test_a_token_that_is_there_keeps_its_id(checkpoints: Path) -> None:
    before = read_tokenizer(checkpoints / "bases/llm_qwen2")
    assert before.with_tokens(["<|im_end|>"]) is before
    # It is in the vocabulary, but not found whole: it becomes so, at the same place.
    word = before.with_tokens(["er"])
    assert word.ids == before.ids
    decoder = word.config["added_tokens_decoder"]
    assert isinstance(decoder, dict) and str(before.ids["er"]) in decoder


def test_added_tokens_json_and_tokenizer_json_know_them_too(checkpoints: Path) -> None:
    tokenizer = read_tokenizer(checkpoints / "bases/llm_qwen2").with_tokens(["<image>"])
    assert json.loads(tokenizer.made["added_tokens.json"]())["<image>"] == 363
    fast = json.loads(tokenizer.made["tokenizer.json"]())
    assert fast["added_tokens"][-1] == {
        "id": 363,
        "content": "<image>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    before = json.loads((checkpoints / "bases/llm_qwen2/tokenizer.json").read_text())
    fast["added_tokens"].pop()
    assert fast == before


def test_gaps_in_the_ids_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 2}')
    with pytest.raises(ConversionError, match="has 2 tokens with ids up to 2"):
        read_tokenizer(tmp_path).with_tokens(["<image>"])
    # A token that is there already needs no id.
    assert read_tokenizer(tmp_path).with_tokens(["b"]).ids == {"a": 0, "b": 2}


def test_two_edits_are_both_written(checkpoints: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(checkpoints / "bases/llm_llama")
    tokenizer = tokenizer.with_tokens(["<image>", "<p>"]).with_special_token("pad_token", "<p>")
    tokenizer = tokenizer.with_config({"processor_class": "LlavaProcessor"})
    loaded = load(write(tokenizer, tmp_path / "out"))
    assert (loaded.pad_token, loaded.pad_token_id) == ("<p>", 385)
    special = json.loads((tmp_path / "out/special_tokens_map.json").read_text())
    assert ("pad_token", "<p>") in special.items()
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert {("processor_class", "LlavaProcessor"), ("bos_token", "<s>")} <= {
        (key, value) for key, value in config.items() if isinstance(value, str)
    }


def test_a_special_token_is_taken_off_everywhere(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "<s>": 1}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "a"}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "a"}')
    tokenizer = read_tokenizer(tmp_path).with_special_token("bos_token", None)
    assert tokenizer.special("bos_token") is None
    config = json.loads(tokenizer.made["tokenizer_config.json"]())
    assert config == {"bos_token": None, "eos_token": "a"}
    assert json.loads(tokenizer.made["special_tokens_map.json"]()) == {"eos_token": "a"}
    assert tokenizer.copied == ("vocab.json",)


def test_a_bos_token_that_is_not_in_the_vocabulary_is_not_added(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer = read_tokenizer(tmp_path)
    assert with_bos_added(tokenizer, True) is tokenizer
    known = with_bos_added(tokenizer.with_tokens(["<s>"]), True)
    content = json.loads(known.made["tokenizer.json"]())
    assert content["post_processor"]["processors"][0]["special_tokens"]["<s>"]["ids"] == [1]
