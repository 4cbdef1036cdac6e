"""How a tokenizer treats the start of a text, and what it adds there.

XTuner encodes a conversation piece by piece (InternLM/xtuner `xtuner/dataset/utils.py`, encode_fn),
and a chat template gives one text. A SentencePiece tokenizer puts a space before each piece that it
encodes by itself; in one text, that space must be written out where the tokenizer would not add it.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.editing import added_tokens, with_config, with_made
from xtuner2llava.tokenizers.tokenizer import FAST, Tokenizer, json_file, steps

# Classes of transformers that add the bos token where `add_bos_token` is not false
# (`models/llama/tokenization_llama_fast.py`, `models/gemma/tokenization_gemma_fast.py`).
_ADDS_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True, slots=True)
class PrefixSpace:
    """Where a tokenizer adds a space that is not in the text.

    `everywhere` is after each special token too, not only at the start of the text; `doubled` is
    where the text begins with a space already.
    """

    everywhere: bool
    doubled: bool


def prefix_space(tokenizer: Tokenizer) -> PrefixSpace | None:
    """The spaces that `tokenizer` adds; None if it adds none.

    From the normalizer and the pre-tokenizer of tokenizer.json (huggingface/tokenizers
    `normalizers/prepend.rs`, `pre_tokenizers/metaspace.rs`), else as LlamaTokenizer does
    (transformers `models/llama/tokenization_llama.py`, tokenize).
    """
    content = tokenizer.read(FAST)
    if content is None:
        if "tokenizer.model" not in tokenizer.files:
            return None
        return PrefixSpace(everywhere=tokenizer.config.get("legacy") is not False, doubled=True)
    for step in steps(content.get("normalizer")):
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            return PrefixSpace(everywhere=True, doubled=True)
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        # What `compatibility` writes in place of a Metaspace.
        if isinstance(regex, str) and regex.startswith(rf"\A(?!{_SPACE}"):
            return PrefixSpace(everywhere=regex == rf"\A(?!{_SPACE})", doubled=False)
    for step in steps(content.get("pre_tokenizer")):
        if step.get("type") == "Metaspace":
            # Before tokenizers 0.15 there was a flag in place of the scheme.
            flag = "always" if step.get("add_prefix_space", True) else "never"
            scheme = step.get("prepend_scheme", flag)
            if scheme != "never":
                return PrefixSpace(everywhere=scheme == "always", doubled=False)
    return None


def keeps_spaces(tokenizer: Tokenizer) -> bool:
    """Whether tokenizer.json keeps repeated spaces and those at the end of a text."""
    content = tokenizer.read(FAST) or {}
    return all(s.get("type") in ("Prepend", "Replace") for s in steps(content.get("normalizer")))


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether `tokenizer` puts its bos token before each text."""
    named = str(tokenizer.config.get("tokenizer_class", "")).removesuffix("Fast")
    if named in _ADDS_BOS:
        return tokenizer.config.get("add_bos_token") is not False
    bos = tokenizer.special("bos_token")
    content = tokenizer.read(FAST) or {}
    return any(
        _is_token(step.get("single"), bos)
        for step in steps(content.get("post_processor"))
        if step.get("type") == "TemplateProcessing"
    )


def with_bos_added(tokenizer: Tokenizer, added: bool) -> Tokenizer:
    """The same tokenizer, which puts its bos token before each text, or does not.

    Both tokenizer_config.json and the post-processor of tokenizer.json say so: some classes of
    transformers read the one, some the other.
    """
    bos = tokenizer.special("bos_token")
    if bos is None or adds_bos(tokenizer) == added:
        return tokenizer
    changed = with_config(tokenizer, {"add_bos_token": added})
    if FAST not in tokenizer.files:
        return changed

    def fast() -> bytes:
        content = tokenizer.read(FAST) or {}
        processors: list[Json] = [
            dict(step)
            for step in steps(content.get("post_processor"))
            if step.get("type") != "TemplateProcessing"
        ]
        if added:
            processors.append(_bos_processor(bos, tokenizer.ids[bos]))
        sequence: Json = {"type": "Sequence", "processors": processors} if processors else None
        return json_file({**content, "post_processor": sequence})

    return with_made(changed, {FAST: fast})


def special_texts(tokenizer: Tokenizer) -> frozenset[str]:
    """The texts that are found whole, at which a text is split before anything else."""
    return frozenset(token.text for token in added_tokens(tokenizer))


def strips_after(tokenizer: Tokenizer, text: str) -> bool:
    """Whether white space after the special token `text` is dropped, as after Phi-3's."""
    return any(token.text == text and token.rstrip for token in added_tokens(tokenizer))


def _bos_processor(bos: str, index: int) -> dict[str, Json]:
    def one(kind: str, name: str, sequence: int) -> Json:
        return {kind: {"id": name, "type_id": sequence}}

    first: list[Json] = [one("SpecialToken", bos, 0), one("Sequence", "A", 0)]
    second: list[Json] = [one("SpecialToken", bos, 1), one("Sequence", "B", 1)]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _is_token(pieces: Json, text: str | None) -> bool:
    first = pieces[0] if isinstance(pieces, list) and pieces else None
    token = first.get("SpecialToken") if isinstance(first, dict) else None
    return text is not None and isinstance(token, dict) and token.get("id") == text
