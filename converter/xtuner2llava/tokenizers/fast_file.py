"""tokenizer.json, as huggingface/tokenizers writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.tokenizer import AddedToken


def byte_pair_file(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    added: Sequence[AddedToken],
    *,
    normalizer: Json,
    pre_tokenizer: Json,
    post_processor: Json,
    decoder: Json,
    unk_token: Json = None,
    affix: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
) -> dict[str, Json]:
    """That of byte-pair encoding; merges are texts, which all versions read."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [t.in_tokenizer_json for t in sorted(added, key=lambda token: token.id)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": affix,
            "end_of_word_suffix": affix,
            "fuse_unk": fuse_unk,
            "byte_fallback": byte_fallback,
            "vocab": dict(vocab),
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def around_text(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Json]:
    """The post-processor that puts tokens, ids by text, before and after each text."""

    def template(sequence: str, kind: int) -> list[Json]:
        names = [*before, sequence, *after]
        places = ["SpecialToken"] * len(before) + ["Sequence"] + ["SpecialToken"] * len(after)
        pairs = zip(places, names, strict=True)
        return [{place: {"id": name, "type_id": kind}} for place, name in pairs]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for token, index in {**before, **after}.items()
        },
    }
