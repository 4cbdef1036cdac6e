"""Yi's first tokenizer, remote code over SentencePiece, becomes LlamaTokenizer with the same ids.

YiTokenizer (01-ai/Yi-6B, `tokenization_yi.py`) gives each text between special tokens to the
SentencePiece model as it is: the ids to compare with are those of sentencepiece itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.internlm2_tokenizer import DATA, NAMES, expected, write_base
from builders.prepared_tokenizer import write_prepared
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.tokenizers.conversion import prepare_tokenizer
from xtuner2llava.tokenizers.tokenizer import read_tokenizer


@pytest.mark.parametrize("adds_bos", [None, True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_ids_are_those_of_sentencepiece(
    tmp_path: Path, name: str, adds_bos: bool | None
) -> None:
    from tokenizers import Tokenizer

    said = {} if adds_bos is None else {"add_bos_token": adds_bos}
    auto_map = {"AutoTokenizer": ["tokenization_yi.YiTokenizer", None]}
    base = write_base(
        tmp_path / "base",
        (DATA / f"{name}.model").read_bytes(),
        tokenizer_class="YiTokenizer",
        auto_map=auto_map,
        **said,
    )
    family = Catalogue.shipped().families["yi"]
    prepared = prepare_tokenizer(read_tokenizer(base), family.tokenizer.convert)
    out = write_prepared(prepared, tmp_path / "out")
    config = json.loads((out / "tokenizer_config.json").read_text())
    # 01-ai/Yi-6B says false; the class itself takes true.
    assert (config["tokenizer_class"], config["legacy"]) == ("LlamaTokenizer", True)
    assert config["add_bos_token"] is (adds_bos is not False)
    assert "auto_map" not in config
    bos = [] if adds_bos is False else [1]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text, ids in expected(name):
        assert tokenizer.encode(text).ids == [*bos, *ids], repr(text)
