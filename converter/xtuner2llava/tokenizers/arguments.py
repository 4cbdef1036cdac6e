"""A tokenizer as `from_pretrained` makes it with further arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.editing import NAMED, with_config, with_special_token, with_tokens
from xtuner2llava.tokenizers.tokenizer import Tokenizer

ADDITIONAL = "additional_special_tokens"


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
    listed = arguments.get(ADDITIONAL)
    additional = None if not isinstance(listed, list) else [t for t in listed if isinstance(t, str)]
    result, notes = tokenizer, list[str]()
    if named or additional is not None:
        effective = [named.get(key) or tokenizer.special(key) for key in NAMED]
        following = additional if additional is not None else _additional(tokenizer)
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
        if key not in NAMED and key != ADDITIONAL and result.config.get(key) != value
    }
    if additional is not None and additional != _additional(tokenizer):
        result = with_special_token(result, ADDITIONAL, [*additional])
    return (with_config(result, others) if others else result), tuple(notes)


def _additional(tokenizer: Tokenizer) -> list[str]:
    """The texts of the additional special tokens that the tokenizer has."""
    values = tokenizer.config.get(ADDITIONAL, tokenizer.special_map.get(ADDITIONAL))
    entries = values if isinstance(values, list) else []
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return [text for text in texts if isinstance(text, str)]
