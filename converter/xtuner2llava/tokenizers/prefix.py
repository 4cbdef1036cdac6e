"""What a tokenizer puts before a text: a space, a bos token.

XTuner encodes a conversation piece by piece (InternLM/xtuner `xtuner/dataset/utils.py`, encode_fn),
and a chat template gives one text. A SentencePiece tokenizer puts a space before each piece that it
encodes by itself; in one text, that space must be written out where the tokenizer would not add it.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.fast_file import around_text
from xtuner2llava.tokenizers.sentencepiece import SPACE
from xtuner2llava.tokenizers.tokenizer import FAST, MODEL, Tokenizer, json_file, steps

# Classes of transformers that add the bos token where `add_bos_token` is not false, and decode
# without `clean_up_tokenization_spaces` where it is not said
# (`models/llama/tokenization_llama_fast.py`, `models/gemma/tokenization_gemma_fast.py`).
LIKE_LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


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
    if FAST not in tokenizer.files:
        everywhere = tokenizer.config.get("legacy") is not False
        return PrefixSpace(everywhere, doubled=True) if MODEL in tokenizer.files else None
    content = tokenizer.read(FAST)
    for step in steps(content.get("normalizer")):
        match step:
            case {"type": "Prepend", "prepend": str(prepended)} if prepended == SPACE:
                return PrefixSpace(everywhere=True, doubled=True)
            # What `compatibility` writes in place of a Metaspace.
            case {"pattern": {"Regex": str(regex)}} if regex.startswith(rf"\A(?!{SPACE}"):
                return PrefixSpace(everywhere=regex == rf"\A(?!{SPACE})", doubled=False)
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
    normalizer = tokenizer.read(FAST).get("normalizer")
    return all(step.get("type") in ("Prepend", "Replace") for step in steps(normalizer))


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether `tokenizer` puts its bos token before each text."""
    if tokenizer.slow_class in LIKE_LLAMA:
        return tokenizer.config.get("add_bos_token") is not False
    bos = tokenizer.special("bos_token")
    for step in steps(tokenizer.read(FAST).get("post_processor")):
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": first}}, *_]}:
                if bos is not None and first == bos:
                    return True
    return False


def with_bos_added(tokenizer: Tokenizer, added: bool) -> Tokenizer:
    """The same tokenizer, which puts its bos token before each text, if it has one, or does not.

    Both tokenizer_config.json and the post-processor of tokenizer.json say so: some classes of
    transformers read the one, some the other.
    """
    bos = tokenizer.special("bos_token")
    if bos is None or (added and bos not in tokenizer.ids) or adds_bos(tokenizer) == added:
        return tokenizer
    changed = tokenizer.with_config({"add_bos_token": added})
    if FAST not in tokenizer.files:
        return changed

    def fast() -> bytes:
        content = tokenizer.read(FAST)
        processors: list[Json] = [
            dict(step)
            for step in steps(content.get("post_processor"))
            if step.get("type") != "TemplateProcessing"
        ]
        if added:
            processors.append(around_text({bos: tokenizer.ids[bos]}, {}))
        sequence: Json = {"type": "Sequence", "processors": processors} if processors else None
        return json_file({**content, "post_processor": sequence})

    return changed.with_made({FAST: fast})
