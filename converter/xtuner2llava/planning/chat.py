"""How the model was trained to talk: its prompt template, where it stops, its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.family import Family, PromptTemplate
from xtuner2llava.planning.chat_template import Marks, chat_template
from xtuner2llava.planning.config import TokenIds, json_bytes, token_ids
from xtuner2llava.planning.plan import Chat, Findings
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.prefix import prefix_space, with_bos_added
from xtuner2llava.tokenizers.sentencepiece import read_sentencepiece
from xtuner2llava.tokenizers.tokenizer import FAST, MODEL, MadeFile, Tokenizer
from xtuner2llava.training_config.datasets import TrainingData
from xtuner2llava.training_config.values import Table

_KEY = "chat_template"
_JINJA, _JSON = "chat_template.jinja", "chat_template.json"


def generation_tokens(
    catalogue: Catalogue,
    family: Family,
    tokenizer: Tokenizer,
    data: TrainingData,
    given_bos: str | None,
    base: tuple[Mapping[str, Json], Mapping[str, Json]],
    findings: Findings,
) -> tuple[TokenIds, Chat]:
    """Where to begin, stop and pad, and the prompt template with its stop words.

    `base` are the generation config and the config of the base LLM.
    """
    prompt = _prompt_template(catalogue, family, data, findings)
    of_template = prompt.stop_words if prompt is not None and data.prompt_template else ()
    asked = [*of_template, *data.stop_words, *([data.eos_token] if data.eos_token else [])]
    stop_words = tuple(dict.fromkeys(asked))
    ids = token_ids(tokenizer, family.generation, stop_words, *base)
    if given_bos is not None:
        ids = replace(ids, bos=tokenizer.ids[given_bos])
    named = family.generation.eos
    if named and family.if_right == family.file.name and tokenizer.ids.keys().isdisjoint(named):
        findings.note(
            f"The tokenizer has none of the tokens that {family.file.name} names as eos "
            f"({', '.join(named)}); the base's take their place."
        )
    unknown = [word for word in stop_words if word not in tokenizer.ids]
    if unknown:
        findings.note(
            f"Stop words that are not a single token here: {', '.join(unknown)}. Stop at them by "
            "text when you generate."
        )
    return ids, Chat(prompt, stop_words or family.chat.stop_words)


def _prompt_template(
    catalogue: Catalogue, family: Family, data: TrainingData, findings: Findings
) -> PromptTemplate | None:
    """The prompt template of the training, else the one that the LLM's family is known for."""
    recorded, known = data.prompt_template, catalogue.prompt_templates
    if isinstance(recorded, Table):
        return _written_out(recorded)
    if recorded is not None:
        if recorded not in known:
            findings.note(
                f"The prompt template {recorded!r} of the XTuner config is not one of XTuner's, so "
                "no prompt can be given."
            )
        return known.get(recorded)
    usual = known.get(family.chat.template or "")
    if usual is not None:
        findings.note(
            f"Nothing known names the prompt template of the training: {usual.name!r}, the usual "
            "one of this LLM, is taken for it. --xtuner-config FILE.py names it."
        )
    return usual


def stop_words_of(template: Table) -> tuple[str, ...]:
    """The stop words of a template that the config writes out, with XTuner's keys."""
    words = template.get("STOP_WORDS")
    listed = words if isinstance(words, (list, tuple)) else ()
    return tuple(word for word in listed if isinstance(word, str))


def _written_out(table: Table) -> PromptTemplate | None:
    """A template that the config writes out; None where it has no input."""
    values = (table.get(key) for key in ("INSTRUCTION", "SYSTEM", "SUFFIX", "SEP"))
    instruction, system, suffix, sep = (x if isinstance(x, str) else "" for x in values)
    if not instruction:
        return None
    as_eos = table.get("SUFFIX_AS_EOS") is True
    return PromptTemplate(None, instruction, system, suffix, as_eos, sep, stop_words_of(table))


def with_trained_chat(
    tokenizer: Tokenizer,
    template: PromptTemplate | None,
    data: TrainingData,
    findings: Findings,
    *,
    bos: str | None,
    with_processor: bool,
) -> Tokenizer:
    """`tokenizer` with the chat template of the training, in place of one that is there.

    In a format `with_processor`, transformers renders the template to text and tokenizes that:
    the template has the bos token, and the tokenizer adds none.
    """
    if with_processor:
        tokenizer = with_bos_added(tokenizer, False)
    had = _KEY in tokenizer.config or any(name in tokenizer.files for name in (_JINJA, _JSON))
    eos = data.eos_token or tokenizer.special("eos_token")
    added = tokenizer.added_tokens()
    whole = frozenset(token.text for token in added)
    marks = Marks(bos, eos, prefix_space(tokenizer), whole)
    text = chat_template(template, marks) if template is not None else None
    tokenizer = tokenizer.without_files(_JINJA, _JSON).with_config({}, without=[_KEY])
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
    if template.sep.isspace() and any(t.rstrip for t in added if t.text == end):
        findings.note(
            "Training had white space between turns, and the tokenizer drops it after "
            f"'{end}': from the second turn on, a chat lacks those tokens."
        )
    tokenizer = tokenizer.with_config({_KEY: text})
    if not with_processor:
        return tokenizer
    files: dict[str, MadeFile] = {_JINJA: text.encode, _JSON: lambda: json_bytes({_KEY: text})}
    return tokenizer.with_made(files)


def with_trained_bos(
    tokenizer: Tokenizer, bos: str | None, findings: Findings, *, slow: bool
) -> Tokenizer:
    """`tokenizer` for a program that tokenizes a prompt as text, where training had a bos token.

    XTuner puts the token before a turn even where the tokenizer adds none, as Yi's. Official LLaVA
    reads tokenizer.model, where `transformers`' AutoTokenizer made training a tokenizer.json
    (haotian-liu/LLaVA `llava/model/builder.py`, use_fast=False), unless training loaded the `slow`
    tokenizer too.
    """
    changed = with_bos_added(tokenizer, True) if bos is not None else tokenizer
    if changed is not tokenizer:
        findings.note(
            f"The tokenizer adds its bos token '{bos}' to a prompt now: the base's does not, and "
            "XTuner trained with it."
        )
    if (
        not slow
        and MODEL in tokenizer.copied
        and not (tokenizer.folder / FAST).is_file()
        and tokenizer.slow_class == "LlamaTokenizer"
        and read_sentencepiece(tokenizer.folder / MODEL).removes_extra_spaces
    ):
        findings.note(
            f"Official LLaVA tokenizes with {MODEL}, which drops repeated spaces, line feeds, and "
            f"white space at either end of a text; training kept them, with a fast tokenizer. A "
            "prompt lacks those tokens there; the format hf keeps them."
        )
    return changed


def trained_bos(tokenizer: Tokenizer, trained: Tokenizer) -> str | None:
    """The bos token that XTuner put before turns, with the tokenizer `trained`.

    Qwen's tokenizers have none there, whatever their config says (InternLM/xtuner
    `xtuner/dataset/utils.py`, get_bos_eos_token_ids). `tokenizer`, which is written, may have
    another class.
    """
    qwen = any(one.slow_class.lower().startswith("qwen") for one in (tokenizer, trained))
    return None if qwen else tokenizer.special("bos_token")
