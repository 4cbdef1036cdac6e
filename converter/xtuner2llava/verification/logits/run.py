"""Models on one image and prompt: the trained one, the folder, and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.verification.logits.streamed import ClipTower, LanguageModel
from xtuner2llava.verification.outcome import FAILED, OK, Check

if TYPE_CHECKING:
    import torch

# Streams of hidden states; beside them, the wrong models.
TRAINED = "trained"  # the weights of the checkpoint as they are
ROUNDED = "rounded"  # the same, rounded to the folder's dtype
NUDGED = "nudged"  # rounded, and every hidden state off by half a unit in the last place
FOLDER = "folder"
NUDGED_FOLDER = "nudged folder"  # the folder, and every hidden state off likewise
MOVED_FOLDER = "moved folder"  # the folder, every weight moved as by one more rounding
REFERENCE = "reference"  # logits that are given
_WRONG = "wrong: "

# How many times further than the noise of float32 the same function may be, computed otherwise.
# The noise is measured: a model against itself with every hidden state moved by half a unit in the
# last place, once a layer. A layer whose sums run in another order moves it by a few.
NOISE = 8
# A wrong model must be this much further away than what is let pass.
_FURTHER = 4
_BEFORE, _AFTER = 8, 24  # tokens before and after the image
# Of the head, and of the logits of each model, that are in memory at once.
_HEAD_ELEMENTS, _LOGITS = 2 << 20, 4 << 20


@dataclass(frozen=True, slots=True)
class ModelInput:
    """Token ids before and after the image, and the image: pixels, features, or none.

    `pixels` are (1, channels, height, width); `features` are (1, patches, hidden size), what the
    projector makes.
    """

    before: Sequence[int]
    after: Sequence[int]
    pixels: torch.Tensor | None = None
    features: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A LLaVA to run."""

    language: LanguageModel
    tower: ClipTower

    def embed(self, given: ModelInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden states that go into the first layer, and those of the image alone."""
        import torch

        hidden = self.language.embed([*given.before, *given.after])
        image = given.features if given.pixels is None else self.tower.features(given.pixels)
        if image is None:
            return hidden, None
        cut = len(given.before)
        return torch.cat([hidden[:, :cut], image, hidden[:, cut:]], dim=1), image


def fixed_input(*models: Model) -> ModelInput:
    """A fixed image of the size that the tower takes, and ids spread over the vocabulary."""
    import torch

    size, channels = (models[0].tower.config.get(key) for key in ("image_size", "num_channels"))
    steps = torch.linspace(0, 1, size if isinstance(size, int) else 224)
    waves = [
        1.5 * torch.sin(6.0 * (1 + c) * steps[:, None] + 11.0 * steps[None, :] * (2 + c))
        for c in range(channels if isinstance(channels, int) else 3)
    ]
    rows = min(model.language.embedding.rows for model in models)
    ids = [(17 + 7919 * n) % rows for n in range(_BEFORE + _AFTER)]
    return ModelInput(ids[:_BEFORE], ids[_BEFORE:], torch.stack(waves)[None])


class Distance:
    """How far one set of logits is from another, both given in parts of the vocabulary.

    `largest` is the largest absolute difference, `kl` the mean over positions of the divergence of
    the first from the second in nats, `top1` the fraction of positions whose likeliest token is the
    same. `largest` and `kl` are NaN wherever a logit is.
    """

    def __init__(self, positions: int) -> None:
        import torch

        zeros = torch.zeros(positions, dtype=torch.double)
        # For each position. Of the tokens so far: the largest difference; its mean by the chances
        # of the first set; the logarithm of the sum of each set's exponentials; the largest logit
        # of each, and the second set's where the first has its largest.
        self._largest, self._mean = zeros, zeros
        self._sums = self._best = (zeros - math.inf, zeros - math.inf)
        self._at_best = zeros

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Takes the logits of the tokens that follow, (positions, tokens)."""
        import torch

        one, other = first.double(), second.double()
        apart = one - other
        self._largest = torch.maximum(self._largest, apart.abs().amax(1))
        before = self._sums[0]
        now = torch.logaddexp(before, one.logsumexp(1))
        self._sums = now, torch.logaddexp(self._sums[1], other.logsumexp(1))
        here = ((one - now[:, None]).exp() * apart).sum(1)
        self._mean = self._mean * (before - now).exp() + here
        best, token = one.max(1, keepdim=True)
        better = best[:, 0] > self._best[0]
        self._at_best = torch.where(better, other.gather(1, token)[:, 0], self._at_best)
        self._best = (
            torch.where(better, best[:, 0], self._best[0]),
            torch.maximum(self._best[1], other.amax(1)),
        )

    @property
    def largest(self) -> float:
        return float(self._largest.max())

    @property
    def kl(self) -> float:
        # It is at least zero, but for rounding.
        return float((self._mean - self._sums[0] + self._sums[1]).mean().clamp(min=0))

    @property
    def top1(self) -> float:
        return float((self._at_best == self._best[1]).double().mean())

    def __str__(self) -> str:
        return f"largest difference {self.largest:.3g}, KL {self.kl:.2g}, top-1 {self.top1:.1%}"

    def to_dict(self) -> dict[str, Json]:
        return {"largest_difference": self.largest, "kl": self.kl, "top1": self.top1}


@dataclass(slots=True)
class Run:
    """`models` on `given`: the distances of `pairs` of their logits, and of wrong models.

    One of the models is `FOLDER`: wrong models are made of it, and the distance of the first name
    of each pair from them is computed too. `nudged` streams run beside the model that each is of.
    `compared` are two models whose hidden states are compared; `stages` are the largest differences
    after each layer. `reference` are logits of the last positions, (positions, vocabulary), called
    `REFERENCE`. `advance` counts the bytes of weights that were run.
    """

    models: Mapping[str, Model]
    given: ModelInput
    pairs: Sequence[tuple[str, str]]
    advance: Callable[[int], None]
    nudged: Mapping[str, str] = field(default_factory=dict)
    compared: tuple[str, str] | None = None
    reference: torch.Tensor | None = None
    positions: int = 0
    columns: int = 0
    scale: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    distances: dict[tuple[str, str], Distance] = field(default_factory=dict)
    _heads: list[tuple[LazyTensor, list[str]]] = field(default_factory=list)
    _normed: dict[str, torch.Tensor] = field(default_factory=dict)
    _states: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Runs one stream after the other, and compares their logits."""
        for name, model in self.models.items():
            embedded, image = model.embed(self.given)
            self.positions = embedded.shape[1]
            if image is not None:
                self._compare(name, "image features", image)
            self._compare(name, "embeddings", embedded)
            run = partial(model.language.run, embedded)
            normed = {name: run(partial(self._after_layer, model, name))}
            other = partial(self._after_layer, model, "")
            twins = [twin for twin, of in self.nudged.items() if of == name]
            normed |= {twin: run(other, nudge=True) for twin in twins}
            if name == FOLDER:
                for what, wrong in model.language.exchanged().items():
                    normed[f"{_WRONG}{what}"] = run(other, wrong=wrong)
            self._normed |= normed
            self._heads.append((model.language.head, [*normed]))
        self._compare_logits()

    def _compare(self, name: str, stage: str, state: torch.Tensor) -> None:
        """Notes how far the hidden states of two models are apart, once there are both."""
        if self.compared is None or name not in self.compared:
            return
        other = self._states.pop(stage, None)
        if other is None:
            self._states[stage] = state
        else:
            alike = other.shape == state.shape
            self.stages[stage] = float((other - state).abs().max()) if alike else math.nan

    def _after_layer(self, model: Model, name: str, stage: str, state: torch.Tensor) -> None:
        self.advance(model.language.layer_bytes)
        self._compare(name, stage, state)

    def _compare_logits(self) -> None:
        """Logits of some tokens at a time, and their distances."""
        reference = self.reference
        positions = self.positions if reference is None else len(reference)
        wrong = [name for name in self._normed if name.startswith(_WRONG)]
        ones = dict.fromkeys(one for one, _ in self.pairs if one != TRAINED)
        for pair in [*self.pairs, *((one, name) for one in ones for name in wrong)]:
            self.distances[pair] = Distance(positions)
        rows = [head.rows for head, _ in self._heads]
        self.columns = min(rows if reference is None else [*rows, reference.shape[1]])
        widest = max(head.shape[1] for head, _ in self._heads)
        step = max(1, min(_HEAD_ELEMENTS // widest, _LOGITS // positions))
        for start in range(0, self.columns, step):
            stop = min(start + step, self.columns)
            logits = {} if reference is None else {REFERENCE: reference[:, start:stop]}
            for head, streams in self._heads:
                weight = head.read(start, stop).float()
                logits |= {n: self._normed[n][-positions:] @ weight.T for n in streams}
            for (one, other), distance in self.distances.items():
                distance.add(logits[one], logits[other])
            self.scale = max(self.scale, *(float(part.abs().max()) for part in logits.values()))

    def wrong_check(self, against: str, least: float, name: str) -> Check:
        """Whether a wrong model is further from `against` than `least`.

        If none is, a small difference proves nothing.
        """
        wrong = {
            other.removeprefix(_WRONG): distance
            for (one, other), distance in self.distances.items()
            if one == against and other.startswith(_WRONG)
        }
        detail = "; ".join(f"{what} exchanged in one layer: {d}" for what, d in wrong.items())
        if any(distance.largest > _FURTHER * least for distance in wrong.values()):
            return Check(name, OK, detail)
        what = "a wrong model is not further away than a right one"
        return Check(name, FAILED, f"{what}: {detail}")

    def to_dict(self) -> dict[str, Json]:
        return {
            "positions": self.positions,
            "vocabulary": self.columns,
            "largest_logit": self.scale,
            "hidden_state_differences": dict(self.stages),
            "distances": {f"{a} - {b}": d.to_dict() for (a, b), d in self.distances.items()},
        }
