"""Qwen's tokenizers: Qwen 1's as a Qwen2Tokenizer, and tokenizer.json of a Qwen2Tokenizer's files.

transformers has Qwen2Tokenizer, and Qwen 1's is not in it. Both normalise to NFC, split by the same
expression, and number their tokens alike; only the files differ (Qwen/Qwen-7B
`tokenization_qwen.py`; transformers `models/qwen2/tokenization_qwen2.py`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, PlanError, raise_faults
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.tokenizers.byte_pairs import merges
from xtuner2llava.tokenizers.fast_file import byte_pair_file
from xtuner2llava.tokenizers.tokenizer import (
    CONFIG,
    FAST,
    MERGES,
    VOCAB,
    AddedToken,
    MadeFile,
    Tokenizer,
    integers,
    json_file,
)

_MAX_MERGES = 1 << 26  # bytes; Qwen2's has 1.7 million
_MAX_RANKS = 32 << 20  # bytes; Qwen's has 2.6 million
_MAX_TOKENS = 1_000_000
_MAX_FAULTS = 10
_RANK = re.compile(rb"([^ ]*) (\d{1,9})")

# tokenization_qwen.py and tokenization_qwen2.py have the same one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL: Json = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}
# The visible character that stands for each byte in a byte-level vocabulary. Printable Latin-1
# stands for itself, the rest is moved behind U+0100 in order (openai/gpt-2 `encoder.py`,
# `bytes_to_unicode`).
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_MOVED = [byte for byte in range(256) if byte not in _PRINTABLE]
_ALPHABET = {byte: chr(byte) for byte in _PRINTABLE} | {
    b: chr(256 + n) for n, b in enumerate(_MOVED)
}


def from_tiktoken(
    path: Path,
    config: Mapping[str, Json],
    special_tokens: Mapping[str, int],
    *,
    eos: str | None,
    pad: str | None,
) -> Tokenizer:
    """The Qwen2Tokenizer with the ranks of the file `path` and `special_tokens` (text to id).

    Of the tokenizer_config `config`, `model_max_length` and a chat template stay. It has no bos
    token. Files: vocab.json, merges.txt, tokenizer.json, tokenizer_config.json. Raises
    `CorruptFileError`, and `PlanError` where the special tokens do not follow on the ranks.
    """
    ranks = read_ranks(path)
    ids = sorted(special_tokens.values())
    if set(ids) != {*range(len(ranks), len(ranks) + len(special_tokens))}:
        raise PlanError(
            f"has {len(ranks):,} tokens, and the mapping's special tokens have the ids "
            f"{ids[0]} to {ids[-1]}; they must follow",
            where=str(path),
            advice="Say the ids of this tokenizer's special tokens in the family's `tokenizer`.",
        )
    vocab = {"".join([_ALPHABET[b] for b in token]): rank for token, rank in ranks.items()}
    by_id = sorted((index, text) for text, index in special_tokens.items())
    added = [AddedToken(text, index) for index, text in by_id]
    kept = {key: config[key] for key in ("model_max_length", "chat_template") if key in config}
    settings: dict[str, Json] = {
        **kept,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token.id): token.in_config for token in added},
        "additional_special_tokens": [t.text for t in added if t.text not in (eos, pad)],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "errors": "replace",
        "pad_token": pad,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    pairs = cache(lambda: _pairs(vocab, str(path)))  # It takes a second.
    made: dict[str, MadeFile] = {
        VOCAB: lambda: json_file(vocab),
        MERGES: lambda: "\n".join(["#version: 0.2", *map(" ".join, pairs()), ""]).encode(),
        FAST: lambda: _fast_file(vocab, pairs(), added),
        CONFIG: lambda: json_file(settings, indent=2),
    }
    return Tokenizer(path.parent, (), made, {**vocab, **special_tokens}, settings)


def read_ranks(path: Path) -> Mapping[bytes, int]:
    """The tokens of the file `path` in the order of their ranks, which are 0, 1, 2 and so on.

    Each line is a token in base64, a space and its rank (openai/tiktoken `tiktoken/load.py`). All
    256 single bytes are among them. Raises `CorruptFileError` with the lines that are wrong.
    """
    faults: list[Fault] = []
    ranks: dict[bytes, int] = {}
    places: dict[int, int] = {}
    for number, line in enumerate(read_small(path, _MAX_RANKS).splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = _rank(line)
            if token in ranks:
                raise ValueError(f"repeats the token of rank {ranks[token]}")
            if rank in places:
                raise ValueError(f"repeats rank {rank} of line {places[rank]}")
            ranks[token], places[rank] = rank, number
        except ValueError as error:
            faults.append(Fault(f"{path}:{number}", str(error)))
        if len(faults) > _MAX_FAULTS or len(ranks) > _MAX_TOKENS:
            faults.append(Fault(str(path), "is not a file of tiktoken ranks"))
            break
    if not faults:
        lacking = next((rank for rank in range(len(places)) if rank not in places), None)
        if lacking is not None:
            faults.append(Fault(str(path), f"rank {lacking} is missing of {len(places):,}"))
        if lacked := sum(bytes([byte]) not in ranks for byte in range(256)):
            faults.append(Fault(str(path), f"{lacked} of the 256 single bytes are missing"))
    raise_faults(CorruptFileError, faults)
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _rank(line: bytes) -> tuple[bytes, int]:
    """The token of a line and its rank. Raises `ValueError`."""
    found = _RANK.fullmatch(line)
    if found is None:
        raise ValueError("is not a token in base64, a space and a rank")
    try:
        token = base64.b64decode(found[1], validate=True)
    except binascii.Error:
        raise ValueError("has a token that is not base64") from None
    if not token:
        raise ValueError("has an empty token")
    return token, int(found[2])


def _pairs(vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """The merges of the vocabulary. Raises `CorruptFileError` where a token has none."""
    tokens = [token for token in vocab if len(token) > 1]
    found = merges(vocab, tokens, where)
    never = "is not a merge of others, so Qwen2Tokenizer would never make it"
    unmade = [token for token, pair in zip(tokens, found, strict=True) if pair is None]
    faults = [Fault(where, f"token {vocab[token]} {never}") for token in unmade[:_MAX_FAULTS]]
    raise_faults(CorruptFileError, faults)
    return [pair for pair in found if pair is not None]


def with_fast_file_of_merges(tokenizer: Tokenizer) -> Tokenizer:
    """A Qwen2Tokenizer's files with the tokenizer.json that transformers makes where it is missing.

    That is the one of 4.38 to 4.57 (`convert_slow_tokenizer.py`, Qwen2Converter); transformers 5
    makes none for LLaVA. Raises `CorruptFileError` where vocab.json and merges.txt do not fit.
    """
    vocab = integers(read_json(tokenizer.folder / VOCAB))
    pairs = [*_read_merges(tokenizer.folder / MERGES, vocab)]
    added = tokenizer.added_tokens()
    return tokenizer.with_made({FAST: lambda: _fast_file(vocab, pairs, added)})


def _read_merges(path: Path, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    try:
        lines = read_small(path, _MAX_MERGES).decode().split("\n")
    except UnicodeDecodeError as error:
        raise CorruptFileError("is not UTF-8", where=str(path)) from error
    for number, line in enumerate(lines, 1):
        left, _, right = line.strip().partition(" ")
        if not left or (number == 1 and left.startswith("#version")):
            continue
        if not {left, right, left + right} <= vocab.keys():
            raise CorruptFileError(
                f"merges {line.strip()!r}, expected two tokens of {VOCAB} that make another",
                where=f"{path}:{number}",
                advice="Give --llm a folder whose vocab.json and merges.txt belong together.",
            )
        yield left, right


def _fast_file(
    vocab: Mapping[str, int], pairs: Iterable[tuple[str, str]], added: Sequence[AddedToken]
) -> bytes:
    split: Json = {
        "type": "Split",
        "pattern": {"Regex": _SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    content = byte_pair_file(
        vocab,
        pairs,
        added,
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]},
        post_processor=_BYTE_LEVEL,
        decoder=_BYTE_LEVEL,
        affix="",
    )
    return json_file(content)
