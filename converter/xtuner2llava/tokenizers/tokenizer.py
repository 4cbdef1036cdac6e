"""A tokenizer's files: which there are, what ids their tokens have, and how many.

Read without transformers, because planning must answer at once, and because importing a tokenizer
of an untrusted folder is more than reading it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeGuard

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.json_file import Json, items, read_json, table, text
from xtuner2llava.storage.small_file import inside
from xtuner2llava.tokenizers.sentencepiece import read_sentencepiece

CONFIG, FAST = "tokenizer_config.json", "tokenizer.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
MODEL, VOCAB, MERGES = "tokenizer.model", "vocab.json", "merges.txt"
# What `PreTrainedTokenizer.save_pretrained` and the slow tokenizers of the families write. Python
# files are left out: LLaVA never passes trust_remote_code.
FILES = (
    FAST, CONFIG, SPECIAL_MAP, ADDED, MODEL, VOCAB, MERGES, "vocab.txt", "chat_template.jinja",
    "chat_template.json", "qwen.tiktoken",
)  # fmt: skip
_VOCABULARIES = (FAST, MODEL, VOCAB, "vocab.txt", "qwen.tiktoken")
_INNER = ("normalizers", "pretokenizers", "processors", "decoders")
# Named special tokens (transformers `tokenization_utils_base.py`, SPECIAL_TOKENS_ATTRIBUTES).
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
ADDITIONAL = "additional_special_tokens"
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")

# Makes the content of a file when it is written; planning does not wait for it.
MadeFile: TypeAlias = Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in a text before anything else is done to it.

    `special` ones are left out when a text is decoded without special tokens. The flags are those
    of huggingface/tokenizers `AddedToken`.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    normalized: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def in_config(self) -> dict[str, Json]:
        """As an entry of `added_tokens_decoder` in tokenizer_config.json."""
        flags: dict[str, Json] = {key: getattr(self, key) for key in _FLAGS}
        return {"content": self.text, **flags, "special": self.special}

    @property
    def in_tokenizer_json(self) -> dict[str, Json]:
        """As an entry of `added_tokens` in tokenizer.json."""
        return {"id": self.id, **self.in_config}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer as files: those copied from `folder` as they are, and those that are made.

    `config` is tokenizer_config.json, and `special_map` special_tokens_map.json, as they will be
    written, or as transformers reads them together; empty where there is none.
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

    @property
    def slow_class(self) -> str:
        """The class that its config names, without the `Fast` at its end."""
        return str(self.config.get("tokenizer_class")).removesuffix("Fast")

    def special(self, key: str) -> str | None:
        """The text of a special token such as `bos_token`; None if it is not set."""
        value = self.config[key] if key in self.config else self.special_map.get(key)
        if isinstance(value, dict):
            return text(value, "content")
        return value if isinstance(value, str) else None

    def read(self, name: str) -> dict[str, Json]:
        """The content of one of its JSON files as it will be written; empty if there is none."""
        if name in self.made:
            value = json.loads(self.made[name]())
            assert isinstance(value, dict)  # noqa: S101 - made here
            return value
        return read_json(self.folder / name) if name in self.copied else {}

    def added_tokens(self) -> list[AddedToken]:
        """The tokens that are already found whole, from whichever file says so."""
        found = {token.id: token for token in decoder_tokens(self.config)}
        if not found:
            found = {token.id: token for token in reversed(fast_tokens(self.read(FAST)))}
        special = [text for key in NAMED if (text := self.special(key)) is not None]
        for values in (self.config, self.special_map):
            special += additional_tokens(values)
        for name, index in integers(self.read(ADDED)).items():
            found.setdefault(index, AddedToken(name, index, special=name in special))
        for name in special:
            if name in self.ids:
                found.setdefault(self.ids[name], AddedToken(name, self.ids[name]))
        return list(found.values())

    # Changes, made in all files alike; each returns another tokenizer.

    def with_made(self, made: Mapping[str, MadeFile]) -> Tokenizer:
        """Some files are made, in place of those of the same names."""
        copied = tuple(name for name in self.copied if name not in made)
        return replace(self, copied=copied, made={**self.made, **made})

    def without_files(self, *names: str) -> Tokenizer:
        copied = tuple(name for name in self.copied if name not in names)
        made = {name: make for name, make in self.made.items() if name not in names}
        return replace(self, copied=copied, made=made)

    def with_config(
        self, changes: Mapping[str, Json], *, without: Collection[str] = ()
    ) -> Tokenizer:
        """Other values in tokenizer_config.json, and some keys less."""
        config = {k: v for k, v in {**self.config, **changes}.items() if k not in without}
        made = {CONFIG: lambda: json_file(config, indent=2)}
        return replace(self, config=config).with_made(made)

    def with_special_map(self, values: Mapping[str, Json]) -> Tokenizer:
        """`values` as its special_tokens_map.json, if it has one."""
        if SPECIAL_MAP not in self.files:
            return self
        made = {SPECIAL_MAP: lambda: json_file(values, indent=2)}
        return replace(self, special_map=values).with_made(made)

    def with_special_token(self, key: str, text: str | list[Json] | None) -> Tokenizer:
        """The token `text` as `key`, such as `bos_token`; None takes it off.

        The token must be one of the tokenizer's; a list is for `additional_special_tokens`.
        """
        special = {name: value for name, value in self.special_map.items() if name != key}
        if text is not None:
            special[key] = text
        return self.with_config({key: text}).with_special_map(special)

    def with_tokens(self, texts: Iterable[str]) -> Tokenizer:
        """`texts` are special tokens, each found whole in any text.

        A text that is a token already keeps its id; others get the ids that follow the highest one,
        which is how huggingface/tokenizers numbers them if there are no gaps
        (`added_vocabulary.rs`). Raises `CorruptFileError` where there are some.
        """
        known = self.added_tokens()
        whole = {token.text for token in known}
        wanted = [text for text in dict.fromkeys(texts) if text not in whole]
        unknown = [text for text in wanted if text not in self.ids]
        following = self.highest_id + 1
        if unknown and following != self.length:
            raise CorruptFileError(
                f"has {self.length:,} tokens with ids up to {self.highest_id:,}: with such gaps no "
                "token can be added, whose id would depend on the library",
                where=str(self.folder),
            )
        if not wanted:
            return self
        ids = {**self.ids, **{text: index for index, text in enumerate(unknown, following)}}
        new = [AddedToken(text, ids[text]) for text in wanted]
        # Where tokenizer_config.json lists added tokens, transformers reads no other file for them:
        # so all of them are listed, and the named ones are said there too.
        everything = sorted([*known, *new], key=lambda token: token.id)
        named = {key: self.special(key) for key in NAMED if key not in self.config}
        changes: dict[str, Json] = {k: text for k, text in named.items() if text is not None}
        changes["added_tokens_decoder"] = {str(token.id): token.in_config for token in everything}
        files: dict[str, MadeFile] = {}
        if ADDED in self.files:
            listed = {**self.read(ADDED), **{token.text: token.id for token in new}}
            files[ADDED] = lambda: json_file(listed, indent=2)
        if FAST in self.files:
            files[FAST] = lambda: self._fast_file_with(new)
        return replace(self, ids=ids).with_config(changes).with_made(files)

    def _fast_file_with(self, new: Sequence[AddedToken]) -> bytes:
        content = self.read(FAST)
        before = items(content, "added_tokens")
        tokens: Json = [*before, *(token.in_tokenizer_json for token in new)]
        return json_file({**content, "added_tokens": tokens})


class Prepared(NamedTuple):
    """A tokenizer that was changed for a purpose, and what to tell the user of it."""

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, *, slow: bool = False) -> Tokenizer:
    """The tokenizer in `folder`. Raises `CorruptFileError` if there is none or it is damaged.

    A `slow` one is without tokenizer.json where there are other files for it.
    """
    files = tuple(name for name in FILES if (folder / name).is_file())
    if slow and any(name in files for name in _VOCABULARIES if name != FAST):
        files = tuple(name for name in files if name != FAST)
    if not any(name in files for name in _VOCABULARIES):
        raise CorruptFileError(
            "holds no tokenizer, expected one of " + ", ".join(_VOCABULARIES[:3]),
            where=str(folder),
            advice="Give the base LLM's folder with --llm.",
        )
    for name in files:  # They are published: none may be a link to something else.
        inside(folder, name)
    config, special_map, added = (
        read_json(folder / name) if name in files else {} for name in (CONFIG, SPECIAL_MAP, ADDED)
    )
    if "added_tokens_decoder" not in config:
        # As before transformers 4.34; all versions then let special_tokens_map.json count first
        # (`tokenization_utils_base.py`, _from_pretrained).
        config |= {
            key: text(value, "content") if isinstance(value, dict) else value
            for key, value in special_map.items()
            if key in NAMED
        }
    ids = integers(added) | {token.text: token.id for token in decoder_tokens(config)}
    if FAST in files:  # What is in it keeps its id, in all versions.
        ids |= _fast_ids(folder / FAST)
    else:
        ids = slow_ids(folder, files) | ids
    return Tokenizer(folder, files, {}, ids, config, special_map)


def slow_ids(folder: Path, files: Iterable[str]) -> dict[str, int]:
    """The ids of the `files` from which transformers makes a slow tokenizer, without added ones."""
    if VOCAB in files:
        return integers(read_json(folder / VOCAB))
    return read_sentencepiece(folder / MODEL).ids if MODEL in files else {}


def _fast_ids(path: Path) -> dict[str, int]:
    """The ids of a `tokenizer.json` (huggingface/tokenizers); vocabularies are dicts or lists."""
    content = read_json(path)
    ids: dict[str, int] = {}
    match table(content, "model").get("vocab"):
        case dict(vocab):
            ids = integers(vocab)
        case list(vocab):
            for rank, entry in enumerate(vocab):
                if isinstance(entry, list) and entry and isinstance(entry[0], str):
                    ids[entry[0]] = rank
    return ids | {token.text: token.id for token in fast_tokens(content)}


def decoder_tokens(config: Mapping[str, Json]) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder` in a tokenizer_config."""
    entries = table(config, "added_tokens_decoder").items()
    return _described((int(i), entry) for i, entry in entries if i.isdecimal() and len(i) <= 9)


def fast_tokens(content: Mapping[str, Json]) -> list[AddedToken]:
    """The tokens of `added_tokens` in a tokenizer.json."""
    entries = items(content, "added_tokens")
    return _described((entry.get("id"), entry) for entry in entries if isinstance(entry, dict))


def additional_tokens(*places: Mapping[str, Json]) -> list[str]:
    """The texts of the additional special tokens, from the first of `places` that has the key."""
    entries = items(next((v for v in places if ADDITIONAL in v), {}), ADDITIONAL)
    return [token.text for token in _described((0, entry) for entry in entries)]


def _described(entries: Iterable[tuple[Json, Json]]) -> list[AddedToken]:
    """The tokens that pairs of an id and a description are of; a text is a special token's."""
    found = []
    for index, values in entries:
        if not _is_id(index):
            continue
        if isinstance(values, str):
            found.append(AddedToken(values, index))
        elif isinstance(values, dict) and (content := text(values, "content")) is not None:
            flags = {key: values.get(key) is True for key in ("special", *_FLAGS)}
            found.append(AddedToken(content, index, **flags))
    return found


def integers(values: Mapping[str, Json]) -> dict[str, int]:
    """Those of `values` that are integers, and none below 0: ids of tokens."""
    return {key: value for key, value in values.items() if _is_id(value)}


def _is_id(value: Json) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
