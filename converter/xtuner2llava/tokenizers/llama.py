"""SentencePiece tokenizers as LlamaTokenizer, slow and fast.

Remote code wraps some of them, and LlamaTokenizer does the same.
InternLM2's is such a one: its slow tokenizer runs the SentencePiece model as it is, and so does
LlamaTokenizer with `legacy`; its fast one is built as here (internlm/internlm2-chat-7b
`tokenization_internlm2.py`, `tokenization_internlm2_fast.py`; transformers 4.37.2
`models/llama/tokenization_llama.py`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace

from xtuner2llava.errors import PlanError
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.added_token import AddedToken
from xtuner2llava.tokenizers.byte_pairs import merges
from xtuner2llava.tokenizers.editing import added_tokens, with_made
from xtuner2llava.tokenizers.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    model_bytes,
    read_sentencepiece,
    with_texts,
)
from xtuner2llava.tokenizers.tokenizer import CONFIG, FAST, MadeFile, Tokenizer, json_file

MODEL = "tokenizer.model"
_SPACE = "\u2581"
# Of the remote classes; LlamaTokenizer would keep them and never look at them.
_DROPPED = ("auto_map", "decode_with_prefix_space", "vocab_file")


def from_sentencepiece(tokenizer: Tokenizer, special_tokens: Mapping[str, int]) -> Tokenizer:
    """The LlamaTokenizer of a folder with a `tokenizer.model`.

    It has a tokenizer.json where huggingface/tokenizers can do exactly what the model says. Added
    tokens keep their ids; where one stands for a piece of another text, as InternLM2's
    <|im_end|> does, the piece is given its text, since LlamaTokenizer would else count both.
    `special_tokens` (text to id) are added to those that the folder's own files name.
    """
    path = tokenizer.folder / MODEL
    model = read_sentencepiece(path)
    added = {token.id: token for token in added_tokens(tokenizer)}
    for text, index in special_tokens.items():
        added.setdefault(index, AddedToken(text, index))
    ids = model.ids
    renamed = {
        index: token.text
        for index, token in added.items()
        if index < len(model.pieces) and model.pieces[index].text != token.text
    }
    double = [text for text in renamed.values() if text in ids]
    if double:
        raise PlanError(
            f"token '{double[0]}' is a piece of the model and an added token with another id",
            where=str(path),
            advice="LlamaTokenizer has one id for each token.",
        )
    texts = [renamed.get(index, piece.text) for index, piece in enumerate(model.pieces)]
    everything = sorted(added.values(), key=lambda token: token.id)
    config = _config(tokenizer, model, everything)
    made: dict[str, MadeFile] = {CONFIG: lambda: json_file(config, indent=2)}
    if renamed:
        made[MODEL] = lambda: with_texts(model_bytes(path), renamed)
    if _has_fast_form(model):
        made[FAST] = lambda: json_file(_tokenizer_json(model, texts, everything, config))
    kept = tuple(name for name in tokenizer.copied if name not in made and name != FAST)
    known = {text: index for index, text in enumerate(texts)}
    known |= {token.text: token.id for token in everything}
    return Tokenizer(tokenizer.folder, kept, made, known, config, tokenizer.special_map)


def with_fast_file(tokenizer: Tokenizer) -> Tokenizer | None:
    """A LlamaTokenizer's files with the tokenizer.json that transformers makes where it is missing.

    That is the one of LlamaTokenizerFast in transformers 4.41 to 4.57, which leaves the
    normalization of tokenizer.model aside (`convert_slow_tokenizer.py`, LlamaConverter). None where
    tokenizer.model is not byte-pair encoding. Raises `CorruptFileError`.
    """
    model = replace(
        read_sentencepiece(tokenizer.folder / MODEL),
        byte_fallback=True,
        adds_dummy_prefix=tokenizer.config.get("add_prefix_space") is not False,
        removes_extra_spaces=False,
        escapes_spaces=True,
        charsmap=b"",
    )
    if model.algorithm != BPE:
        return None
    texts = [piece.text for piece in model.pieces]
    config: dict[str, Json] = {"add_bos_token": True, **tokenizer.config}
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {key: tokenizer.special(key) or text for key, text in defaults.items()}
    added = sorted(added_tokens(tokenizer), key=lambda token: token.id)

    def make() -> bytes:
        content = _tokenizer_json(model, texts, added, config)
        if config.get("legacy") is False:
            scheme = "first" if model.adds_dummy_prefix else "never"
            content["normalizer"] = None
            content["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": _SPACE,
                "prepend_scheme": scheme,
                "split": False,
            }
        return json_file(content)

    return with_made(tokenizer, {FAST: make})


def _config(
    tokenizer: Tokenizer, model: SentencePieceModel, added: Sequence[AddedToken]
) -> dict[str, Json]:
    before = {key: value for key, value in tokenizer.config.items() if key not in _DROPPED}
    controls = [piece.text for piece in model.pieces if piece.kind == CONTROL]
    settings: dict[str, Json] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.special("bos_token") or next(iter(controls), None),
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.special("eos_token") or next(iter(controls[1:]), None),
        "unk_token": tokenizer.special("unk_token") or model.first(UNKNOWN),
        **before,
        "added_tokens_decoder": {str(token.id): token.in_config for token in added},
        # The SentencePiece model alone decides what is done with spaces.
        "legacy": True,
        "tokenizer_class": "LlamaTokenizer",
    }
    # No add_prefix_space, even where it is false: for it, fast tokenizers of transformers 4.40 and
    # later leave tokenizer.json aside and convert the slow one.
    settings.pop("add_prefix_space", None)
    return settings


def _has_fast_form(model: SentencePieceModel) -> bool:
    """Whether huggingface/tokenizers can do exactly what the model says."""
    return (
        model.algorithm == BPE
        and model.escapes_spaces
        and not model.removes_extra_spaces
        and not any(piece.kind == USER_DEFINED and _SPACE in piece.text for piece in model.pieces)
    )


def _tokenizer_json(
    model: SentencePieceModel,
    texts: Sequence[str],
    added: Sequence[AddedToken],
    config: Mapping[str, Json],
) -> dict[str, Json]:
    """As huggingface/tokenizers writes it."""
    vocab = {text: index for index, text in enumerate(texts)}
    known = {token.id for token in added}
    own = {
        index: AddedToken(piece.text, index, special=piece.kind != USER_DEFINED)
        for index, piece in enumerate(model.pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED) and index not in known
    }
    everything = sorted([*added, *own.values()], key=lambda token: token.id)
    normalizers: list[Json] = []
    if model.charsmap:
        text = base64.b64encode(model.charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": text})
    if model.adds_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": _SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.adds_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.in_tokenizer_json for token in everything],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocab, config),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": config.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "vocab": dict(vocab),
            "merges": _merges(model, texts),
        },
    }


def _merges(model: SentencePieceModel, texts: Sequence[str]) -> list[Json]:
    """Best score first; of the pieces that are merged from others, each from its two parts."""
    normal = [index for index, piece in enumerate(model.pieces) if piece.kind == NORMAL]
    normal.sort(key=lambda index: (-model.pieces[index].score, index))
    ranks = {texts[index]: rank for rank, index in enumerate(normal)}
    found = merges(ranks, [text for text in ranks if len(text) > 1], MODEL)
    return [
        f"{pair[0]} {pair[1]}"
        for _, pair in found
        if pair is not None and pair[0] in ranks and pair[1] in ranks
    ]


def _post_processor(vocab: Mapping[str, int], config: Mapping[str, Json]) -> Json:
    """Puts bos and eos around a text where the config says so."""
    bos, eos = config.get("bos_token"), config.get("eos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    eos = eos.get("content") if isinstance(eos, dict) else eos
    add_bos, add_eos = (config.get(key) is True for key in ("add_bos_token", "add_eos_token"))
    before = [bos] if add_bos and isinstance(bos, str) and bos in vocab else []
    after = [eos] if add_eos and isinstance(eos, str) and eos in vocab else []
    special = dict.fromkeys([*before, *after])

    def template(sequence: str, kind: int) -> list[Json]:
        def around(tokens: Sequence[Json]) -> list[Json]:
            return [{"SpecialToken": {"id": token, "type_id": kind}} for token in tokens]

        return [*around(before), {"Sequence": {"id": sequence, "type_id": kind}}, *around(after)]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in special
        },
    }
