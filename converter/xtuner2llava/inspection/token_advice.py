"""What bos, eos, pad and stop words of an LLM mean for training it and for generating after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from xtuner2llava.mapping import Family
from xtuner2llava.planning.config import TokenIds, token_ids
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers import Tokenizer
from xtuner2llava.training_config import Table, TrainingConfig


@dataclass(frozen=True, slots=True)
class Advice:
    """A sentence for the user, and the line that should be added to the config, if any."""

    sentence: str
    line: str | None = None


@dataclass(frozen=True, slots=True)
class TokenAdviser:
    """Advice for a training by `training_config`.

    `base` is the tokenizer that trains, `written` what a conversion makes of it; `templates` are
    the stop words of XTuner's prompt templates.
    """

    training_config: TrainingConfig
    family: Family
    base: Tokenizer
    written: Tokenizer
    templates: Mapping[str, Sequence[str]]

    def advice(
        self, config: Mapping[str, Json], generation: Mapping[str, Json]
    ) -> Iterator[Advice]:
        """All of it; `config` and `generation` are those of the base LLM."""
        named = self.family.generation
        stops = self._of_template(self.training_config.data.prompt_template)
        ids = token_ids(self.written, named, stops, generation, config)
        yield from self._special_tokens(ids)
        yield from self._template()
        yield from self._stop_words(ids)

    def _special_tokens(self, ids: TokenIds) -> Iterator[Advice]:
        training_config, named = self.training_config, self.family.generation
        if self.base.special("bos_token") is None:
            known = (
                f"the converted config.json and generation_config.json will have {ids.bos}, so "
                "LLaVA needs nothing more."
                if ids.bos is not None
                else "nothing says which one is meant, so LLaVA needs transformers 4.40 or later."
            )
            yield Advice(
                "The tokenizer has no bos token. transformers before 4.40 generates from images "
                f"only with a bos id; {known}"
            )
            # The hook gives `generate` the bos id of its tokenizer, over that of generation_kwargs
            # (xtuner/engine/hooks/evaluate_chat_hook.py).
            evaluation = training_config.data.evaluation
            if evaluation is not None and evaluation.bos_token is None and named.bos is not None:
                yield Advice(
                    "EvaluateChatHook generates during training, with the bos id of its own "
                    "tokenizer, which transformers before 4.40 need. Training does not use it.",
                    f"tokenizer=dict(**tokenizer, bos_token={named.bos!r}),  # in EvaluateChatHook",
                )
        if training_config.data.bos_token not in (None, self.written.special("bos_token")):
            harm = (
                "LLaVA needs none there"
                if training_config.data.bos_token == named.bos
                else "in LLaVA it would make prompts lose tokens after an image"
            )
            yield Advice(
                f"The config gives the tokenizer the bos token {training_config.data.bos_token!r}. "
                f"Training does not use it; {harm}, so the converted tokenizer will be without it."
            )
        if self.base.special("eos_token") is None and training_config.data.eos_token is None:
            # xtuner/dataset/utils.py, get_bos_eos_token_ids
            yield Advice(
                "The tokenizer has no eos token, and XTuner does not train without one.",
                f"eos_token={named.eos[0]!r},  # in tokenizer" if named.eos else None,
            )
        if self.base.special("pad_token") is None:
            pad = f"will have {ids.pad}" if ids.pad is not None else "will have none either"
            yield Advice(
                f"The tokenizer has no pad token. The converted generation_config.json {pad}; "
                "batches need one, single prompts do not. The format hf adds one where needed."
            )

    def _template(self) -> Iterator[Advice]:
        """The prompt template of the LLM, where the config sets none."""
        if self.training_config.data.prompt_template is not None:
            return
        wanted = self.family.chat.template
        # A family may have members that speak otherwise, such as Phi-4 among Phi-3's.
        if wanted is not None and self._has(self.family.chat.stop_words):
            yield Advice(
                f"No prompt template is set; this family's is {wanted}.",
                f"prompt_template = PROMPT_TEMPLATE.{wanted}",
            )
            return
        known = [name for name, words in self.templates.items() if self._has(words)]
        yield Advice(
            "No prompt template is set. XTuner's PROMPT_TEMPLATE has them by name; take that which "
            "the LLM was tuned with.",
            f"prompt_template = PROMPT_TEMPLATE.{known[0]}" if len(known) == 1 else None,
        )

    def _stop_words(self, ids: TokenIds) -> Iterator[Advice]:
        training_config = self.training_config
        evaluation = training_config.data.evaluation
        own = self.family.chat.stop_words
        needed = self._of_template(training_config.data.prompt_template) or (
            own if self._has(own) else ()
        )
        if not needed:
            return
        if evaluation is not None and evaluation.prompt_template != "":
            has = {*training_config.data.stop_words, *self._of_template(evaluation.prompt_template)}
            missing = [word for word in needed if word not in has]
            if missing:
                yield Advice(
                    f"EvaluateChatHook does not know the stop words {', '.join(missing)}: its "
                    "answers would run on.",
                    f"stop_words={missing!r},  # in EvaluateChatHook",
                )
        yield Advice(f"Turns end with {', '.join(needed)}: eos ids {list(ids.eos)}.")

    def _has(self, words: Sequence[str]) -> bool:
        """Whether all of `words` are tokens."""
        return {*words} <= {*self.written.ids}

    def _of_template(self, template: str | Table | None) -> tuple[str, ...]:
        if isinstance(template, str):
            return tuple(self.templates.get(template, ()))
        words = template.get("STOP_WORDS") if template is not None else None
        found = words if isinstance(words, (list, tuple)) else ()
        return tuple(word for word in found if isinstance(word, str))
