"""Models side by side, layer by layer: the trained one, the folder, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.logits.distance import Distance, Distances
from xtuner2llava.verification.logits.model import LanguageModel, Tower
from xtuner2llava.verification.logits.values import AS_STORED, Reading

if TYPE_CHECKING:
    import torch

# Names of the streams of hidden states.
TRAINED = "trained"  # the weights of the checkpoint as they are
ROUNDED = "rounded"  # the same, rounded to the folder's dtype
NUDGED = "nudged"  # rounded, and every hidden state off by half a unit in the last place
FOLDER = "folder"
NUDGED_FOLDER = "nudged folder"  # the folder, and every hidden state off likewise
MOVED_FOLDER = "moved folder"  # the folder, every weight moved as by one more rounding
REFERENCE = "reference"  # logits that are given

_WRONG = "wrong: "
_BEFORE, _AFTER = 8, 24  # tokens before and after the image
_HEAD_ELEMENTS = 2 << 20
# What is exchanged within one layer, where both have the same shape.
_EXCHANGES = (
    ("gate and up", (("mlp.gate_proj", "mlp.up_proj"),)),
    ("q and k", (("self_attn.q_proj", "self_attn.k_proj"),)),
    ("k and v", (("self_attn.k_proj", "self_attn.v_proj"),)),
)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models, as its config has it."""

    language: LanguageModel
    tower: Tower


@dataclass(frozen=True, slots=True)
class Stream:
    """A model to run: its weights, how they are read, and whether hidden states are nudged."""

    name: str
    side: Side
    reading: Reading = AS_STORED
    nudged: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids before and after the image, and the image: pixels, features, or none.

    `pixels` are (1, channels, height, width); `features` are (1, patches, hidden size), what the
    projector makes.
    """

    before: Sequence[int]
    after: Sequence[int]
    pixels: torch.Tensor | None = None
    features: torch.Tensor | None = None


@dataclass(slots=True)
class Figures:
    """What came out. `stages` are the largest differences of hidden states, in running order."""

    positions: int = 0
    columns: int = 0
    scale: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    distances: dict[str, Distance] = field(default_factory=dict)

    def distance(self, one: str, other: str) -> Distance:
        return self.distances[f"{one} - {other}"]

    def wrong(self, one: str) -> dict[str, Distance]:
        """The distances of `one` from the wrong models, by what is exchanged in them."""
        prefix = f"{one} - {_WRONG}"
        return {n.removeprefix(prefix): d for n, d in self.distances.items() if prefix in n}

    def to_dict(self) -> dict[str, Json]:
        return {
            "positions": self.positions,
            "vocabulary": self.columns,
            "largest_logit": self.scale,
            "hidden_state_differences": dict(self.stages),
            "distances": {name: d.to_dict() for name, d in self.distances.items()},
        }


def fixed_prompt(*sides: Side) -> Prompt:
    """A fixed picture of the size that the tower takes, and ids spread over the vocabulary."""
    import torch

    size, channels = (sides[0].tower.config.get(key) for key in ("image_size", "num_channels"))
    steps = torch.linspace(0, 1, size if isinstance(size, int) else 224)
    waves = [
        1.5 * torch.sin(6.0 * (1 + c) * steps[:, None] + 11.0 * steps[None, :] * (2 + c))
        for c in range(channels if isinstance(channels, int) else 3)
    ]
    rows = min(side.language.weights[side.language.embedding].rows for side in sides)
    ids = [(17 + 7919 * n) % rows for n in range(_BEFORE + _AFTER)]
    return Prompt(ids[:_BEFORE], ids[_BEFORE:], torch.stack(waves)[None])


def run(
    streams: Sequence[Stream],
    prompt: Prompt,
    pairs: Sequence[tuple[str, str]],
    advance: Callable[[int], None],
    *,
    compared: tuple[str, str] | None = None,
    given: torch.Tensor | None = None,
) -> Figures:
    """Runs `streams` on `prompt`; the distances of `pairs` of their logits, and of wrong models.

    One of the streams is `FOLDER`: wrong models branch off from it in the middle layer, and `pairs`
    has, for the first name of each pair, its distance from them too. `compared` are two streams
    whose hidden states are compared after each layer. `given` are the logits of the last positions,
    (positions, vocabulary), called `REFERENCE`. `advance` is told the bytes of weights that were
    run.
    """
    return _Run(streams, prompt, pairs, advance, compared, given).all()


class _Run:
    def __init__(
        self,
        streams: Sequence[Stream],
        prompt: Prompt,
        pairs: Sequence[tuple[str, str]],
        advance: Callable[[int], None],
        compared: tuple[str, str] | None,
        given: torch.Tensor | None,
    ) -> None:
        self._streams, self._prompt, self._pairs = streams, prompt, pairs
        self._advance, self._compared, self._given = advance, compared, given
        self._figures = Figures()
        self._hidden: dict[str, torch.Tensor] = {}
        self._normed: dict[str, torch.Tensor] = {}
        self._wrong: list[str] = []

    def all(self) -> Figures:
        self._embed()
        for number in range(self._streams[0].side.language.count):
            for (language, reading), group in groupby(
                self._streams, key=lambda stream: (stream.side.language, stream.reading)
            ):
                self._layer(number, language, reading, list(group))
            self._note(f"layer {number}")
        self._head()
        return self._figures

    def _embed(self) -> None:
        import torch

        prompt, images = self._prompt, {}
        for stream in self._streams:
            tower, language, reading = stream.side.tower, stream.side.language, stream.reading
            parts = [language.embed([*prompt.before, *prompt.after], reading)]
            image = prompt.features
            if prompt.pixels is not None:
                image = tower.features(prompt.pixels, reading)
            if image is not None:
                images[stream.name] = image
                cut = len(prompt.before)
                parts = [parts[0][:, :cut], image, parts[0][:, cut:]]
            hidden = torch.cat(parts, dim=1)
            self._hidden[stream.name] = _nudged(hidden) if stream.nudged else hidden
        self._figures.positions = self._hidden[FOLDER].shape[1]
        if self._compared is not None and images:
            one, other = self._compared
            self._figures.stages["image features"] = _apart(images[one], images[other])
        self._note("embeddings")

    def _note(self, stage: str) -> None:
        if self._compared is not None:
            one, other = self._compared
            self._figures.stages[stage] = _apart(self._hidden[one], self._hidden[other])

    def _layer(
        self, number: int, language: LanguageModel, reading: Reading, streams: Sequence[Stream]
    ) -> None:
        """Runs one layer; the wrong models branch off from the folder in the middle one."""
        tensors = language.layer(number, reading)
        jobs = []
        for stream in streams:
            hidden = self._hidden[stream.name]
            start = _nudged(hidden) if stream.nudged else hidden
            jobs.append((stream.name, tensors, start))
            if stream.name == FOLDER:
                jobs += [(name, tensors, self._hidden[name]) for name in self._wrong]
                if number == language.count // 2:
                    wrong = wrong_layers(tensors)
                    jobs += [(f"{_WRONG}{t}", inner, start) for t, inner in wrong.items()]
                    self._wrong = [f"{_WRONG}{title}" for title in wrong]
        for name, inner, start in jobs:
            if number == language.count - 1:
                result = language.run_last(inner, start, reading)
                self._hidden[name], self._normed[name] = result
            else:
                (self._hidden[name],) = language.run(number, inner, [start])
        self._advance(sum(tensor.nbytes for tensor in tensors.values()))

    def _head(self) -> None:
        """Logits in blocks of the vocabulary, and their distances."""
        ones = dict.fromkeys(one for one, _ in self._pairs)
        wrong = [(one, name) for one in ones if one != TRAINED for name in self._wrong]
        pairs = [*self._pairs, *wrong]
        positions = self._figures.positions if self._given is None else len(self._given)
        distances = Distances(pairs, positions)
        heads = [(s, s.side.language.weights[s.side.language.head]) for s in self._streams]
        columns = min(weight.rows for _, weight in heads)
        if self._given is not None:
            columns = min(columns, self._given.shape[1])
        step = max(1, _HEAD_ELEMENTS // max(1, heads[0][1].shape[1]))
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            block: dict[str, torch.Tensor] = {}
            if self._given is not None:
                block[REFERENCE] = self._given[:, start:stop].float()
            for stream, weight in heads:
                rows = stream.reading.rows(weight, start, stop)
                names = [stream.name, *(self._wrong if stream.name == FOLDER else ())]
                block |= {name: self._normed[name][-positions:] @ rows.T for name in names}
            distances.add(block)
        self._figures.columns, self._figures.scale = columns, distances.scale
        for one, other in pairs:
            self._figures.distances[f"{one} - {other}"] = distances.of(one, other)


def wrong_layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """A layer's tensors with two of them exchanged, for each exchange whose shapes agree."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for title, pairs in _EXCHANGES:
        wrong = dict(tensors)
        for one, other in pairs:
            for kind in ("weight", "bias"):
                a, b = f"{one}.{kind}", f"{other}.{kind}"
                if a in tensors and b in tensors and tensors[a].shape == tensors[b].shape:
                    wrong[a], wrong[b] = tensors[b], tensors[a]
        if any(wrong[name] is not tensor for name, tensor in tensors.items()):
            found[title] = wrong
    experts = {n: t for n, t in tensors.items() if ".experts." in n and n.endswith("w1.weight")}
    if experts:
        wrong = dict(tensors)
        for name, tensor in experts.items():
            other = name.replace(".w1.", ".w3.")
            wrong[name], wrong[other] = tensors[other], tensor
        found["gate and up"] = wrong
    if "q and k" in found:
        found.pop("k and v", None)
    return found


def _nudged(hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` with each value moved to the float32 next to it, up or down at random."""
    import torch

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
    return hidden * (1 + signs * 2.0**-23)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else float("nan")
