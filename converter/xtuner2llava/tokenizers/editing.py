"""Changes to a tokenizer, made in all of its files alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.added_token import AddedToken, decoder_tokens, fast_tokens
from xtuner2llava.tokenizers.tokenizer import (
    ADDED,
    CONFIG,
    FAST,
    SPECIAL_MAP,
    MadeFile,
    Tokenizer,
    integers,
    json_file,
)

# Named special tokens (transformers `tokenization_utils_base.py`, SPECIAL_TOKENS_ATTRIBUTES).
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_ADDITIONAL = "additional_special_tokens"


def with_config(tokenizer: Tokenizer, changes: Mapping[str, Json]) -> Tokenizer:
    """The same tokenizer with other values in tokenizer_config.json."""
    config = {**tokenizer.config, **changes}
    return with_made(
        replace(tokenizer, config=config), {CONFIG: lambda: json_file(config, indent=2)}
    )


def without_keys(tokenizer: Tokenizer, keys: Sequence[str]) -> Tokenizer:
    """The same tokenizer without some keys of tokenizer_config.json."""
    config = {key: value for key, value in tokenizer.config.items() if key not in keys}
    return with_config(replace(tokenizer, config=config), {})


def with_special_token(tokenizer: Tokenizer, key: str, text: str | list[Json] | None) -> Tokenizer:
    """The same tokenizer with the token `text` as `key`, such as `bos_token`; None takes it off.

    The token must be one of the tokenizer's; a list of them is for `additional_special_tokens`.
    """
    changed = with_config(tokenizer, {key: text})
    if SPECIAL_MAP not in tokenizer.files:
        return changed
    special = {name: value for name, value in tokenizer.special_map.items() if name != key}
    if text is not None:
        special[key] = text
    return with_special_map(changed, special)


def with_special_map(tokenizer: Tokenizer, values: Mapping[str, Json]) -> Tokenizer:
    """The same tokenizer with `values` as its special_tokens_map.json."""
    return with_made(
        replace(tokenizer, special_map=values), {SPECIAL_MAP: lambda: json_file(values, indent=2)}
    )


def with_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The same tokenizer with `texts` as special tokens, each found whole in any text.

    A text that is a token already keeps its id; others get the ids that follow the highest one,
    which is how huggingface/tokenizers numbers them if there are no gaps (`added_vocabulary.rs`).
    Raises `CorruptFileError` where there are some.
    """
    known = added_tokens(tokenizer)
    new: list[AddedToken] = []
    following = tokenizer.highest_id + 1
    for text in texts:
        if any(token.text == text for token in known):
            continue
        index = tokenizer.ids.get(text)
        if index is None:
            index, following = following, following + 1
        new.append(AddedToken(text, index))
    if following != tokenizer.length + sum(token.text not in tokenizer.ids for token in new):
        raise CorruptFileError(
            f"has {tokenizer.length:,} tokens with ids up to {tokenizer.highest_id:,}: with such "
            "gaps no token can be added, whose id would depend on the library",
            where=str(tokenizer.folder),
        )
    if not new:
        return tokenizer
    # Where tokenizer_config.json lists added tokens, transformers reads no other file for them:
    # so all of them are listed, and the named ones are said there too.
    everything = sorted([*known, *new], key=lambda token: token.id)
    decoder: dict[str, Json] = {str(token.id): token.in_config for token in everything}
    named = {key: tokenizer.special(key) for key in NAMED if key not in tokenizer.config}
    changed = with_config(
        replace(tokenizer, ids={**tokenizer.ids, **{t.text: t.id for t in new}}),
        {**{k: v for k, v in named.items() if v is not None}, "added_tokens_decoder": decoder},
    )
    files: dict[str, MadeFile] = {}
    if ADDED in tokenizer.files:
        before = tokenizer.read(ADDED) or {}
        files[ADDED] = lambda: json_file({**before, **{t.text: t.id for t in new}}, indent=2)
    if FAST in tokenizer.files:
        files[FAST] = lambda: _fast_file(tokenizer, new)
    return with_made(changed, files)


def with_arguments(
    tokenizer: Tokenizer, arguments: Mapping[str, Json], *, kept: Collection[str] = ()
) -> tuple[Tokenizer, tuple[str, ...]]:
    """`tokenizer` with `arguments` in place of its config's values, and what to tell the user.

    transformers lets the arguments override tokenizer_config.json, then adds those special tokens
    that are not in the vocabulary: the named ones in a fixed order, then the additional ones
    (`tokenization_utils_base.py`, `_from_pretrained` and `all_special_tokens_extended`). Those of
    `kept` give their token an id and are not set. Raises `CorruptFileError` where the id of a
    new token is not certain.
    """
    named = {k: v for k in NAMED if isinstance(v := arguments.get(k), str)}
    listed = arguments.get(_ADDITIONAL)
    additional = None if not isinstance(listed, list) else [t for t in listed if isinstance(t, str)]
    result, notes = tokenizer, list[str]()
    if named or additional is not None:
        effective = [named.get(key) or tokenizer.special(key) for key in NAMED]
        following = (
            additional
            if additional is not None
            else _additional(tokenizer.config, tokenizer.special_map)
        )
        texts = dict.fromkeys(text for text in [*effective, *following] if text is not None)
        new = [text for text in texts if text not in tokenizer.ids]
        wanted = [text for text in texts if text in new or text in following]
        result = with_tokens(tokenizer, wanted)
        if new:
            ids = ", ".join(f"'{text}' {result.ids[text]}" for text in new[:8])
            more = f" and {len(new) - 8} more" if len(new) > 8 else ""
            count = f"{len(new)} token{'s' if len(new) > 1 else ''}"
            notes.append(f"Arguments of the XTuner config add {count}: {ids}{more}.")
    for key, text in named.items():
        if key not in kept and result.special(key) != text:
            result = with_special_token(result, key, text)
    others = {
        key: value
        for key, value in arguments.items()
        if key not in NAMED and key != _ADDITIONAL and result.config.get(key) != value
    }
    if additional is not None and additional != _additional(
        tokenizer.config, tokenizer.special_map
    ):
        result = with_special_token(result, _ADDITIONAL, [*additional])
    return (with_config(result, others) if others else result), tuple(notes)


def with_made(tokenizer: Tokenizer, made: Mapping[str, MadeFile]) -> Tokenizer:
    """The same tokenizer, of which some files are made, in place of those of the same names."""
    copied = tuple(name for name in tokenizer.copied if name not in made)
    return replace(tokenizer, copied=copied, made={**tokenizer.made, **made})


def without_files(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The same tokenizer without some of its files."""
    copied = tuple(name for name in tokenizer.copied if name not in names)
    made = {name: make for name, make in tokenizer.made.items() if name not in names}
    return replace(tokenizer, copied=copied, made=made)


def _fast_file(tokenizer: Tokenizer, new: Sequence[AddedToken]) -> bytes:
    content = tokenizer.read(FAST) or {}
    added = content.get("added_tokens")
    before = added if isinstance(added, list) else []
    return json_file({**content, "added_tokens": [*before, *(t.in_tokenizer_json for t in new)]})


def added_tokens(tokenizer: Tokenizer) -> list[AddedToken]:
    """The tokens that are already found whole, from whichever file says so."""
    found = {token.id: token for token in decoder_tokens(tokenizer.config)}
    if not found and FAST in tokenizer.files:
        for token in fast_tokens(tokenizer.read(FAST) or {}):
            found.setdefault(token.id, token)
    special = [text for key in NAMED if (text := tokenizer.special(key)) is not None]
    special += [*_additional(tokenizer.config), *_additional(tokenizer.special_map)]
    if ADDED in tokenizer.files:
        for name, index in integers(tokenizer.read(ADDED) or {}).items():
            found.setdefault(index, AddedToken(name, index, special=name in special))
    for name in special:
        if name in tokenizer.ids:
            found.setdefault(tokenizer.ids[name], AddedToken(name, tokenizer.ids[name]))
    return list(found.values())


def _additional(*places: Mapping[str, Json]) -> list[str]:
    """The texts of the additional special tokens, from the first of `places` that has the key."""
    listed = next((values[_ADDITIONAL] for values in places if _ADDITIONAL in values), None)
    found = (AddedToken.of(0, entry) for entry in (listed if isinstance(listed, list) else ()))
    return [token.text for token in found if token is not None]
