"""What bos, eos, pad and stop words of an LLM mean for training it and for generating after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.mapping.family import Family
from xtuner2llava.planning.chat import stop_words_of
from xtuner2llava.planning.config import TokenIds, token_ids
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.tokenizer import Tokenizer
from xtuner2llava.training_config.datasets import TrainingData
from xtuner2llava.training_config.values import Table

# A sentence for the user, and the line that should be added to the config, if any.
Advice = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class TokenAdvice:
    """Advice for a training with `data`.

    `base` is the tokenizer that trains, `written` what a conversion makes of it; `templates` are
    the stop words of XTuner's prompt templates.
    """

    data: TrainingData
    family: Family
    base: Tokenizer
    written: Tokenizer
    templates: Mapping[str, Sequence[str]]

    def all(self, generation: Mapping[str, Json], config: Mapping[str, Json]) -> Iterator[Advice]:
        """All of it; `generation` and `config` are the configs of the base LLM."""
        stops = self._of_template(self.data.prompt_template)
        ids = token_ids(self.written, self.family.generation, stops, generation, config)
        yield from self._bos(ids)
        if self.base.special("eos_token") is None and self.data.eos_token is None:
            # xtuner/dataset/utils.py, get_bos_eos_token_ids
            eos = self.family.generation.eos
            yield (
                "The tokenizer has no eos token, and XTuner does not train without one.",
                f"eos_token={eos[0]!r},  # in tokenizer" if eos else None,
            )
        if self.base.special("pad_token") is None:
            pad = f"will have {ids.pad}" if ids.pad is not None else "will have none either"
            yield (
                f"The tokenizer has no pad token. The converted generation_config.json {pad}; "
                "batches need one, single prompts do not. The format hf adds one where needed.",
                None,
            )
        yield from self._template()
        yield from self._stop_words(ids)

    def _bos(self, ids: TokenIds) -> Iterator[Advice]:
        data, own = self.data, self.family.generation.bos
        if self.base.special("bos_token") is None:
            known = (
                f"the converted config.json and generation_config.json will have {ids.bos}, so "
                "LLaVA needs nothing more."
                if ids.bos is not None
                else "nothing says which one is meant, so LLaVA needs transformers 4.40 or later."
            )
            yield (
                "The tokenizer has no bos token. transformers before 4.40 generates from images "
                f"only with a bos id; {known}",
                None,
            )
            # The hook gives `generate` the bos id of its tokenizer, over that of generation_kwargs
            # (xtuner/engine/hooks/evaluate_chat_hook.py).
            if data.evaluation is not None and data.evaluation.bos_token is None and own:
                yield (
                    "EvaluateChatHook generates during training, with the bos id of its own "
                    "tokenizer, which transformers before 4.40 need. Training does not use it.",
                    f"tokenizer=dict(**tokenizer, bos_token={own!r}),  # in EvaluateChatHook",
                )

    def _template(self) -> Iterator[Advice]:
        """The prompt template of the LLM, where the config sets none."""
        chat = self.family.chat
        if self.data.prompt_template is not None:
            return
        # A family may have members that speak otherwise, such as Phi-4 among Phi-3's.
        if chat.template is not None and self._has(chat.stop_words):
            said, known = f"; this family's is {chat.template}.", [chat.template]
        else:
            said = (
                ". XTuner's PROMPT_TEMPLATE has them by name; take that which the LLM was tuned "
                "with."
            )
            known = [name for name, words in self.templates.items() if self._has(words)]
        line = f"prompt_template = PROMPT_TEMPLATE.{known[0]}" if len(known) == 1 else None
        yield f"No prompt template is set{said}", line

    def _stop_words(self, ids: TokenIds) -> Iterator[Advice]:
        own, evaluation = self.family.chat.stop_words, self.data.evaluation
        needed = self._of_template(self.data.prompt_template) or (own if self._has(own) else ())
        if not needed:
            return
        if evaluation is not None and evaluation.prompt_template != "":
            has = {*self.data.stop_words, *self._of_template(evaluation.prompt_template)}
            missing = [word for word in needed if word not in has]
            if missing:
                yield (
                    f"EvaluateChatHook does not know the stop words {', '.join(missing)}: its "
                    "answers would run on.",
                    f"stop_words={missing!r},  # in EvaluateChatHook",
                )
        yield f"Turns end with {', '.join(needed)}: eos ids {list(ids.eos)}.", None

    def _has(self, words: Iterable[str]) -> bool:
        """Whether all of `words` are tokens."""
        return {*words} <= {*self.written.ids}

    def _of_template(self, template: str | Table | None) -> tuple[str, ...]:
        if isinstance(template, Table):
            return stop_words_of(template)
        return tuple(self.templates.get(template or "", ()))
