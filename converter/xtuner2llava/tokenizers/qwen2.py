"""Qwen 1's tokenizer as a Qwen2Tokenizer, which transformers has and Qwen 1's is not.

Both normalise to NFC, split by the same expression, and number their tokens alike; only the files
differ (Qwen/Qwen-7B `tokenization_qwen.py`; transformers `models/qwen2/tokenization_qwen2.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, PlanError, raise_faults
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.tokenizers.added_token import AddedToken
from xtuner2llava.tokenizers.byte_pairs import merges
from xtuner2llava.tokenizers.editing import added_tokens, with_made
from xtuner2llava.tokenizers.tiktoken_file import read_ranks
from xtuner2llava.tokenizers.tokenizer import FAST, MadeFile, Tokenizer, integers, json_file

VOCAB, MERGES = "vocab.json", "merges.txt"
_MAX_MERGES = 1 << 26  # bytes; Qwen2's has 1.7 million

# tokenization_qwen.py and tokenization_qwen2.py have the same one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    expected = {index for index in range(len(ranks), len(ranks) + len(special_tokens))}
    if set(special_tokens.values()) != expected:
        ids = sorted(special_tokens.values())
        raise PlanError(
            f"has {len(ranks):,} tokens, and the mapping's special tokens have the ids "
            f"{ids[0]} to {ids[-1]}; they must follow"
            if ids
            else "the mapping names no special tokens",
            where=str(path),
            advice="Say the ids of this tokenizer's special tokens in the family's `tokenizer`.",
        )
    vocab = {_as_text(token): rank for token, rank in ranks.items()}
    added = [
        AddedToken(text, index)
        for text, index in sorted(special_tokens.items(), key=lambda item: item[1])
    ]
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
    pairs = _Pairs(vocab, str(path))
    made: dict[str, MadeFile] = {
        VOCAB: lambda: json_file(vocab),
        MERGES: lambda: _merges_txt(pairs.all()),
        "tokenizer.json": lambda: json_file(_tokenizer_json(vocab, pairs.all(), added)),
        "tokenizer_config.json": lambda: json_file(settings, indent=2),
    }
    return Tokenizer(path.parent, (), made, {**vocab, **special_tokens}, settings)


def with_fast_file_of_merges(tokenizer: Tokenizer) -> Tokenizer:
    """A Qwen2Tokenizer's files with the tokenizer.json that transformers makes where it is missing.

    That is the one of 4.38 to 4.57 (`convert_slow_tokenizer.py`, Qwen2Converter); transformers 5
    makes none for LLaVA. Raises `CorruptFileError` where vocab.json and merges.txt do not fit.
    """
    path = tokenizer.folder / MERGES
    vocab = integers(read_json(tokenizer.folder / VOCAB))
    pairs = list(_read_merges(path, vocab))
    added = sorted(added_tokens(tokenizer), key=lambda token: token.id)
    return with_made(tokenizer, {FAST: lambda: json_file(_tokenizer_json(vocab, pairs, added))})


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


class _Pairs:
    """The merges of a vocabulary, found once, when they are needed: it takes a second."""

    def __init__(self, vocab: Mapping[str, int], where: str) -> None:
        self._vocab, self._where = vocab, where
        self._found: list[tuple[str, str]] | None = None

    def all(self) -> list[tuple[str, str]]:
        if self._found is None:
            tokens = [token for token in self._vocab if len(token) > 1]
            found = merges(self._vocab, tokens, self._where)
            unmade = [token for token, pair in found if pair is None]
            raise_faults(
                CorruptFileError,
                [
                    Fault(
                        self._where,
                        f"token {self._vocab[token]} is not a merge of others, so Qwen2Tokenizer "
                        "would never make it",
                    )
                    for token in unmade[:10]
                ],
            )
            self._found = [pair for _, pair in found if pair is not None]
        return self._found


def _merges_txt(pairs: Sequence[tuple[str, str]]) -> bytes:
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in pairs)]
    return ("\n".join(lines) + "\n").encode()


def _tokenizer_json(
    vocab: Mapping[str, int], pairs: Sequence[tuple[str, str]], added: Sequence[AddedToken]
) -> dict[str, Json]:
    """As huggingface/tokenizers writes it; merges as texts, which all its versions read."""
    bytes_only: dict[str, Json] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.in_tokenizer_json for token in added],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                bytes_only,
            ],
        },
        "post_processor": bytes_only,
        "decoder": bytes_only,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(vocab),
            "merges": [f"{left} {right}" for left, right in pairs],
        },
    }


def _alphabet() -> dict[int, str]:
    """The visible character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 stands for itself, the rest is moved behind U+0100 in order
    (openai/gpt-2 `encoder.py`, `bytes_to_unicode`).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    moved = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {byte: moved.get(byte, chr(byte)) for byte in range(256)}


_ALPHABET = _alphabet()


def _as_text(token: bytes) -> str:
    return "".join([_ALPHABET[byte] for byte in token])
