"""A tokenizer's files: which there are, what ids their tokens have, and how many.

Read without transformers, because planning must answer at once, and because importing a tokenizer
of an untrusted folder is more than reading it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.json_file import Json, read_json, text
from xtuner2llava.storage.small_file import inside
from xtuner2llava.tokenizers.added_token import decoder_tokens, fast_tokens
from xtuner2llava.tokenizers.sentencepiece_model import read_sentencepiece

CONFIG = "tokenizer_config.json"
FAST = "tokenizer.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
# What `PreTrainedTokenizer.save_pretrained` and the slow tokenizers of the families write. Python
# files are left out: LLaVA never passes trust_remote_code.
_NAMES = (
    FAST,
    CONFIG,
    SPECIAL_MAP,
    ADDED,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "qwen.tiktoken",
)
_VOCABULARIES = (FAST, "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
_INNER = ("normalizers", "pretokenizers", "processors", "decoders")

# Makes the content of a file when it is written; planning does not wait for it.
MadeFile: TypeAlias = Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer as files: those copied from `folder` as they are, and those that are made.

    `config` is tokenizer_config.json, and `special_map` special_tokens_map.json, as they will be
    written; empty where there is none.
    """

    folder: Path
    copied: tuple[str, ...]
    made: Mapping[str, MadeFile]
    ids: Mapping[str, int] = field(repr=False)
    config: Mapping[str, Json] = field(repr=False)
    special_map: Mapping[str, Json] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files."""
        return (*self.copied, *self.made)

    @property
    def length(self) -> int:
        """`len(tokenizer)` of transformers: the number of different tokens."""
        return len(set(self.ids.values()))

    @property
    def highest_id(self) -> int:
        return max(self.ids.values(), default=-1)

    def special(self, key: str) -> str | None:
        """The text of a special token such as `bos_token`; None if it is not set."""
        value = self.config[key] if key in self.config else self.special_map.get(key)
        if isinstance(value, dict):
            return text(value, "content")
        return value if isinstance(value, str) else None

    def read(self, name: str) -> dict[str, Json] | None:
        """The content of one of its JSON files as it will be written; None if there is none."""
        if name in self.made:
            value = json.loads(self.made[name]())
            assert isinstance(value, dict)  # noqa: S101 - made here
            return value
        return read_json(self.folder / name) if name in self.copied else None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A tokenizer that transformers loads by itself, and what was done for that."""

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises `CorruptFileError` if there is none or it is damaged."""
    files = tuple(name for name in _NAMES if (folder / name).is_file())
    if not any(name in files for name in _VOCABULARIES):
        raise CorruptFileError(
            "holds no tokenizer, expected one of " + ", ".join(_VOCABULARIES[:3]),
            where=str(folder),
            advice="Give the base LLM's folder with --llm.",
        )
    for name in files:  # They are published: none may be a link to something else.
        inside(folder, name)
    config = read_json(folder / CONFIG) if CONFIG in files else {}
    special_map = read_json(folder / SPECIAL_MAP) if SPECIAL_MAP in files else {}
    ids = _fast_ids(folder / FAST) if FAST in files else _slow_ids(folder, files)
    if ADDED in files:
        ids.update(integers(read_json(folder / ADDED)))
    ids.update((token.text, token.id) for token in decoder_tokens(config))
    return Tokenizer(folder, files, {}, ids, config, special_map)


def slow_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the files from which transformers makes a slow tokenizer, without added ones.

    The files of a tokenizer that is made lie nowhere yet: then there are none.
    """
    return _slow_ids(tokenizer.folder, tokenizer.copied)


def _slow_ids(folder: Path, files: Sequence[str]) -> dict[str, int]:
    if "vocab.json" in files:
        return integers(read_json(folder / "vocab.json"))
    if "tokenizer.model" in files:
        return read_sentencepiece(folder / "tokenizer.model").ids
    return {}


def steps(part: Json) -> Iterator[dict[str, Json]]:
    """A part of a tokenizer.json such as its normalizer, or those that it is a Sequence of."""
    if not isinstance(part, dict):
        return
    inner = next((part[key] for key in _INNER if key in part), None)
    if part.get("type") != "Sequence" or not isinstance(inner, list):
        yield part
        return
    for one in inner:
        yield from steps(one)


def json_file(values: Mapping[str, Json], indent: int | None = None) -> bytes:
    """JSON as a file; without `indent` it is compact, which is ten times faster to write.

    Raises `CorruptFileError` for texts that are not Unicode, which no tokenizer would read.
    """
    if indent is None:
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    else:
        text = json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorruptFileError("a token is not valid Unicode", where="the tokenizer") from error


def _fast_ids(path: Path) -> dict[str, int]:
    """The ids of a `tokenizer.json` (huggingface/tokenizers); vocabularies are dicts or lists."""
    content = read_json(path)
    ids: dict[str, int] = {}
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        ids.update(integers(vocab))
    elif isinstance(vocab, list):
        for rank, entry in enumerate(vocab):
            if isinstance(entry, list) and entry and isinstance(entry[0], str):
                ids[entry[0]] = rank
    ids.update((token.text, token.id) for token in fast_tokens(content))
    return ids


def integers(values: Mapping[str, Json]) -> dict[str, int]:
    """Those of `values` that are integers, and none below 0: ids of tokens."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0
    }
