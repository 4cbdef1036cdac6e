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
from xtuner2llava.tokenizers.byte_pairs import unreachable
from xtuner2llava.tokenizers.llama import with_fast_file
from xtuner2llava.tokenizers.prefix import (
    LIKE_LLAMA,
    PrefixSpace,
    adds_bos,
    keeps_spaces,
    prefix_space,
    with_bos_added,
)
from xtuner2llava.tokenizers.qwen import with_fast_file_of_merges
from xtuner2llava.tokenizers.sentencepiece import SPACE, read_sentencepiece
from xtuner2llava.tokenizers.tokenizer import (
    ADDED,
    CONFIG,
    FAST,
    MERGES,
    MODEL,
    VOCAB,
    AddedToken,
    Prepared,
    Tokenizer,
    decoder_tokens,
    fast_tokens,
    integers,
    json_file,
    slow_ids,
    steps,
)

_FAST_CLASS = "PreTrainedTokenizerFast"
_PREFIX = "add_prefix_space"
_CLEAN_UP = "clean_up_tokenization_spaces"
# What each class of transformers 4 reads when it is the slow one.
_FILES = {
    "LlamaTokenizer": (MODEL,),
    "CodeLlamaTokenizer": (MODEL,),
    "T5Tokenizer": ("spiece.model",),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model",),
    "Qwen2Tokenizer": (VOCAB, MERGES),
    "GPT2Tokenizer": (VOCAB, MERGES),
    "CodeGenTokenizer": (VOCAB, MERGES),
    "BertTokenizer": ("vocab.txt",),
    "GemmaTokenizer": (MODEL,),
    # These have a fast class only.
    "PreTrainedTokenizer": (),
    "BloomTokenizer": (),
    "CohereTokenizer": (),
    "GPTNeoXTokenizer": (),
}
_SINCE_4_37 = ("CohereTokenizer", "GemmaTokenizer")
# Classes of transformers whose folders may carry an `auto_map` all the same: it is ignored.
KNOWN_CLASSES = frozenset(_FILES)
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
_READERS = {
    "llava": "tokenizers 0.15 of transformers 4.37.2",
    "hf": "tokenizers 0.20 of transformers 4.45",
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
    if FAST in tokenizer.copied:
        tokenizer = _without_other_slow(tokenizer, notes)
    if FAST in tokenizer.files:
        result = _with_readable_fast(tokenizer, format_name, notes)
    elif format_name == "hf":
        result = _with_fast_of_slow(tokenizer, notes)
    extra = result.config.get("extra_special_tokens")
    if isinstance(extra, list):
        notes.append(
            "The tokenizer's extra_special_tokens are written as additional_special_tokens: before "
            "transformers 5, the former is a table."
        )
        changes: dict[str, Json] = {"additional_special_tokens": extra}
        result = result.with_config(changes, without=["extra_special_tokens"])
    if FAST in result.files:
        result = _with_known_class(result, format_name, notes)
    return Prepared(result, tuple(notes))


def tokenizer_faults(tokenizer: Tokenizer, format_name: str) -> tuple[str, ...]:
    """What `readable_tokenizer` would still change; nothing where all versions load the files."""
    try:
        prepared = readable_tokenizer(tokenizer, format_name)
        return prepared.notes if prepared.tokenizer is not tokenizer else ()
    except UnsupportedError as error:
        return tuple(fault.what for fault in error.faults)


def _with_readable_fast(tokenizer: Tokenizer, format_name: str, notes: list[str]) -> Tokenizer:
    """`tokenizer` with the tokenizer.json that can be read, or without one."""
    content, reader = tokenizer.read(FAST), _READERS[format_name]
    added = fast_tokens(content)
    try:
        changes = [*_rewrite(content, format_name)]
    except _UnreadableError as error:
        result = _without_fast(tokenizer, f"{reader} {error}", format_name)
        notes.append(
            f"{FAST} is left out: {reader} {error}. transformers makes the fast tokenizer from "
            f"{_FILES[tokenizer.slow_class][0]}."
        )
        if format_name == "llava" and (difference := _slow_difference(tokenizer)):
            notes.append(
                f"Official LLaVA tokenizes with {MODEL}, which {difference}: prompts have other "
                "ids there than in training. The format hf keeps them."
            )
        return result
    result = tokenizer
    if changes:
        changed = fast_tokens(content)
        result = _with_fast(tokenizer, changed if changed != added else (), format_name)
        notes.append(f"{FAST} is rewritten for {reader}, with the same ids: {'; '.join(changes)}.")
    if format_name == "llava":
        notes += _ignored_merges(content)
    return result


def _rewrite(content: dict[str, Json], format_name: str) -> Iterator[str]:
    """Rewrites a tokenizer.json in place; says what it changed. Raises `_UnreadableError`."""
    old = format_name == "llava"
    for part, known in _TYPES.items():
        names = [*known.split(), *(() if old or part != "normalizer" else ("ByteLevel",))]
        for inner in steps(content.get(part)):
            kind = inner.get("type")
            # Before 0.8, a model did not say its type.
            if kind not in names and not (part == "model" and kind is None):
                raise _UnreadableError(f"does not have its {part} of type {kind}")
    if old:
        yield from _text_merges(content)
        yield from _metaspace_without_split(content)
    # 0.15 wants `add_prefix_space`; 0.20 refuses one that `prepend_scheme` contradicts.
    changed = False
    for inner in [*steps(content.get("pre_tokenizer")), *steps(content.get("decoder"))]:
        if inner.get("type") != "Metaspace":
            continue
        scheme, said = inner.get("prepend_scheme"), inner.get(_PREFIX)
        if (said is None) if old else (said is False and scheme != "never"):
            scheme = "never" if said is False else scheme or "always"
            inner |= {"prepend_scheme": scheme, _PREFIX: scheme != "never"}
            changed = True
    if changed:
        yield "Metaspace says add_prefix_space and prepend_scheme alike"


def _text_merges(content: dict[str, Json]) -> Iterator[str]:
    match content.get("model"):
        case {"merges": list(merges)} if any(isinstance(pair, list) for pair in merges):
            pairs = [[*map(str, pair)] for pair in merges if isinstance(pair, list)]
            if any(" " in part for pair in pairs for part in pair):
                raise _UnreadableError("does not read merges of parts with spaces")
            merges[:] = [" ".join(map(str, p)) if isinstance(p, list) else p for p in merges]
            yield "each merge is one text"


def _metaspace_without_split(content: dict[str, Json]) -> Iterator[str]:
    """Metaspace that only writes spaces as `▁`, which 0.15 cannot, as a normalizer that does.

    There, Metaspace always splits at spaces too, and then no token with a space inside is found. A
    normalizer is given each text between added tokens, and does not know which is the `first`; but
    it is given the whole where added tokens are looked for in what it made of it (`normalized`).
    """
    part, before = content.get("pre_tokenizer"), content.get("normalizer")
    inner = next((one for one in steps(part) if one.get("split") is False), None)
    if inner is None:
        return
    added, scheme = fast_tokens(content), inner.get("prepend_scheme", "always")
    first = scheme == "first"
    if (
        inner is not part
        or (before is not None and (first or any(token.normalized for token in added)))
        or (first and any(token.single_word for token in added))
    ):
        raise _UnreadableError("has no Metaspace without split")
    replacement = str(inner.get("replacement", SPACE))

    def replaces(kind: str, pattern: str, by: str) -> Json:
        return {"type": "Replace", "pattern": {kind: pattern}, "content": by}

    normalizers: list[Json] = [before] if before is not None else []
    # Spaces around the tokens that take them go before these become `▁`.
    for flag, pattern in (("rstrip", r"(?<={})\s+"), ("lstrip", r"\s+(?={})")) if first else ():
        texts = "|".join(re.escape(token.text) for token in added if getattr(token, flag))
        if texts:
            normalizers.append(replaces("Regex", pattern.format(texts), ""))
    normalizers.append(replaces("String", " ", replacement))
    if scheme != "never":
        # Not in front of one that is there, nor of a token that is found whole.
        ahead = [replacement, *(token.text for token in added if first)]
        pattern = rf"\A(?!{'|'.join(map(re.escape, ahead))})"
        normalizers.append(replaces("Regex", pattern, replacement))
    content |= {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
    }
    tokens = content.get("added_tokens")
    for values in tokens if isinstance(tokens, list) and before is None else ():
        if isinstance(values, dict):
            values["normalized"] = first
    yield "spaces are written as ▁ by the normalizer, as Metaspace did without split"


def _ignored_merges(content: Mapping[str, Json]) -> Iterator[str]:
    """`ignore_merges` makes a word that is a token that token; 0.15 does not know it."""
    match content.get("model"):
        case {"ignore_merges": ignored, "vocab": dict(vocab), "merges": list(merges)} if ignored:
            special = {token.text for token in fast_tokens(content)}
            words = [text for text in vocab if text not in special]
            if found := unreachable(words, [*map(str, merges)]):
                yield (
                    f"{len(found):,} of the {len(vocab):,} tokens, such as {found[0]!r}, are not "
                    f"made by merges; {_READERS['llava']} ignores ignore_merges and writes such "
                    "words in parts."
                )


def _with_fast(tokenizer: Tokenizer, changed: Sequence[AddedToken], format_name: str) -> Tokenizer:
    """`tokenizer` with the rewritten tokenizer.json, and `changed` flags of tokens in all files."""

    def make() -> bytes:
        # Made anew, since a vocabulary takes much more memory as a table than as a file.
        content = tokenizer.read(FAST)
        for _ in _rewrite(content, format_name):
            pass
        return json_file(content)

    result = tokenizer.with_made({FAST: make})
    if not changed:
        return result
    added = {token.text: token for token in changed}
    listed: Json = {str(token.id): token.in_config for token in changed}
    config = _with_flags({"added_tokens_decoder": listed, **tokenizer.config}, added)
    result = replace(result, config=config).with_config({})
    return result.with_special_map(_with_flags(tokenizer.special_map, added))


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
    name, made = tokenizer.slow_class, f"{FAST} is made from"
    if name == "Qwen2Tokenizer" and {VOCAB, MERGES} <= {*tokenizer.copied}:
        notes.append(
            f"{made} {VOCAB} and {MERGES}, as transformers 4.38 to 4.57 make it for a base "
            "without; 5 makes none."
        )
        return with_fast_file_of_merges(tokenizer)
    if name != "LlamaTokenizer" or MODEL not in tokenizer.files:
        return tokenizer
    result = with_fast_file(tokenizer)
    if result is None:
        notes.append(
            f"No {FAST} is written, because {MODEL} is not a byte-pair encoding: transformers 5, "
            "which has no slow LlamaTokenizer, may split texts differently."
        )
        return tokenizer
    note = (
        f"{made} {MODEL}, as transformers 4.41 to 4.57 make it for a base without; 5 would make "
        "one with other ids."
    )
    if tokenizer.config.get("legacy") is False:
        note += (
            " A training with an earlier transformers kept a space at the start of a text, which "
            "legacy false now drops: do not begin a prompt with one."
        )
    notes.append(note)
    return result


def _slow_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the slow tokenizer that the files make; empty where they make none."""
    needed = _FILES.get(tokenizer.slow_class)
    if not needed or not {*needed} <= {*tokenizer.copied}:
        return {}
    found = slow_ids(tokenizer.folder, needed)
    if found:
        found |= integers(tokenizer.read(ADDED))
        found |= {token.text: token.id for token in decoder_tokens(tokenizer.config)}
    return found


def _without_other_slow(tokenizer: Tokenizer, notes: list[str]) -> Tokenizer:
    """`tokenizer` without a tokenizer.model of other ids, which official LLaVA would take.

    XTuner trains with the fast one that AutoTokenizer loads. Raises `UnsupportedError` where a
    Llama's config says add_prefix_space: then some versions make that from the slow one
    (`models/llama/tokenization_llama_fast.py`).
    """
    if _FILES.get(tokenizer.slow_class) != (MODEL,):
        return tokenizer
    slow = _slow_ids(tokenizer)
    other = [text for text, index in tokenizer.ids.items() if slow and slow.get(text) != index]
    if not other:
        return tokenizer
    differ = f"{other[0]!r} ({len(other):,} in all) has another id"
    if tokenizer.config.get(_PREFIX) is not None:
        raise UnsupportedError(
            f"{FAST} and {MODEL} are of different tokenizers: {differ}",
            where=str(tokenizer.folder),
            advice="Give --tokenizer a folder with that file alone which training read.",
        )
    notes.append(
        f"The tokenizer is written without {MODEL}: XTuner trains with {FAST}, where {differ}."
    )
    return tokenizer.without_files(MODEL)


def _without_fast(tokenizer: Tokenizer, why: str, format_name: str) -> Tokenizer:
    """`tokenizer` without tokenizer.json, where its other files have the same ids."""
    own = _slow_ids(tokenizer)
    if own and tokenizer.ids.items() <= own.items():
        return tokenizer.without_files(FAST)
    raise UnsupportedError(
        why,
        where=str(tokenizer.folder / FAST),
        advice="Give --llm a folder that also has tokenizer.model, or vocab.json and merges.txt, "
        "or one that an earlier transformers saved."
        + ("" if format_name == "hf" else " --format hf takes it as it is."),
    )


def _with_known_class(tokenizer: Tokenizer, format_name: str, notes: list[str]) -> Tokenizer:
    """`tokenizer` with a class that all versions have, can make of its files, and read it with."""
    name, needed = tokenizer.slow_class, _FILES.get(tokenizer.slow_class)
    lacking = [file for file in needed or () if file not in tokenizer.files]
    if name in ("None", "PreTrainedTokenizer"):
        return tokenizer
    if needed is None or (format_name == "llava" and name in _SINCE_4_37):
        oldest = "4.37.2, which LLaVA pins," if format_name == "llava" else "4.45"
        why = f"transformers {oldest} does not have {name}"
    elif lacking:
        why = f"{name} of transformers 4 needs {' and '.join(lacking)}"
    elif format_name == "llava" and (difference := _slow_difference(tokenizer)):
        why = f"official LLaVA would read {MODEL}, which {difference}; training read {FAST}"
    elif (
        format_name == "hf"
        and name in ("LlamaTokenizer", "CodeLlamaTokenizer")
        and tokenizer.config.get(_PREFIX, False) in (True, None)
    ):
        # The fast classes of 4.57 save null, and its slow ones take it for false.
        null = tokenizer.config[_PREFIX] is None
        notes.append(
            f"{CONFIG} is written without {_PREFIX}: null, for which slow and fast differ."
            if null
            else f"{CONFIG} is written without {_PREFIX}: for it, transformers 4.40 to 4.57 leave "
            f"{FAST} aside, and make another from tokenizer.model."
        )
        return tokenizer.with_config({}, without=[_PREFIX])
    else:
        return tokenizer
    notes.append(f"tokenizer_class is written as {_FAST_CLASS}: {why}.")
    changes: dict[str, Json] = {"tokenizer_class": _FAST_CLASS}
    if "model_input_names" not in tokenizer.config:
        # Its own default has token_type_ids, which no LLM here takes.
        changes["model_input_names"] = ["input_ids", "attention_mask"]
    if name in LIKE_LLAMA:
        changes[_CLEAN_UP] = tokenizer.config.get(_CLEAN_UP, False)
    return with_bos_added(tokenizer.with_config(changes), adds_bos(tokenizer))


def _slow_difference(tokenizer: Tokenizer) -> str | None:
    """How tokenizer.model makes other ids than tokenizer.json; None where both make the same.

    The slow LlamaTokenizer reads the former. Without `legacy`, which Code Llama's does not have, it
    has a rule of its own for spaces at the start and beside special tokens (transformers 4.37.2
    `models/llama/tokenization_llama.py`).
    """
    name = tokenizer.slow_class
    if _FILES.get(name) != (MODEL,) or MODEL not in tokenizer.copied:
        return None
    model = read_sentencepiece(tokenizer.folder / MODEL)
    if (model.removes_extra_spaces or model.charsmap) and keeps_spaces(tokenizer):
        return "drops repeated spaces, line feeds, and white space at either end of a text"
    legacy = name == "LlamaTokenizer" and tokenizer.config.get("legacy") is not False
    slow = PrefixSpace(everywhere=True, doubled=True) if model.adds_dummy_prefix else None
    same = legacy and prefix_space(tokenizer) == slow
    return None if same else "puts a space at other places of a text"
