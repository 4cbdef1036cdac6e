"""Tokenizer files as the oldest versions that a format is for read them.

LLaVA pins transformers 4.37.2 with tokenizers 0.15; `hf` is for 4.45, with 0.20, and later. What
those do not read was found by giving them each part that tokenizers 0.23 can write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.added_token import AddedToken, decoder_tokens, fast_tokens
from xtuner2llava.tokenizers.byte_pairs import unreachable
from xtuner2llava.tokenizers.editing import (
    with_config,
    with_made,
    with_special_map,
    without_files,
    without_keys,
)
from xtuner2llava.tokenizers.llama import MODEL, with_fast_file
from xtuner2llava.tokenizers.qwen2 import MERGES, VOCAB, with_fast_file_of_merges
from xtuner2llava.tokenizers.tokenizer import (
    ADDED,
    CONFIG,
    FAST,
    SPECIAL_MAP,
    Prepared,
    Tokenizer,
    integers,
    json_file,
    slow_ids,
    steps,
)

_FAST_CLASS = "PreTrainedTokenizerFast"
_PREFIX = "add_prefix_space"
# What each class of transformers 4 reads when it is the slow one.
_FILES = {
    "LlamaTokenizer": ("tokenizer.model",),
    "CodeLlamaTokenizer": ("tokenizer.model",),
    "T5Tokenizer": ("spiece.model",),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model",),
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),
    "GPT2Tokenizer": ("vocab.json", "merges.txt"),
    "CodeGenTokenizer": ("vocab.json", "merges.txt"),
    "BertTokenizer": ("vocab.txt",),
    "GemmaTokenizer": ("tokenizer.model",),
}
# Those that have a fast class only; 4.37.2 lacks Gemma's and Cohere's.
_FAST_ONLY = ("BloomTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")
_SINCE_4_37 = ("CohereTokenizer", "GemmaTokenizer")
# Classes of transformers whose folders may carry an `auto_map` all the same: it is ignored.
KNOWN_CLASSES = frozenset(
    name + suffix
    for name in ("PreTrainedTokenizer", *_FILES, *_FAST_ONLY)
    for suffix in ("", "Fast")
)
# Types of tokenizers 0.15 in the parts of a tokenizer.json. 0.20 has the normalizer ByteLevel too.
_TYPES = {
    "normalizer": "BertNormalizer Strip StripAccents NFC NFD NFKC NFKD Sequence Lowercase Nmt "
    "Precompiled Replace Prepend",
    "pre_tokenizer": "BertPreTokenizer ByteLevel CharDelimiterSplit Metaspace Whitespace Sequence "
    "Split Punctuation WhitespaceSplit Digits UnicodeScripts",
    "post_processor": "RobertaProcessing BertProcessing ByteLevel TemplateProcessing Sequence",
    "decoder": "BPEDecoder ByteLevel WordPiece Metaspace CTC Sequence Replace Fuse Strip "
    "ByteFallback",
    "model": "BPE WordPiece WordLevel Unigram",
}


class _UnreadableError(Exception):
    """Why a tokenizer.json cannot be written for the versions that a format is for."""


def readable_tokenizer(tokenizer: Tokenizer, format_name: str) -> Prepared:
    """`tokenizer` with files that every version which `format_name` is for loads, and notes.

    It makes the same ids as before. Raises `UnsupportedError` where no file can be written that
    does, with what to give instead.
    """
    notes: list[str] = []
    result = tokenizer
    if FAST in tokenizer.files:
        content = tokenizer.read(FAST) or {}
        added = fast_tokens(content)
        try:
            changes = list(rewrite_fast(content, format_name))
        except _UnreadableError as error:
            result = _without_fast(tokenizer, str(error), format_name)
            notes.append(
                f"{FAST} is left out: {error}. transformers makes the fast tokenizer from "
                f"{_FILES[_slow_name(tokenizer)][0]}."
            )
        else:
            if changes:
                changed = fast_tokens(content)
                result = _with_fast(tokenizer, changed if changed != added else (), format_name)
                notes.append(
                    f"{FAST} is rewritten for {_READERS[format_name]}, with the same ids: "
                    f"{'; '.join(changes)}."
                )
            notes += _ignored_merges(content, format_name)
    elif format_name == "hf":
        result = _with_fast_of_slow(tokenizer, notes)
    result = _with_table_of_extra_tokens(result, notes)
    result = _with_known_class(result, format_name, notes)
    return Prepared(result, tuple(notes))


_READERS = {
    "llava": "tokenizers 0.15 of transformers 4.37.2",
    "hf": "tokenizers 0.20 of transformers 4.45",
}


def tokenizer_faults(tokenizer: Tokenizer, format_name: str) -> tuple[str, ...]:
    """What `readable_tokenizer` would still change; nothing where all versions load the files."""
    try:
        prepared = readable_tokenizer(tokenizer, format_name)
        return prepared.notes if prepared.tokenizer is not tokenizer else ()
    except UnsupportedError as error:
        return tuple(fault.what for fault in error.faults)


def rewrite_fast(content: dict[str, Json], format_name: str) -> Iterator[str]:
    """Rewrites a tokenizer.json in place; says what it changed."""
    old = format_name == "llava"
    for part, known in _TYPES.items():
        names = [*known.split(), *(() if old or part != "normalizer" else ("ByteLevel",))]
        for inner in steps(content.get(part)):
            kind = inner.get("type")
            # Before 0.8, a model did not say its type.
            if kind not in names and not (part == "model" and kind is None):
                raise _UnreadableError(
                    f"{_READERS[format_name]} does not have its {part} of type {kind}"
                )
    if old:
        yield from _text_merges(content)
        yield from _metaspace_without_split(content)
    yield from _metaspace_fields(content, old=old)


def _text_merges(content: dict[str, Json]) -> Iterator[str]:
    model = content.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(merges, list):
        return
    pairs = [pair for pair in merges if isinstance(pair, list)]
    if not pairs:
        return
    if any(" " in str(part) for pair in pairs for part in pair):
        raise _UnreadableError(f"{_READERS['llava']} cannot say merges of parts with spaces")
    model["merges"] = [
        " ".join(str(part) for part in pair) if isinstance(pair, list) else pair for pair in merges
    ]
    yield "each merge is one text"


def _metaspace_fields(content: dict[str, Json], *, old: bool) -> Iterator[str]:
    """0.15 wants `add_prefix_space`; 0.20 refuses one that `prepend_scheme` contradicts."""
    changed = False
    for part in ("pre_tokenizer", "decoder"):
        for inner in steps(content.get(part)):
            if inner.get("type") != "Metaspace":
                continue
            scheme, said = inner.get("prepend_scheme"), inner.get("add_prefix_space")
            if (said is None) if old else (said is False and scheme != "never"):
                scheme = "never" if said is False else scheme or "always"
                inner |= {"prepend_scheme": scheme, "add_prefix_space": scheme != "never"}
                changed = True
    if changed:
        yield "Metaspace says add_prefix_space and prepend_scheme alike"


def _metaspace_without_split(content: dict[str, Json]) -> Iterator[str]:
    """Metaspace that only writes spaces as `▁`, which 0.15 cannot, as a normalizer that does.

    There, Metaspace always splits at spaces too, and then no token with a space inside is found. A
    normalizer is given each text between added tokens, and does not know which is the `first`; but
    it is given the whole where added tokens are looked for in what it made of it (`normalized`).
    """
    part = content.get("pre_tokenizer")
    inner = [one for one in steps(part) if one.get("split") is False]
    if not inner:
        return
    added, before = fast_tokens(content), content.get("normalizer")
    scheme = inner[0].get("prepend_scheme", "always")
    first = scheme == "first"
    if (
        inner[0] is not part
        or (before is not None and (first or any(token.normalized for token in added)))
        or (first and any(token.single_word for token in added))
    ):
        raise _UnreadableError(f"{_READERS['llava']} has no Metaspace without split")
    replacement = str(inner[0].get("replacement", "▁"))
    normalizers: list[Json] = [before] if before is not None else []
    if first:
        normalizers += _stripping(added)
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": replacement})
    if scheme != "never":
        # Not in front of one that is there, nor of a token that is found whole.
        ahead = [replacement, *(token.text for token in added if first)]
        pattern = rf"\A(?!{'|'.join(map(re.escape, ahead))})"
        normalizers.append(
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": replacement}
        )
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    content["pre_tokenizer"] = None
    tokens = content.get("added_tokens")
    for values in tokens if isinstance(tokens, list) and before is None else ():
        if isinstance(values, dict):
            values["normalized"] = first
    yield "spaces are written as ▁ by the normalizer, as Metaspace did without split"


def _stripping(added: Sequence[AddedToken]) -> Iterator[Json]:
    """Removes spaces around the tokens that take them, before these become `▁`."""
    for flag, pattern in (("rstrip", r"(?<={})\s+"), ("lstrip", r"\s+(?={})")):
        texts = "|".join(re.escape(token.text) for token in added if getattr(token, flag))
        if texts:
            found: Json = {"Regex": pattern.format(texts)}
            yield {"type": "Replace", "pattern": found, "content": ""}


def _ignored_merges(content: Mapping[str, Json], format_name: str) -> Iterator[str]:
    """`ignore_merges` makes a word that is a token that token; 0.15 does not know it."""
    model = content.get("model")
    if format_name != "llava" or not isinstance(model, dict) or not model.get("ignore_merges"):
        return
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return
    pairs = [str(merge).partition(" ")[::2] for merge in merges]
    special = {token.text for token in fast_tokens(content)}
    found = unreachable([text for text in vocab if text not in special], pairs)
    if found:
        yield (
            f"{len(found):,} of the {len(vocab):,} tokens, such as {found[0]!r}, are not made by "
            f"merges; {_READERS[format_name]} ignores ignore_merges and writes such words in parts."
        )


def _with_fast(tokenizer: Tokenizer, changed: Sequence[AddedToken], format_name: str) -> Tokenizer:
    """`tokenizer` with the rewritten tokenizer.json, and `changed` flags of tokens in all files."""

    def make() -> bytes:
        # Made anew, since a vocabulary takes much more memory as a table than as a file.
        content = tokenizer.read(FAST) or {}
        list(rewrite_fast(content, format_name))
        return json_file(content)

    result = with_made(tokenizer, {FAST: make})
    if not changed:
        return result
    added = {token.text: token for token in changed}
    listed: Json = {str(token.id): token.in_config for token in changed}
    config = _with_flags({"added_tokens_decoder": listed, **tokenizer.config}, added)
    result = with_config(replace(result, config=config), {})
    if SPECIAL_MAP not in result.files:
        return result
    return with_special_map(result, _with_flags(tokenizer.special_map, added))


def _with_flags(values: Mapping[str, Json], added: Mapping[str, AddedToken]) -> dict[str, Json]:
    """The same values, in which each description of an added token has its flag `normalized`."""

    def of(value: Json) -> Json:
        if isinstance(value, dict):
            return _with_flags(value, added)
        return [of(one) for one in value] if isinstance(value, list) else value

    result = {key: of(value) for key, value in values.items()}
    token = added.get(str(result.get("content")))
    return result if token is None else {**result, "normalized": token.normalized}


def _with_fast_of_slow(tokenizer: Tokenizer, notes: list[str]) -> Tokenizer:
    """`tokenizer` with the tokenizer.json that some transformers would make another way, or not."""
    if _slow_name(tokenizer) == "Qwen2Tokenizer" and {VOCAB, MERGES} <= {*tokenizer.copied}:
        notes.append(
            f"{FAST} is made from {VOCAB} and {MERGES}, as transformers 4.38 to 4.57 make it for a "
            "base without; 5 makes none."
        )
        return with_fast_file_of_merges(tokenizer)
    if _slow_name(tokenizer) != "LlamaTokenizer" or MODEL not in tokenizer.files:
        return tokenizer
    result = with_fast_file(tokenizer)
    if result is None:
        notes.append(
            f"No {FAST} is written, because {MODEL} is not a byte-pair encoding: transformers 5, "
            "which has no slow LlamaTokenizer, may split texts differently."
        )
        return tokenizer
    note = (
        f"{FAST} is made from {MODEL}, as transformers 4.41 to 4.57 make it for a base without; "
        "5 would make one with other ids."
    )
    if tokenizer.config.get("legacy") is False:
        note += (
            " A training with an earlier transformers kept a space at the start of a text, which "
            "legacy false now drops: do not begin a prompt with one."
        )
    notes.append(note)
    return result


def _without_fast(tokenizer: Tokenizer, why: str, format_name: str) -> Tokenizer:
    """`tokenizer` without tokenizer.json, where its other files have the same ids."""
    name = _slow_name(tokenizer)
    needed = _FILES.get(name, ())
    has_all = bool(needed) and all(file in tokenizer.files for file in needed)
    if has_all:
        own = slow_ids(tokenizer) | integers(tokenizer.read(ADDED) or {})
        own |= {token.text: token.id for token in decoder_tokens(tokenizer.config)}
        has_all = all(own.get(text) == index for text, index in tokenizer.ids.items())
    if not has_all:
        raise UnsupportedError(
            why,
            where=str(tokenizer.folder / FAST),
            advice="Give --llm a folder that also has tokenizer.model, or vocab.json and "
            "merges.txt, or one that an earlier transformers saved."
            + ("" if format_name == "hf" else " --format hf takes it as it is."),
        )
    return without_files(tokenizer, [FAST])


def _slow_name(tokenizer: Tokenizer) -> str:
    return str(tokenizer.config.get("tokenizer_class")).removesuffix("Fast")


def _with_table_of_extra_tokens(tokenizer: Tokenizer, notes: list[str]) -> Tokenizer:
    extra = tokenizer.config.get("extra_special_tokens")
    if not isinstance(extra, list):
        return tokenizer
    notes.append(
        "The tokenizer's extra_special_tokens are written as additional_special_tokens: before "
        "transformers 5, the former is a table."
    )
    rest = without_keys(tokenizer, ["extra_special_tokens"])
    return with_config(rest, {"additional_special_tokens": extra})


def _with_known_class(tokenizer: Tokenizer, format_name: str, notes: list[str]) -> Tokenizer:
    """`tokenizer` with a class that all versions have, and can make of its files."""
    name = _slow_name(tokenizer)
    if FAST not in tokenizer.files or name in ("None", "PreTrainedTokenizer"):
        return tokenizer
    lacking = [file for file in _FILES.get(name, ()) if file not in tokenizer.files]
    known = name in _FILES or name in _FAST_ONLY
    if not known or (format_name == "llava" and name in _SINCE_4_37):
        oldest = "4.37.2, which LLaVA pins," if format_name == "llava" else "4.45"
        why = f"transformers {oldest} does not have {name}"
    elif lacking:
        why = f"{name} of transformers 4 needs {' and '.join(lacking)}"
    else:
        return _read_as_it_is(tokenizer, notes) if format_name == "hf" else tokenizer
    notes.append(f"tokenizer_class is written as {_FAST_CLASS}: {why}.")
    changes: dict[str, Json] = {"tokenizer_class": _FAST_CLASS}
    if "model_input_names" not in tokenizer.config:
        # Its own default has token_type_ids, which no LLM here takes.
        changes["model_input_names"] = ["input_ids", "attention_mask"]
    return with_config(tokenizer, changes)


def _read_as_it_is(tokenizer: Tokenizer, notes: list[str]) -> Tokenizer:
    """`tokenizer` without the flag for which tokenizer.json would not be read."""
    llama = _slow_name(tokenizer) in ("LlamaTokenizer", "CodeLlamaTokenizer")
    if not llama or tokenizer.config.get(_PREFIX, False) not in (True, None):
        return tokenizer
    if tokenizer.config[_PREFIX] is None:
        # The fast classes of 4.57 save it so, and its slow ones take it for false.
        notes.append(
            f"{CONFIG} is written without {_PREFIX}: null, for which slow and fast differ."
        )
        return without_keys(tokenizer, [_PREFIX])
    notes.append(
        f"{CONFIG} is written without {_PREFIX}: for it, transformers 4.40 to 4.57 leave "
        f"{FAST} aside, and make another from tokenizer.model."
    )
    return without_keys(tokenizer, [_PREFIX])
