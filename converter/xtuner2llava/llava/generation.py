"""`generation_config.json`, and the token ids that stand in `config.json` too.

LLaVA generates from `inputs_embeds`. transformers before 4.40 then demands a bos id, which it takes
from `generation_config.bos_token_id`; a chat model without its end-of-turn token among the eos ids
never stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.sources.json_file import Json
from xtuner2llava.tokenizers.tokenizer import Tokenizer

# Keys that speak of the machine or the library that wrote the file, not of generation.
_HOUSEKEEPING = ("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id",
                 "pad_token_id")  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Where generation starts, stops and pads; None where the model has no such token."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None

    @property
    def eos_value(self) -> Json:
        """As configs spell it: one id, or a list of several."""
        if len(self.eos) > 1:
            return list(self.eos)
        return self.eos[0] if self.eos else None


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """The tokens that a family or a prompt template names by their text."""

    bos: str | None = None
    eos: Sequence[str] = ()
    pad: str | None = None


def token_ids(
    tokenizer: Tokenizer,
    named: TokenTexts,
    stop_words: Sequence[str],
    base_generation: Mapping[str, Json],
    base_config: Mapping[str, Json],
) -> TokenIds:
    """The ids to generate with.

    A token that the family names counts if the tokenizer has it; else what the base's
    `generation_config.json`, then its `config.json` say; else, for bos and eos, without which
    nothing can be generated, the tokenizer's own. Of `stop_words`, with which the prompt
    template ends a turn, those that are single tokens are put before the base's eos ids.
    """

    def of_base(key: str) -> list[int]:
        for values in (base_generation, base_config):
            value = values.get(key)
            found = value if isinstance(value, list) else [value]
            ids = [n for n in found if isinstance(n, int) and not isinstance(n, bool)]
            if ids:
                return ids
        return []

    def of_text(text: str | None) -> list[int]:
        return [tokenizer.ids[text]] if text is not None and text in tokenizer.ids else []

    named_eos = [i for word in named.eos for i in of_text(word)]
    stops = [i for word in stop_words for i in of_text(word)]
    base_eos = of_base("eos_token_id") or of_text(tokenizer.special("eos_token"))
    eos = list(dict.fromkeys([*stops, *(named_eos or base_eos)]))
    own_bos = of_text(tokenizer.special("bos_token"))
    bos = of_text(named.bos) or of_base("bos_token_id") or own_bos
    pad = of_text(named.pad) or of_base("pad_token_id")
    return TokenIds(bos[0] if bos else None, tuple(eos), pad[0] if pad else None)


def generation_config(base: Mapping[str, Json], ids: TokenIds) -> dict[str, Json]:
    """The base's generation settings with `ids`; sampling parameters are the base's."""
    result = {key: value for key, value in base.items() if key not in _HOUSEKEEPING}
    for key, value in (
        ("bos_token_id", ids.bos),
        ("eos_token_id", ids.eos_value),
        ("pad_token_id", ids.pad),
    ):
        if value is not None:
            result[key] = value
    return dict(sorted(result.items()))
