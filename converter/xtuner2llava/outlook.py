"""Before training: what will come of an XTuner config, so that nobody trains into a dead end.

`xtuner2llava inspect my_config.py` reads the config as data, and of the base models that it names
their small files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from xtuner2llava.errors import ConversionError, Fault
from xtuner2llava.language import Catalogue, Family
from xtuner2llava.llava.generation import TokenTexts, token_ids
from xtuner2llava.llm_config import trained_llm_config
from xtuner2llava.recipe import Recipe, Table
from xtuner2llava.sources import BaseChoice
from xtuner2llava.sources.base_model import find_base, read_config
from xtuner2llava.sources.contents import LLM, VISUAL_ENCODER
from xtuner2llava.sources.json_file import Json
from xtuner2llava.sources.weights import find_weights, open_weights
from xtuner2llava.tokenizers import Tokenizer, read_tokenizer

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Prospect:
    """One output format: the class that the LLM will become there, or why it cannot."""

    format: str
    architecture: str | None
    caveats: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What will come of a training.

    `advice` are sentences for the user, `lines` what should be added to the config.
    """

    path: Path
    llm: str | None
    vision: str | None
    family: str | None
    prospects: tuple[Prospect, ...]
    advice: tuple[str, ...]
    lines: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def is_good(self) -> bool:
        """Whether at least one format will be possible."""
        return not self.faults and any(not p.faults for p in self.prospects)

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "config": str(self.path),
            "llm": self.llm,
            "vision": self.vision,
            "family": self.family,
            "targets": [
                {
                    "format": p.format,
                    "architecture": p.architecture,
                    "possible": not p.faults,
                    "caveats": list(p.caveats),
                    "faults": [str(fault) for fault in p.faults],
                }
                for p in self.prospects
            ],
            "advice": list(self.advice),
            "lines": list(self.lines),
            "faults": [str(fault) for fault in self.faults],
        }


def foresee(path: Path, choice: BaseChoice) -> Outlook:
    """What will come of a training with the config at `path`. Raises `CheckpointError`."""
    return _Foreseeing(path, choice).outlook()


class _Foreseeing:
    def __init__(self, path: Path, choice: BaseChoice) -> None:
        self._path, self._choice = path, choice
        self._recipe = Recipe.from_file(path)
        self._catalogue = Catalogue.shipped()
        self._faults: list[Fault] = []

    def outlook(self) -> Outlook:
        recipe = self._recipe
        if self._try(lambda: recipe.is_llava) is False:
            self._faults.append(
                Fault(
                    str(self._path),
                    f"trains {recipe.model_type}, which has no projector",
                    "Only LLaVAModel can become LLaVA.",
                )
            )
        llm = self._try(lambda: self._base(LLM, recipe.llm_path))
        config = self._try(
            lambda: trained_llm_config(read_config(LLM, llm), recipe) if llm else None
        )
        family = self._try(lambda: self._family(llm, config)) if config else None
        prospects = [self._prospect(n, family, config) for n in self._catalogue.formats]
        tower = self._try(lambda: self._base(VISUAL_ENCODER, recipe.vision_path))
        if tower is not None:
            self._try(lambda: read_config(VISUAL_ENCODER, tower))
        tokenizer = self._try(lambda: read_tokenizer(llm)) if llm else None
        advice = list(recipe.notes)
        lines: list[str] = []
        if family is not None and tokenizer is not None and config is not None:
            for sentence, line in self._tokens(family, tokenizer, config):
                advice.append(sentence)
                lines += [line] if line else []
        return Outlook(
            self._path,
            recipe.llm_path,
            recipe.vision_path,
            family.name if family else None,
            tuple(prospects) if family else (),
            tuple(advice),
            tuple(lines),
            tuple(self._faults),
        )

    def _try(self, step: Callable[[], _T]) -> _T | None:
        try:
            return step()
        except ConversionError as error:
            self._faults.extend(error.faults)
            return None

    def _base(self, part: str, recorded: str | None) -> Path:
        given = self._choice.model(part)
        return find_base(part, given, recorded, self._path, weights=False)

    def _family(self, llm: Path | None, config: dict[str, Json]) -> Family:
        weights = find_weights(llm) if llm is not None else None
        names = open_weights(weights).tensors.keys() if weights is not None else None
        return self._catalogue.detect(config, names)

    def _prospect(
        self, name: str, family: Family | None, config: dict[str, Json] | None
    ) -> Prospect:
        format_ = self._catalogue.formats[name]
        if family is None or config is None:
            return Prospect(name, None, (), ())
        try:
            family.translate_config(config, format_)
        except ConversionError as error:
            return Prospect(name, None, (), error.faults)
        described = format_.classes[family.becomes.name]
        return Prospect(name, described.architecture, tuple(family.notes(config)), ())

    def _tokens(
        self, family: Family, tokenizer: Tokenizer, config: dict[str, Json]
    ) -> Iterator[tuple[str, str | None]]:
        """What bos, eos and stop words mean for this LLM, each with the line to add, if any."""
        recipe, generation = self._recipe, family.generation
        named = TokenTexts(generation.bos, generation.eos, generation.pad)
        template = recipe.prompt_template
        stops = self._stop_words(template)
        ids = token_ids(tokenizer, named, stops, {}, config)
        bos = recipe.bos_token or tokenizer.special("bos_token")
        evaluation = recipe.evaluation
        if tokenizer.special("bos_token") is None:
            yield (
                "The tokenizer has no bos token. transformers before 4.40 generates from images "
                "only with a bos id; the converted config.json and generation_config.json will "
                f"have {ids.bos}, so LLaVA needs nothing more.",
                None,
            )
            if evaluation is not None and evaluation.bos_token_id is None and ids.bos is not None:
                yield (
                    "EvaluateChatHook generates during training and needs that id of its own with "
                    "transformers before 4.40.",
                    f"generation_kwargs=dict(bos_token_id={ids.bos}),  # in EvaluateChatHook",
                )
        if recipe.bos_token is not None:
            yield (
                f"The config gives the tokenizer the bos token {bos!r}. Training does not use it; "
                "in LLaVA it would make prompts lose tokens after an image, so the converted "
                "tokenizer will be without it.",
                None,
            )
        wanted = family.chat.template
        if template is None and wanted is not None:
            yield (
                f"No prompt template is set; this family's is {wanted}.",
                f"prompt_template = PROMPT_TEMPLATE.{wanted}",
            )
        needed = stops or tuple(family.chat.stop_words)
        if evaluation is not None and needed:
            has = {*recipe.stop_words, *self._stop_words(evaluation.prompt_template)}
            missing = [word for word in needed if word not in has]
            if missing and evaluation.prompt_template != "":
                yield (
                    f"EvaluateChatHook does not know the stop words {', '.join(missing)}: its "
                    "answers would run on.",
                    f"stop_words={missing!r},  # in EvaluateChatHook",
                )
        if needed:
            yield f"Turns end with {', '.join(needed)}: eos ids {list(ids.eos)}.", None

    def _stop_words(self, template: str | Table | None) -> tuple[str, ...]:
        if isinstance(template, str):
            return tuple(self._catalogue.stop_words.get(template, ()))
        words = template.get("STOP_WORDS") if template is not None else None
        found = words if isinstance(words, (list, tuple)) else ()
        return tuple(word for word in found if isinstance(word, str))
