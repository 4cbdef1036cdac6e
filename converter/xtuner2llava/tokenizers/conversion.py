"""The tokenizer that a conversion writes: as the family says, and the config of the training."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.storage.json_file import Json
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

# A range of tokens in a name, such as `<|extra_{0..204}|>`.
_RANGE = re.compile(r"(.*)\{(\d{1,6})\.\.(\d{1,6})\}(.*)", re.ASCII | re.DOTALL)
_MAX_SPECIAL_TOKENS = 10_000


@dataclass(frozen=True, slots=True)
class TokenizerRules:
    """What a family says of its tokenizer, from the table `tokenizer` of its file.

    convert          the file that the tokenizer is made from: `qwen.tiktoken` or `tokenizer.model`
    class            the class of transformers that it becomes
    special_tokens   ids by text; `<|extra_{0..204}|>: 151646` numbers 205 tokens from there on
    """

    convert: str | None
    class_name: str | None
    special_tokens: Mapping[str, int]

    @classmethod
    def of(cls, table: Mapping[str, object], where: str) -> TokenizerRules:
        """Raises `MappingError` for what the table cannot say; `where` is its file."""
        convert, class_name = (
            value if isinstance(value := table.get(key), str) else None
            for key in ("convert", "class")
        )
        special = table.get("special_tokens")
        ids: dict[str, int] = {}
        for token, first in special.items() if isinstance(special, Mapping) else ():
            fault = f"`tokenizer.special_tokens`: {token!r}"
            if not isinstance(token, str) or not isinstance(first, int) or first < 0:
                raise MappingError(f"{fault} has no id, but {first!r}", where=where)
            names = [token]
            if found := _RANGE.fullmatch(token):
                before, low, high, after = found.groups()
                numbers = range(int(low), int(high) + 1)
                if len(ids) + len(numbers) > _MAX_SPECIAL_TOKENS:
                    raise MappingError(f"{fault} is too many", where=where)
                names = [f"{before}{number}{after}" for number in numbers]
            ids |= {name: index for index, name in enumerate(names, first)}
        return cls(convert, class_name, ids)


def prepare_tokenizer(
    tokenizer: Tokenizer,
    rules: TokenizerRules,
    *,
    eos: str | None = None,
    pad: str | None = None,
) -> Prepared:
    """`tokenizer` as its family converts it; itself, byte for byte, where nothing need be done.

    `eos` and `pad` are set where a converted tokenizer has none. Raises `UnsupportedError` where
    only code of the model's repository could load it, `CorruptFileError` and `PlanError`.
    """
    folder, source, special = tokenizer.folder, rules.convert, rules.special_tokens
    named = tokenizer.slow_class
    if source is not None and (folder / source).is_file() and named != rules.class_name:
        if source == MODEL:
            made = from_sentencepiece(tokenizer, special)
        elif source.endswith(".tiktoken"):
            made = from_tiktoken(folder / source, tokenizer.config, special, eos=eos, pad=pad)
        else:
            raise MappingError(
                f"`tokenizer.convert` is {source!r}, expected a .tiktoken file or {MODEL}",
                where="the family",
            )
        became = made.config["tokenizer_class"]
        return Prepared(made, (f"{source} was written as the files of a {became}.",))
    remote = tokenizer.config.get("auto_map")
    code = remote.get("AutoTokenizer") if isinstance(remote, dict) else None
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
