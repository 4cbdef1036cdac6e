"""Models on one image and prompt: the trained one, the folder, and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from xtuner2llava.errors import CheckpointError
from xtuner2llava.storage.json_file import Json, integer
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.verification.logits.streamed import Model, ModelInput
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


def fixed_input(vision: Mapping[str, Json], *models: Model) -> ModelInput:
    """A fixed image of the size that the tower takes, and ids spread over the vocabulary."""
    import torch

    size, channels = integer(vision, "image_size") or 224, integer(vision, "num_channels") or 3
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, channels, size, size, generator=generator)
    rows = min(model.language.embedding.rows for model in models)
    ids = [(17 + 7919 * n) % rows for n in range(_BEFORE + _AFTER)]
    return ModelInput(ids[:_BEFORE], ids[_BEFORE:], pixels)


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
        figures = {"largest_difference": self.largest, "kl": self.kl, "top1": self.top1}
        return {name: _finite(figure) for name, figure in figures.items()}


class Comparison:
    """Models on one image and prompt, one after the other, and how far their logits are apart.

    `advance` counts the bytes of weights that were run. `stages` are the largest differences of the
    hidden states of `ROUNDED` and `FOLDER`, in order.
    """

    def __init__(self, given: ModelInput, advance: Callable[[int], None]) -> None:
        self._given, self._advance = given, advance
        self.positions = self.columns = 0
        self.scale = 0.0
        self.stages: dict[str, float] = {}
        self.distances: dict[tuple[str, str], Distance] = {}
        self._states: dict[str, torch.Tensor] = {}
        self._heads: list[LazyTensor] = []
        # What goes into each head, (positions, hidden size), by the name of the stream.
        self._normed: list[dict[str, torch.Tensor]] = []

    def add(self, name: str, model: Model, nudged: str | None = None) -> None:
        """Runs `model`, and again as `nudged`; beside `FOLDER`, also wrong models made of it.

        Raises `CheckpointError` where it cannot be run, or makes another number of positions.
        """
        seen = partial(self._note, model.language.layer_bytes)
        embedded = model.embed(self._given, partial(seen, name))
        if self._normed and embedded.shape[1] != self.positions:
            what = f"{embedded.shape[1]} positions, others have {self.positions}"
            raise CheckpointError(f"the model called {name} has {what}")
        self.positions = embedded.shape[1]
        run = partial(model.language.run, embedded)
        streams = {name: run(partial(seen, name))}
        if nudged is not None:
            streams[nudged] = run(partial(seen, nudged), nudge=True)
        if name == FOLDER:
            for what, wrong in model.language.exchanged().items():
                streams[f"{_WRONG}{what}"] = run(partial(seen, what), wrong=wrong)
        self._heads.append(model.language.head)
        self._normed.append(streams)

    def _note(self, nbytes: int, stream: str, stage: str, state: torch.Tensor) -> None:
        """Compares the hidden states of the folder with those of the rounded model."""
        self._advance(nbytes)
        if stream == ROUNDED:
            self._states[stage] = state
        elif stream == FOLDER and stage in self._states:
            other = self._states.pop(stage)
            alike = other.shape == state.shape
            self.stages[stage] = float((other - state).abs().max()) if alike else math.nan

    def compare(
        self, pairs: Sequence[tuple[str, str]], reference: torch.Tensor | None = None
    ) -> None:
        """Compares the logits of `pairs`, and the first of each with those of the wrong models.

        `REFERENCE` are logits that are given of the last positions, (positions, vocabulary).
        """
        wrong = [name for streams in self._normed for name in streams if name.startswith(_WRONG)]
        ones = dict.fromkeys(one for one, _ in pairs if one != TRAINED)
        positions = self.positions if reference is None else len(reference)
        for pair in [*pairs, *((one, name) for one in ones for name in wrong)]:
            self.distances[pair] = Distance(positions)
        rows = [head.rows for head in self._heads]
        self.columns = min(rows if reference is None else [*rows, reference.shape[1]])
        widest = max(head.shape[1] for head in self._heads)
        step = max(1, min(_HEAD_ELEMENTS // widest, _LOGITS // positions))
        for start in range(0, self.columns, step):
            stop = min(start + step, self.columns)
            logits = {} if reference is None else {REFERENCE: reference[:, start:stop]}
            for head, streams in zip(self._heads, self._normed, strict=True):
                weight = head.read(start, stop).float()
                logits |= {n: normed[-positions:] @ weight.T for n, normed in streams.items()}
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
            "largest_logit": _finite(self.scale),
            "hidden_state_differences": {n: _finite(apart) for n, apart in self.stages.items()},
            "distances": {f"{a} - {b}": d.to_dict() for (a, b), d in self.distances.items()},
        }


def _finite(figure: float) -> float | None:
    """`figure` for a report; None for NaN and infinity, which JSON does not have."""
    return figure if math.isfinite(figure) else None
