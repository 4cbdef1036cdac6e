"""The chat template of the output: the one that the model was trained with."""

from __future__ import annotations

from xtuner2llava.mapping import PromptTemplate
from xtuner2llava.planning.chat_template import Marks, chat_template
from xtuner2llava.planning.config import json_bytes
from xtuner2llava.planning.findings import Findings
from xtuner2llava.tokenizers import (
    FAST,
    MODEL,
    MadeFile,
    Tokenizer,
    keeps_spaces,
    prefix_space,
    read_sentencepiece,
    special_texts,
    strips_after,
    with_bos_added,
    with_config,
    with_made,
    without_files,
    without_keys,
)
from xtuner2llava.training_config import TrainingConfig

_KEY = "chat_template"
_JINJA, _JSON = "chat_template.jinja", "chat_template.json"


def with_trained_chat(
    tokenizer: Tokenizer,
    template: PromptTemplate | None,
    training_config: TrainingConfig | None,
    findings: Findings,
    *,
    with_processor: bool,
) -> Tokenizer:
    """`tokenizer` with the chat template of the training, in place of one that is there.

    In a format `with_processor`, transformers renders the template to text and tokenizes that:
    the template has the bos token, and the tokenizer adds none.
    """
    bos, eos = trained_tokens(tokenizer, training_config)
    if with_processor:
        tokenizer = with_bos_added(tokenizer, False)
    had = _KEY in tokenizer.config or any(name in tokenizer.files for name in (_JINJA, _JSON))
    marks = Marks(bos, eos, prefix_space(tokenizer), special_texts(tokenizer))
    text = chat_template(template, marks) if template is not None else None
    tokenizer = without_keys(without_files(tokenizer, (_JINJA, _JSON)), [_KEY])
    if template is None or text is None:
        findings.note(
            "Nothing says with which prompt template the model was trained, so the output has no "
            f"chat template{'; the base had one, which is left out' if had else ''}. "
            "--xtuner-config FILE.py names it."
        )
        return tokenizer
    if had:
        findings.note(
            "The base's chat template is replaced by one that is made from the prompt template of "
            "the training."
        )
    end = template.suffix if template.suffix_as_eos else eos or template.suffix
    if template.sep.isspace() and strips_after(tokenizer, end):
        findings.note(
            f"Training had {template.sep!r} between turns, and the tokenizer drops white space "
            f"after '{end}': from the second turn on, a chat lacks those tokens."
        )
    tokenizer = with_config(tokenizer, {_KEY: text})
    if not with_processor:
        return tokenizer
    files: dict[str, MadeFile] = {_JINJA: text.encode, _JSON: lambda: json_bytes({_KEY: text})}
    return with_made(tokenizer, files)


def with_trained_bos(
    tokenizer: Tokenizer, training_config: TrainingConfig | None, findings: Findings
) -> Tokenizer:
    """`tokenizer` for a program that tokenizes a prompt as text, where training had a bos token.

    XTuner puts the token before a turn even where the tokenizer adds none, as Yi's.
    """
    bos, _ = trained_tokens(tokenizer, training_config)
    changed = with_bos_added(tokenizer, True) if bos is not None else tokenizer
    if changed is not tokenizer:
        findings.note(
            f"The tokenizer adds its bos token '{bos}' to a prompt now: the base's does not, and "
            "XTuner trained with it."
        )
    findings.note(slow_tokenizer_note(tokenizer))
    return changed


def slow_tokenizer_note(tokenizer: Tokenizer) -> str | None:
    """What official LLaVA, which reads tokenizer.model, drops of a prompt; None if nothing.

    `transformers`' AutoTokenizer gave training the tokenizer.json, or made one (haotian-liu/LLaVA
    `llava/model/builder.py`, use_fast=False).
    """
    named = str(tokenizer.config.get("tokenizer_class")).removesuffix("Fast")
    if MODEL not in tokenizer.copied or (FAST not in tokenizer.files and named != "LlamaTokenizer"):
        return None
    if not read_sentencepiece(tokenizer.folder / MODEL).removes_extra_spaces:
        return None
    if keeps_spaces(tokenizer):
        return (
            f"Official LLaVA tokenizes with {MODEL}, which drops repeated spaces, line feeds, and "
            f"white space at either end of a text; training kept them, with a fast tokenizer. A "
            "prompt lacks those tokens there; the format hf keeps them."
        )
    return None


def trained_tokens(
    tokenizer: Tokenizer, training_config: TrainingConfig | None
) -> tuple[str | None, str | None]:
    """The bos and eos tokens that XTuner put around turns.

    Qwen's tokenizers have no bos there (InternLM/xtuner `xtuner/dataset/utils.py`,
    get_bos_eos_token_ids).
    """
    named = str(tokenizer.config.get("tokenizer_class", "")).lower()
    bos = None if named.startswith("qwen") else tokenizer.special("bos_token")
    eos = training_config.data.eos_token if training_config is not None else None
    return bos, eos or tokenizer.special("eos_token")
