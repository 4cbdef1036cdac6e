"""The tokenizer that a conversion writes, from the base LLM's and what its family says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.storage.json_file import text
from xtuner2llava.tokenizers.compatibility import KNOWN_CLASSES
from xtuner2llava.tokenizers.llama import MODEL, from_sentencepiece
from xtuner2llava.tokenizers.qwen2 import from_tiktoken
from xtuner2llava.tokenizers.tokenizer import Prepared, Tokenizer

# A range of tokens in a name, such as `<|extra_{0..204}|>`.
_RANGE = re.compile(r"\{(\d{1,6})\.\.(\d{1,6})\}", re.ASCII)
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
        convert, class_name = table.get("convert"), table.get("class")
        special = table.get("special_tokens")
        ids: dict[str, int] = {}
        for token, first in special.items() if isinstance(special, Mapping) else ():
            if not isinstance(token, str) or not isinstance(first, int) or first < 0:
                raise MappingError(
                    f"`tokenizer.special_tokens`: {token!r} has no id, but {first!r}", where=where
                )
            match = _RANGE.search(token)
            low, high = (int(match[1]), int(match[2])) if match else (0, 0)
            if len(ids) + high - low > _MAX_SPECIAL_TOKENS:
                raise MappingError(
                    f"`tokenizer.special_tokens`: {token!r} is too many", where=where
                )
            for number in range(low, high + 1):
                name = f"{token[: match.start()]}{number}{token[match.end() :]}" if match else token
                ids[name] = first + number - low
        return cls(
            convert if isinstance(convert, str) else None,
            class_name if isinstance(class_name, str) else None,
            ids,
        )


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
    folder = tokenizer.folder
    named = text(tokenizer.config, "tokenizer_class")
    source = rules.convert
    wanted = {rules.class_name, f"{rules.class_name}Fast"}
    if source is not None and (folder / source).is_file() and named not in wanted:
        if source == MODEL:
            made = from_sentencepiece(tokenizer, rules.special_tokens)
        elif source.endswith(".tiktoken"):
            made = from_tiktoken(
                folder / source, tokenizer.config, rules.special_tokens, eos=eos, pad=pad
            )
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
