"""The tokenizer of a plan, the ids to generate with, and the prompt template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from xtuner2llava.errors import Fault, UsageError
from xtuner2llava.mapping import Catalogue, Family, PromptTemplate
from xtuner2llava.planning.findings import Findings
from xtuner2llava.planning.generation import TokenIds, TokenTexts, token_ids
from xtuner2llava.planning.plan import Chat
from xtuner2llava.planning.training_tokenizer import plain_arguments
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers import (
    Tokenizer,
    TokenizerRules,
    prepare_tokenizer,
    with_arguments,
    with_special_token,
    with_tokens,
)
from xtuner2llava.training_config import Table, TrainingConfig

_DROPS = (
    "LLaVA drops the first token of each text after an image where a prompt begins with the bos "
    "token (`mm_utils.py`, tokenizer_image_token), and this model's prompts do"
)


def tokenizer_to_write(
    tokenizer: Tokenizer,
    family: Family,
    training_config: TrainingConfig | None,
    given_bos: str | None,
    findings: Findings,
) -> Tokenizer:
    """The base's tokenizer, converted where its family says so, with the right bos token.

    `given_bos` is the user's. Without it, a bos token that is not the family's is taken off:
    XTuner's advice for Qwen (issue 292 there) puts `<|im_start|>` on the tokenizer, so that
    `generate` finds a bos id; the configs have that id here, and the token makes LLaVA drop others.
    Raises `ConversionError` for a tokenizer that cannot be used.
    """
    generation = family.generation
    prepared = prepare_tokenizer(
        tokenizer,
        TokenizerRules.of(family.tokenizer, family.file.name),
        eos=next(iter(generation.eos), None),
        pad=generation.pad,
    )
    findings.note(*prepared.notes)
    result = prepared.tokenizer
    if training_config is not None:
        arguments = plain_arguments(training_config)
        # Where the family has a bos token, it is not for the tokenizer: see below.
        kept = ("bos_token",) if generation.bos is not None else ()
        result, notes = with_arguments(result, arguments, kept=kept)
        findings.note(*notes)
    present = result.special("bos_token") or tokenizer.special("bos_token")
    if given_bos is not None:
        if given_bos not in result.ids:
            raise UsageError(
                f"'{given_bos}' is not a token of the tokenizer in {tokenizer.folder}",
                where="--bos-token",
            )
        if generation.bos not in (None, given_bos):
            findings.note(f"The tokenizer's bos token is '{given_bos}', as asked. {_DROPS}.")
        return with_special_token(result, "bos_token", given_bos)
    asked = training_config.data.bos_token if training_config is not None else None
    own = generation.bos if generation.bos in result.ids else None
    if own is not None and present not in (None, own):
        findings.note(
            f"The tokenizer had the bos token '{present}', which is XTuner's advice for Qwen, and "
            f"is written without it: {_DROPS}. bos_token_id {result.ids[own]} in config.json and "
            "generation_config.json does what the advice was for. --bos-token keeps it."
        )
        return with_special_token(result, "bos_token", None)
    if own is not None and present is None and asked is not None:
        why = "LLaVA needs none there" if asked == own else _DROPS
        findings.note(
            f"The XTuner config gives the tokenizer the bos token '{asked}'; it is written without "
            f"one: {why}. bos_token_id {result.ids[own]} in config.json and "
            "generation_config.json does what that was for. --bos-token puts it there."
        )
    return result


def generation_tokens(
    catalogue: Catalogue,
    family: Family,
    tokenizer: Tokenizer,
    training_config: TrainingConfig | None,
    given_bos: str | None,
    base_generation: Mapping[str, Json],
    base_config: Mapping[str, Json],
    findings: Findings,
) -> tuple[TokenIds, Chat]:
    """Where to begin, stop and pad, and the prompt template with its stop words."""
    prompt = prompt_template(catalogue, family, training_config, findings)
    trained = training_config is not None and training_config.data.prompt_template is not None
    stop_words = list(prompt.stop_words) if prompt is not None and trained else []
    if training_config is not None:
        asked = [
            *training_config.data.stop_words,
            *([training_config.data.eos_token] if training_config.data.eos_token else []),
        ]
        stop_words += [word for word in asked if word not in stop_words]
    generation = family.generation
    named = TokenTexts(generation.bos, generation.eos, generation.pad)
    ids = token_ids(tokenizer, named, stop_words, base_generation, base_config)
    if given_bos is not None:
        ids = replace(ids, bos=tokenizer.ids[given_bos])
    unknown = [word for word in stop_words if word not in tokenizer.ids]
    if unknown:
        findings.note(
            f"Stop words that are not a single token here: {', '.join(unknown)}. Stop at them by "
            "text when you generate."
        )
    return ids, Chat(prompt, tuple(stop_words) or tuple(family.chat.stop_words))


def with_format_tokens(
    tokenizer: Tokenizer, tokens: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, int]]:
    """`tokenizer` with the tokens that a format needs, and the id of each by what it is for.

    For `pad`, a pad token that the tokenizer has already is as good. Raises `CorruptFileError`
    where none can be added.
    """
    present = tokenizer.special("pad_token")
    own_pad = present if present in tokenizer.ids else None
    texts = {use: own_pad if use == "pad" and own_pad else text for use, text in tokens.items()}
    result = with_tokens(tokenizer, list(texts.values()))
    if "pad" in texts and own_pad is None:
        result = with_special_token(result, "pad_token", texts["pad"])
    return result, {use: result.ids[text] for use, text in texts.items()}


def vocabulary_faults(
    tokenizer: Tokenizer, rows: int, rows_of_base: object, *, is_base: bool
) -> list[Fault]:
    """Faults where the LLM's rows and the tokens of its tokenizer do not belong together.

    The LLM has `rows`, the base's config says `rows_of_base`. The tokenizer of a base, `is_base`,
    lacks the tokens for which training has added rows; where rows were taken away, they were
    resized to the length of a tokenizer (transformers `resize_token_embeddings`).
    """
    tokens = tokenizer.highest_id + 1
    if tokens <= rows:
        if not isinstance(rows_of_base, int) or rows == rows_of_base:
            return []
        if rows > rows_of_base and (tokens > rows_of_base or not is_base):
            return []
        if rows < rows_of_base and tokens == rows:
            return []
        extended = (
            f"the vocabulary was extended by {rows - rows_of_base} rows: it has {rows}, the base's "
            f"config says {rows_of_base}, and the base's tokenizer has ids up to {tokens - 1} only"
            if rows > rows_of_base
            else f"the vocabulary has {rows} rows, the base's config says {rows_of_base}, and the "
            f"tokenizer has {tokens} tokens"
        )
        return [
            Fault(
                str(tokenizer.folder),
                extended,
                "Give --tokenizer the tokenizer that was trained with, which has the added tokens.",
            )
        ]
    token = max(tokenizer.ids, key=lambda name: tokenizer.ids[name])
    return [
        Fault(
            str(tokenizer.folder),
            f"token '{token}' has id {tokenizer.highest_id}, the embedding has {rows} rows",
            "LLaVA would add random rows for it. Give --llm the base that was trained, or "
            "--tokenizer the tokenizer that was.",
        )
    ]


def prompt_template(
    catalogue: Catalogue, family: Family, training_config: TrainingConfig | None, findings: Findings
) -> PromptTemplate | None:
    """The prompt template of the training, else the one that the LLM's family is known for."""
    recorded = training_config.data.prompt_template if training_config is not None else None
    if isinstance(recorded, Table):
        return _written_out(recorded)
    if recorded is not None:
        if recorded not in catalogue.prompt_templates:
            findings.note(
                f"The prompt template {recorded!r} of the XTuner config is not one of XTuner's, so "
                "no prompt can be given."
            )
        return catalogue.prompt_templates.get(recorded)
    usual = catalogue.prompt_templates.get(family.chat.template or "")
    if usual is not None:
        findings.note(
            f"Nothing known names the prompt template of the training: {usual.name!r}, the usual "
            "one of this LLM, is taken for it. --xtuner-config FILE.py names it."
        )
    return usual


def _written_out(table: Table) -> PromptTemplate | None:
    """A template that the config writes out, with XTuner's keys; None where it has no input."""

    def text(key: str) -> str:
        value = table.get(key)
        return value if isinstance(value, str) else ""

    words = table.get("STOP_WORDS")
    stop_words = words if isinstance(words, (list, tuple)) else ()
    if not text("INSTRUCTION"):
        return None
    return PromptTemplate(
        None,
        text("INSTRUCTION"),
        text("SYSTEM"),
        text("SUFFIX"),
        table.get("SUFFIX_AS_EOS") is True,
        text("SEP"),
        tuple(word for word in stop_words if isinstance(word, str)),
    )
