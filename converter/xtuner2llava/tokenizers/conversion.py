"""The tokenizer that a conversion writes, from the base LLM's and what its family says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.errors import MappingError, UnsupportedError
from xtuner2llava.sources.json_file import Json, text
from xtuner2llava.tokenizers.editing import with_config, without_keys
from xtuner2llava.tokenizers.llama import MODEL, from_sentencepiece
from xtuner2llava.tokenizers.qwen2 import from_tiktoken
from xtuner2llava.tokenizers.tokenizer import FAST, Tokenizer

# A range of tokens in a name, such as `<|extra_{0..204}|>`.
_RANGE = re.compile(r"\{(\d{1,6})\.\.(\d{1,6})\}", re.ASCII)
_MAX_SPECIAL_TOKENS = 10_000
_FAST_CLASS = "PreTrainedTokenizerFast"
# Classes of transformers 4.37 whose folders may carry an `auto_map` all the same: it is ignored.
_LOCAL = frozenset(
    name + suffix
    for name in (
        "BertTokenizer BloomTokenizer CodeGenTokenizer CodeLlamaTokenizer CohereTokenizer "
        "GPT2Tokenizer GPTNeoXTokenizer GemmaTokenizer LlamaTokenizer PreTrainedTokenizer "
        "Qwen2Tokenizer T5Tokenizer XLMRobertaTokenizer"
    ).split()
    for suffix in ("", "Fast")
)


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


@dataclass(frozen=True, slots=True)
class Prepared:
    """A tokenizer that transformers loads by itself, and what was done for that."""

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()


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
            made, notes = from_sentencepiece(tokenizer, rules.special_tokens)
        elif source.endswith(".tiktoken"):
            made = from_tiktoken(
                folder / source, tokenizer.config, rules.special_tokens, eos=eos, pad=pad
            )
            notes = ()
        else:
            raise MappingError(
                f"`tokenizer.convert` is {source!r}, expected a .tiktoken file or {MODEL}",
                where="the family",
            )
        became = made.config["tokenizer_class"]
        return Prepared(made, (f"{source} was written as the files of a {became}.", *notes))
    remote = tokenizer.config.get("auto_map")
    code = remote.get("AutoTokenizer") if isinstance(remote, dict) else None
    if code is not None and named not in _LOCAL:
        raise UnsupportedError(
            f"its tokenizer {named} is code of the model's repository, which LLaVA never runs",
            where=str(folder),
            advice="Give --llm a folder with the tokenizer of a class in transformers, or a family "
            "file with --mapping whose `tokenizer` says what to convert.",
        )
    return _readable(tokenizer)


def _readable(tokenizer: Tokenizer) -> Prepared:
    """`tokenizer` with a class that transformers 4.37 and 5 both have and both can make here."""
    named = tokenizer.config.get("tokenizer_class")
    if FAST not in tokenizer.files:
        return Prepared(tokenizer)
    if named == "TokenizersBackend":
        why = "only transformers 5 knows TokenizersBackend"
    elif named == "LlamaTokenizer" and MODEL not in tokenizer.files:
        why = "LlamaTokenizer of transformers 4 needs a tokenizer.model"
    else:
        return Prepared(tokenizer)
    changes: dict[str, Json] = {"tokenizer_class": _FAST_CLASS}
    extra = tokenizer.config.get("extra_special_tokens")
    if isinstance(extra, list):
        # The name before transformers 5, where the other one held a table.
        tokenizer = without_keys(tokenizer, ["extra_special_tokens"])
        changes["additional_special_tokens"] = extra
    note = f"tokenizer_class is written as {_FAST_CLASS}, because {why}."
    return Prepared(with_config(tokenizer, changes), (note,))
