"""Qwen 1's tokenizer, converted from the real `qwen.tiktoken`, against one that reads it itself.

The file and the tokenizer to compare with are those of the package `dashscope`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from builders import qwen_tokenizer
from builders.qwen_tokenizer import END, START, STOP
from xtuner2llava import ConversionError
from xtuner2llava.tokenizers.conversion import prepare_tokenizer
from xtuner2llava.tokenizers.qwen import read_ranks
from xtuner2llava.tokenizers.tokenizer import read_tokenizer

# Of the files that Qwen publishes for Qwen 1.5 and Qwen 3, made from the same ranks.
PUBLISHED = {
    "merges.txt": "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5",
    "vocab.json": "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910",
}


@pytest.fixture(scope="module")
def oracle() -> Any:
    return qwen_tokenizer.oracle()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    return qwen_tokenizer.write_converted(
        qwen_tokenizer.write_base(folder / "base"), folder / "out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("use_fast", [True, False], ids=["fast", "slow"])
def test_ids_are_those_of_the_real_tokenizer(converted: Path, oracle: Any, use_fast: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted, use_fast=use_fast)
    assert type(tokenizer).__name__.removesuffix("Fast") == "Qwen2Tokenizer"
    compared = set()
    for text in qwen_tokenizer.texts(3000):
        ids = oracle.encode(text)
        assert tokenizer(text)["input_ids"] == ids, repr(text)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
        compared.add(text)
    assert len(compared) > 2000


def test_the_files_are_those_that_qwen_publishes(converted: Path) -> None:
    for name, digest in PUBLISHED.items():
        assert hashlib.sha256((converted / name).read_bytes()).hexdigest() == digest, name


def test_special_tokens_stand_at_their_ids_and_none_is_bos(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = {END: 151643, START: 151644, STOP: 151645, "<|extra_0|>": 151646, "<|extra_204|>": 151850}
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in ids} == ids
    assert len(tokenizer) == 151851
    assert tokenizer.bos_token is None
    assert (tokenizer.eos_token, tokenizer.pad_token) == (STOP, END)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.decode([9707, *ids.values()], skip_special_tokens=True) == "Hello"


def test_a_forgotten_normalisation_would_be_seen(converted: Path, oracle: Any) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    decomposed = "cafe\u0301"
    assert tokenizer.encode(decomposed).ids == oracle.encode(decomposed)
    content = json.loads((converted / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps({**content, "normalizer": None}))
    assert tokenizer.encode(decomposed).ids != oracle.encode(decomposed)


def small(folder: Path, lines: list[str]) -> Path:
    """A file of all single bytes, then `lines`."""
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    path = folder / "qwen.tiktoken"
    path.write_text("\n".join([*ranks, *lines]))
    return path


def test_ranks_are_read(tmp_path: Path) -> None:
    path = small(tmp_path, ["YWI= 257", "Y2Q= 256"])  # ab, cd
    assert list(read_ranks(path).items())[-2:] == [(b"cd", 256), (b"ab", 257)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["YWI="], "257: is not a token in base64, a space and a rank"),
        (["YWI= two"], "257: is not a token in base64, a space and a rank"),
        (["YWI= -1"], "257: is not a token in base64, a space and a rank"),
        (["Y*I= 256"], "257: has a token that is not base64"),
        ([" 256"], "257: has an empty token"),
        (["YQ== 256"], "257: repeats the token of rank 97"),
        (["YWI= 97"], "257: repeats rank 97 of line 98"),
        (["YWI= 300"], "rank 256 is missing of 257"),
        (["YWI= 99999999999"], "257: is not a token in base64, a space and a rank"),
        (["?"] * 50, "is not a file of tiktoken ranks"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = small(tmp_path, lines)
    with pytest.raises(ConversionError) as error:
        read_ranks(path)
    assert message in str(error.value)
    assert len(error.value.faults) < 20


def test_a_file_without_all_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nYg== 1\n")
    with pytest.raises(ConversionError, match="254 of the 256 single bytes are missing"):
        read_ranks(tmp_path / "qwen.tiktoken")


def prepare(folder: Path, special: dict[str, int]) -> Any:
    tokenizer = read_tokenizer(folder)
    return prepare_tokenizer(tokenizer, "qwen.tiktoken", special, eos="<s>").tokenizer


def test_special_tokens_must_follow_on_the_ranks(tmp_path: Path) -> None:
    small(tmp_path, ["YWI= 256"])
    assert prepare(tmp_path, {"<s>": 257, "<x>": 258}).ids["<x>"] == 258
    with pytest.raises(ConversionError, match=r"has 257 tokens, .* have the ids 256 to 256"):
        prepare(tmp_path, {"<s>": 256})


def test_a_token_that_no_merge_makes_is_refused(tmp_path: Path) -> None:
    small(tmp_path, ["YWJj 256"])  # abc, without ab or bc
    tokenizer = prepare(tmp_path, {"<s>": 257})
    with pytest.raises(ConversionError, match="token 256 is not a merge of others"):
        tokenizer.made["tokenizer.json"]()


def test_tokens_that_would_take_minutes_are_refused(tmp_path: Path) -> None:
    token = base64.b64encode(b"ab" * 5000).decode()
    small(tmp_path, [f"{token} 256"])
    tokenizer = prepare(tmp_path, {"<s>": 257})
    with pytest.raises(ConversionError, match="would take too long"):
        tokenizer.made["merges.txt"]()
