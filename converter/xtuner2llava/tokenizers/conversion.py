"""The tokenizer that a conversion writes: as the family says, and the config of the training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.storage.json_file import Json, table
from xtuner2llava.tokenizers.compatibility import KNOWN_CLASSES
from xtuner2llava.tokenizers.llama import from_sentencepiece
from xtuner2llava.tokenizers.qwen import from_tiktoken
from xtuner2llava.tokenizers.tokenizer import (
    ADDITIONAL,
    MODEL,
    NAMED,
    Prepared,
    Tokenizer,
    additional_tokens,
)


def prepare_tokenizer(
    tokenizer: Tokenizer,
    source: str | None = None,
    special_tokens: Mapping[str, int] = MappingProxyType({}),
    *,
    eos: str | None = None,
    pad: str | None = None,
) -> Prepared:
    """`tokenizer` as its family converts it; itself, byte for byte, where nothing need be done.

    `source` is the file that it is converted from, `tokenizer.model` or one of tiktoken, and
    `special_tokens` are ids by text that it does not have. `eos` and `pad` are set where a
    converted tokenizer has none. Raises `UnsupportedError` where only code of the model's
    repository could load it, `CorruptFileError` and `PlanError`.
    """
    folder, named = tokenizer.folder, tokenizer.slow_class
    becomes = "LlamaTokenizer" if source == MODEL else "Qwen2Tokenizer"
    if source is not None and (folder / source).is_file() and named != becomes:
        if source == MODEL:
            made = from_sentencepiece(tokenizer, special_tokens)
        else:
            path = folder / source
            made = from_tiktoken(path, tokenizer.config, special_tokens, eos=eos, pad=pad)
        return Prepared(made, (f"{source} was written as the files of a {becomes}.",))
    code = table(tokenizer.config, "auto_map").get("AutoTokenizer")
    if code is not None and named not in KNOWN_CLASSES:
        raise UnsupportedError(
            f"its tokenizer {named} is code of the model's repository, which LLaVA never runs",
            where=str(folder),
            advice="Give --llm a folder with the tokenizer of a class in transformers, or a family "
            "file with --mapping whose `tokenizer` says what to convert.",
        )
    return Prepared(tokenizer)


def with_arguments(
    tokenizer: Tokenizer, arguments: Mapping[str, Json], *, kept: Collection[str] = ()
) -> Prepared:
    """`tokenizer` with `arguments` in place of its config's values.

    transformers lets the arguments override tokenizer_config.json, then adds those special tokens
    that are not in the vocabulary: the named ones in a fixed order, then the additional ones
    (`tokenization_utils_base.py`, `_from_pretrained` and `all_special_tokens_extended`). Those of
    `kept` give their token an id and are not set. Raises `CorruptFileError` where the id of a
    new token is not certain.
    """
    named = {k: v for k in NAMED if isinstance(v := arguments.get(k), str)}
    listed = arguments.get(ADDITIONAL)
    present = additional_tokens(tokenizer.config, tokenizer.special_map)
    additional = [t for t in listed if isinstance(t, str)] if isinstance(listed, list) else present
    result, notes = tokenizer, list[str]()
    if named or isinstance(listed, list):
        effective = [named.get(key) or tokenizer.special(key) for key in NAMED]
        texts = dict.fromkeys(text for text in [*effective, *additional] if text is not None)
        new = [text for text in texts if text not in tokenizer.ids]
        result = tokenizer.with_tokens(t for t in texts if t in new or t in additional)
        if new:
            ids = ", ".join(f"'{text}' {result.ids[text]}" for text in new[:8])
            more = f" and {len(new) - 8} more" if len(new) > 8 else ""
            count = f"{len(new)} token{'s' if len(new) > 1 else ''}"
            notes.append(f"Arguments of the XTuner config add {count}: {ids}{more}.")
    for key, text in named.items():
        if key not in kept and result.special(key) != text:
            result = result.with_special_token(key, text)
    others = {
        key: value
        for key, value in arguments.items()
        if key not in (*NAMED, ADDITIONAL) and result.config.get(key) != value
    }
    if additional != present:
        result = result.with_special_token(ADDITIONAL, [*additional])
    return Prepared(result.with_config(others) if others else result, tuple(notes))
