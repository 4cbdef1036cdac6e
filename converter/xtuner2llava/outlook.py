"""Before training: what will come of an XTuner config, so that nobody trains into a dead end.

`xtuner2llava inspect my_config.py` reads the config as data, and of the base models that it names
their small files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from xtuner2llava.errors import ConversionError, Fault, MappingError, raise_faults
from xtuner2llava.llm_config import trained_llm_config
from xtuner2llava.mapping import Catalogue, Family
from xtuner2llava.options import SourceOptions
from xtuner2llava.planning.findings import Findings
from xtuner2llava.planning.language_model import choose_family
from xtuner2llava.planning.tokens import tokenizer_to_write
from xtuner2llava.planning.vision_tower import TOWER_CLASS
from xtuner2llava.recipe import Recipe
from xtuner2llava.sources.base_model import RecordedBase, find_base, read_config
from xtuner2llava.sources.contents import LLM, VISUAL_ENCODER
from xtuner2llava.sources.json_file import Json, read_json
from xtuner2llava.sources.weights import find_weights, open_weights
from xtuner2llava.target import Target, prospect
from xtuner2llava.token_advice import Advice, token_advice
from xtuner2llava.tokenizers import Tokenizer, read_tokenizer

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Outlook:
    """What will come of a training.

    `prospects` has every format, whatever is wrong; `faults` are those that no format can mend.
    `advice` are sentences for the user, `lines` what should be added to the config.
    """

    path: Path
    llm: str | None
    vision: str | None
    family: str | None
    prospects: tuple[Target, ...]
    advice: tuple[str, ...]
    lines: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def is_good(self) -> bool:
        """Whether at least one format will be possible."""
        return any(prospect.is_possible for prospect in self.prospects)

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON."""
        return {
            "config": str(self.path),
            "llm": self.llm,
            "vision": self.vision,
            "family": self.family,
            "targets": [prospect.to_dict() for prospect in self.prospects],
            "advice": list(self.advice),
            "lines": list(self.lines),
            "faults": [str(fault) for fault in self.faults],
        }


def foresee(path: Path, options: SourceOptions) -> Outlook:
    """What will come of a training with the config at `path`. Raises `CheckpointError`."""
    return _Foreseeing(path, options).outlook()


class _Foreseeing:
    def __init__(self, path: Path, options: SourceOptions) -> None:
        self._path, self._options = path, options
        self._recipe = Recipe.from_file(path)
        self._catalogue = Catalogue.shipped()
        self._faults: list[Fault] = []

    def outlook(self) -> Outlook:
        recipe = self._recipe
        self._try(recipe.check_model)
        llm = self._try(lambda: self._base(LLM, recipe.llm_path))
        config = self._try(
            lambda: trained_llm_config(read_config(LLM, llm), recipe) if llm else None
        )
        family = self._try(lambda: self._family(llm, config)) if config else None
        self._try(self._check_tower)
        base = self._try(lambda: read_tokenizer(llm)) if llm else None
        tokenizer = self._try(lambda: self._written(base, family) if base and family else None)
        depth = self._try(lambda: recipe.projector_depth)
        inexact = self._try(lambda: recipe.inexact) or ()
        advice = [Advice(note) for note in recipe.notes]
        if llm and family and config and base and tokenizer:
            generation = self._try(lambda: _generation(llm)) or {}
            stop_words = self._catalogue.stop_words
            advice += token_advice(recipe, family, base, tokenizer, config, generation, stop_words)
        return Outlook(
            self._path,
            recipe.llm_path,
            recipe.vision_path,
            family.name if family else None,
            tuple(
                prospect(format_, family, config, depth=depth, inexact=inexact, faults=self._faults)
                for format_ in self._catalogue.formats.values()
            ),
            tuple(one.sentence for one in advice),
            tuple(one.line for one in advice if one.line is not None),
            tuple(self._faults),
        )

    def _try(self, step: Callable[[], _T]) -> _T | None:
        try:
            return step()
        except ConversionError as error:
            self._faults.extend(error.faults)
            return None

    def _base(self, part: str, recorded: str | None) -> Path:
        given = self._options.base(part)
        return find_base(part, given, RecordedBase(recorded), self._path, weights=False)

    def _family(self, llm: Path | None, config: dict[str, Json]) -> Family:
        weights = find_weights(llm) if llm is not None else None
        names = open_weights(weights).tensors.keys() if weights is not None else None
        return choose_family(self._catalogue, self._options.mapping, config, names)

    def _written(self, base: Tokenizer, family: Family) -> Tokenizer:
        """The base's tokenizer as a conversion would write it, which is not always possible."""
        return tokenizer_to_write(base, family, self._recipe, None, Findings((), ()))

    def _check_tower(self) -> None:
        tower = self._base(VISUAL_ENCODER, self._recipe.vision_path)
        values = read_config(VISUAL_ENCODER, tower).values
        _, faults = self._catalogue.classes[TOWER_CLASS].complete(dict(values))
        raise_faults(MappingError, faults)


def _generation(llm: Path) -> dict[str, Json]:
    path = llm / "generation_config.json"
    return read_json(path) if path.is_file() else {}
