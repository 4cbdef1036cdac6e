"""SentencePiece tokenizers as LlamaTokenizer, slow and fast.

Remote code wraps some of them, and LlamaTokenizer does the same.
InternLM2's is such a one: its slow tokenizer runs the SentencePiece model as it is, and so does
LlamaTokenizer with `legacy`; its fast one is built as here (internlm/internlm2-chat-7b
`tokenization_internlm2.py`, `tokenization_internlm2_fast.py`; transformers 4.37.2
`models/llama/tokenization_llama.py`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from xtuner2llava.errors import PlanError
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.byte_pairs import merges
from xtuner2llava.tokenizers.fast_file import around_text, byte_pair_file
from xtuner2llava.tokenizers.sentencepiece import (
    BPE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    model_bytes,
    read_sentencepiece,
    with_texts,
)
from xtuner2llava.tokenizers.tokenizer import (
    CONFIG,
    FAST,
    MODEL,
    AddedToken,
    MadeFile,
    Tokenizer,
    json_file,
)

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
    added = {index: AddedToken(text, index) for text, index in special_tokens.items()}
    added |= {token.id: token for token in tokenizer.added_tokens()}
    everything = sorted(added.values(), key=lambda token: token.id)
    texts = [piece.text for piece in model.pieces]
    ids = model.ids
    renamed = {t.id: t.text for t in everything if t.id < len(texts) and texts[t.id] != t.text}
    for index, name in renamed.items():
        if name in ids:
            raise PlanError(
                f"token '{name}' is a piece of the model and an added token with another id",
                where=str(path),
                advice="LlamaTokenizer has one id for each token.",
            )
        texts[index] = name
    config = _config(tokenizer, model, everything)
    made: dict[str, MadeFile] = {CONFIG: lambda: json_file(config, indent=2)}
    if renamed:
        made[MODEL] = lambda: with_texts(model_bytes(path), renamed)
    if _has_fast_form(model):
        made[FAST] = lambda: json_file(_fast_file(model, texts, everything, result))
    kept = tuple(name for name in tokenizer.copied if name not in made and name != FAST)
    known = {text: index for index, text in enumerate(texts)} | {t.text: t.id for t in everything}
    result = Tokenizer(tokenizer.folder, kept, made, known, config, tokenizer.special_map)
    return result


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
    complete, added = replace(tokenizer, config=config), tokenizer.added_tokens()

    def make() -> bytes:
        content = _fast_file(model, texts, added, complete)
        if config.get("legacy") is False:
            scheme = "first" if model.adds_dummy_prefix else "never"
            content["normalizer"] = None
            content["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": SPACE,
                "prepend_scheme": scheme,
                "split": False,
            }
        return json_file(content)

    return tokenizer.with_made({FAST: make})


def _config(
    tokenizer: Tokenizer, model: SentencePieceModel, added: Sequence[AddedToken]
) -> dict[str, Json]:
    controls = [piece.text for piece in model.pieces if piece.kind == CONTROL]
    unknown = (piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    settings: dict[str, Json] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.special("bos_token") or next(iter(controls), None),
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.special("eos_token") or next(iter(controls[1:]), None),
        "unk_token": tokenizer.special("unk_token") or next(unknown, None),
        **{key: value for key, value in tokenizer.config.items() if key not in _DROPPED},
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
        and not any(piece.kind == USER_DEFINED and SPACE in piece.text for piece in model.pieces)
    )


def _fast_file(
    model: SentencePieceModel,
    texts: Sequence[str],
    added: Iterable[AddedToken],
    tokenizer: Tokenizer,
) -> dict[str, Json]:
    """tokenizer.json; `texts` are those of the pieces, `tokenizer` has the special tokens."""
    everything = {
        index: AddedToken(piece.text, index, special=piece.kind != USER_DEFINED)
        for index, piece in enumerate(model.pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    } | {token.id: token for token in added}
    normalizers: list[Json] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.adds_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        normalizers.insert(0, {"type": "Precompiled", "precompiled_charsmap": charsmap})
    vocab = {text: index for index, text in enumerate(texts)}

    def around(name: str) -> dict[str, int]:
        """The token `name`_token, if it stands around each text."""
        token = tokenizer.special(f"{name}_token")
        adds = tokenizer.config.get(f"add_{name}_token") is True
        return {token: vocab[token]} if adds and token is not None and token in vocab else {}

    return byte_pair_file(
        vocab,
        _merges(model, texts),
        [*everything.values()],
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=around_text(around("bos"), around("eos")),
        decoder={"type": "Sequence", "decoders": decoders},
        unk_token=tokenizer.special("unk_token"),
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(model: SentencePieceModel, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Best score first; of the pieces that are merged from others, each from its two parts."""
    normal = [index for index, piece in enumerate(model.pieces) if piece.kind == NORMAL]
    normal.sort(key=lambda index: (-model.pieces[index].score, index))
    ranks = {texts[index]: rank for rank, index in enumerate(normal)}
    for pair in merges(ranks, [name for name in ranks if len(name) > 1], MODEL):
        if pair is not None and {*pair} <= ranks.keys():
            yield pair
