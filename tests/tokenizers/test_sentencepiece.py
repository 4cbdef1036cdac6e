"""SentencePiece models behind remote code become LlamaTokenizer, fast and slow, with the same ids.

The ids to compare with are those of sentencepiece itself, see `data/sentencepiece/README.md`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from builders.internlm2_tokenizer import DATA, END, NAMES, START, expected, prepare, write_base
from builders.prepared_tokenizer import write_prepared
from xtuner2llava import ConversionError
from xtuner2llava.tokenizers.compatibility import readable_tokenizer
from xtuner2llava.tokenizers.sentencepiece import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePiece,
    read_sentencepiece,
    with_texts,
)
from xtuner2llava.tokenizers.tokenizer import Prepared, read_tokenizer


@pytest.fixture(scope="module", params=NAMES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internlm2")
    model = (DATA / f"{request.param}.model").read_bytes()
    return write_prepared(prepare(write_base(folder / "base", model)), folder / request.param)


def test_tokenizer_json_gives_the_ids_of_sentencepiece(converted: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    for text, ids in expected(converted.name):
        assert tokenizer.encode(text).ids == [1, *ids], repr(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids


def test_transformers_gives_the_ids_of_sentencepiece(converted: Path) -> None:
    from transformers import AutoTokenizer

    # As in a folder of the format hf: transformers 5 then takes tokenizer.json as it is.
    (converted / "config.json").write_text('{"model_type": "llava"}')
    tokenizer = AutoTokenizer.from_pretrained(converted)
    for text, ids in expected(converted.name):
        assert tokenizer(text)["input_ids"] == [1, *ids], repr(text)
        if not {"<", "[", "▁"} & {*text}:
            assert tokenizer.decode(ids).lstrip(" ") == text.lstrip(" ")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == END
    assert len(tokenizer) == 520
    assert tokenizer.decode([1, START, END, 2], skip_special_tokens=True) == ""


def test_what_was_written(converted: Path) -> None:
    config = json.loads((converted / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert config["legacy"] is True
    assert config["add_bos_token"] is True
    assert "auto_map" not in config and "decode_with_prefix_space" not in config
    assert "add_prefix_space" not in config
    assert {p.name for p in converted.iterdir()} - {"config.json"} == {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_model_names_special_tokens_as_the_config_does(converted: Path) -> None:
    before = read_sentencepiece(DATA / f"{converted.name}.model")
    after = read_sentencepiece(converted / "tokenizer.model")
    assert before.pieces[END].text == "[UNUSED_TOKEN_145]"
    assert [after.pieces[END].text, after.pieces[START].text] == ["<|im_end|>", "<|im_start|>"]
    assert [p for n, p in enumerate(after.pieces) if n not in (END, START)] == [
        p for n, p in enumerate(before.pieces) if n not in (END, START)
    ]
    renamed = (converted / "tokenizer.model").read_bytes()
    texts = {END: "[UNUSED_TOKEN_145]", START: "[UNUSED_TOKEN_146]"}
    assert with_texts(renamed, texts) == (DATA / f"{converted.name}.model").read_bytes()


def test_early_internlm2_without_added_tokens_stays_without(tmp_path: Path) -> None:
    model = (DATA / "plain.model").read_bytes()
    base = write_base(tmp_path, model, added_tokens_decoder={}, additional_special_tokens=[])
    prepared = prepare(base)
    assert "<|im_end|>" not in prepared.tokenizer.ids
    assert prepared.tokenizer.length == 520
    assert "tokenizer.model" in prepared.tokenizer.copied


def test_a_llama_tokenizer_is_left_as_it_is(tmp_path: Path) -> None:
    model = (DATA / "plain.model").read_bytes()
    base = write_base(tmp_path, model, tokenizer_class="LlamaTokenizer")
    prepared = prepare(base)
    assert prepared.tokenizer == read_tokenizer(base)
    assert prepared.notes == ()


def test_an_added_token_with_two_ids_is_refused(tmp_path: Path) -> None:
    model = with_texts((DATA / "plain.model").read_bytes(), {3: "<|im_end|>"})
    with pytest.raises(ConversionError, match="is a piece of the model and an added token"):
        prepare(write_base(tmp_path, model))


# Models written by hand


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    head = [value >> 7 * n & 0x7F | 0x80 for n in range((max(value, 1).bit_length() - 1) // 7)]
    return bytes([*head, value >> 7 * len(head)])


def model_of(
    pieces: Sequence[SentencePiece],
    *,
    algorithm: int = BPE,
    prefix: bool = False,
    squeeze: bool = False,
) -> bytes:
    body = b"".join(
        field(1, field(1, p.text.encode()) + field(2, p.score) + field(3, p.kind)) for p in pieces
    )
    spec = field(3, int(prefix)) + field(4, int(squeeze))
    return body + field(2, field(3, algorithm) + field(35, 1)) + field(3, spec)


SPECIAL = [
    SentencePiece("<unk>", 0.0, UNKNOWN),
    SentencePiece("<s>", 0.0, CONTROL),
    SentencePiece("</s>", 0.0, CONTROL),
    SentencePiece("<0x41>", 0.0, BYTE),
]


def normal(*texts: str) -> list[SentencePiece]:
    """Merged in this order, and before single characters."""
    return [SentencePiece(text, -float(n), NORMAL) for n, text in enumerate(texts)]


def made(folder: Path, model: bytes) -> Prepared:
    config = {"added_tokens_decoder": {}, "additional_special_tokens": []}
    return prepare(write_base(folder, model, **config))


def ids_of(folder: Path, model: bytes, text: str) -> list[int]:
    from tokenizers import Tokenizer

    made_ = made(folder, model).tokenizer
    tokenizer = Tokenizer.from_str(made_.made["tokenizer.json"]().decode())
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def test_the_better_score_is_merged_first(tmp_path: Path) -> None:
    # Of "abc", bc (5) before ab (4): scores decide, not ids.
    pieces = [
        *SPECIAL,
        SentencePiece("ab", -2.0, NORMAL),
        SentencePiece("bc", -1.0, NORMAL),
        *normal("", "a"),
    ]
    pieces = [*pieces[:6], *[SentencePiece(c, -9.0, NORMAL) for c in "abc"]]
    assert ids_of(tmp_path, model_of(pieces), "abc") == [6, 5]


def test_a_piece_that_no_merge_makes_is_never_made(tmp_path: Path) -> None:
    pieces = [*SPECIAL, *normal("abc", "a", "b", "c")]
    assert ids_of(tmp_path, model_of(pieces), "abc") == [5, 6, 7]


def test_an_unknown_character_falls_back_to_its_bytes(tmp_path: Path) -> None:
    assert ids_of(tmp_path, model_of([*SPECIAL, *normal("b")]), "Ab") == [3, 4]


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (model_of(SPECIAL, algorithm=1), "not a byte-pair encoding"),
        (model_of(SPECIAL, squeeze=True), "tokenizer.json is made from tokenizer.model"),
        (model_of([*SPECIAL, SentencePiece("▁▁", 0.0, USER_DEFINED)]), "tokenizer.json is made"),
    ],
)
def test_what_cannot_be_said_exactly_is_not_said(tmp_path: Path, model: bytes, note: str) -> None:
    prepared = made(tmp_path, model)
    assert "tokenizer.json" not in prepared.tokenizer.files
    assert "tokenizer.model" in prepared.tokenizer.files
    assert len(prepared.notes) == 1
    (said,) = readable_tokenizer(prepared.tokenizer, "hf").notes
    assert note in said
    assert readable_tokenizer(prepared.tokenizer, "llava").notes == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\x0a\xff\xff\xff\xff\x0f",  # a piece beyond the end
        b"\x0a\x02\x0a",  # half a piece
        b"\x0a\x03\x15\x00\x00",  # a score of two bytes
        b"\x0b",  # a group, which protobuf 3 has no more
        b"\x08" + b"\xff" * 11,  # a number without end
        b"\x0a\x02\x08\x01",  # a piece whose text is a number
        b"\x12\x02\x18\x02",  # no pieces
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ConversionError, match="SentencePiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_more_pieces_than_any_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two bytes each in the file, and two hundred in memory.
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x00" * 11)
    assert len(read_sentencepiece(tmp_path / "tokenizer.model").pieces) == 11
    monkeypatch.setattr("xtuner2llava.tokenizers.sentencepiece._MAX_PIECES", 10)
    with pytest.raises(ConversionError, match="SentencePiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_special_tokens_may_be_described_as_older_transformers_save_them(tmp_path: Path) -> None:
    # baichuan-inc/Baichuan2-7B-Chat, tokenizer_config.json.
    flags = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False}
    described = {f"{n}_token": {**flags, "content": t} for n, t in
                 (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", "<unk>"))}  # fmt: skip
    base = write_base(tmp_path, model_of([*SPECIAL, *normal("a")]), **described)
    content = prepare(base).tokenizer.made["tokenizer.json"]()
    assert json.loads(content)["model"]["unk_token"] == "<unk>"  # noqa: S105
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(content.decode()).encode("a").tokens[0] == "<s>"


def test_a_bos_token_that_is_not_a_text_is_not_added(tmp_path: Path) -> None:
    base = write_base(tmp_path, model_of([*SPECIAL, *normal("a")]), bos_token=["<s>"])
    content = json.loads(prepare(base).tokenizer.made["tokenizer.json"]())
    assert content["post_processor"]["special_tokens"] == {}
