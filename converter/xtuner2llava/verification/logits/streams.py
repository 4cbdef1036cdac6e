"""Models side by side, layer by layer: the trained one, the folder, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.logits.distance import Distance, by_position
from xtuner2llava.verification.logits.model import ClipTower, LayeredLLM
from xtuner2llava.verification.logits.values import Reading

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
_LOGITS = 4 << 20  # of each model that are in memory at once
# What is exchanged within one layer, where both have the same shape.
_EXCHANGES = (
    ("gate and up", ".gate_proj.", ".up_proj."),
    ("gate and up", ".w1.", ".w3."),
    ("q and k", ".q_proj.", ".k_proj."),
    ("k and v", ".k_proj.", ".v_proj."),
)
_GATE_UP = ".gate_up_proj."  # Phi-3 has both in one tensor, gate first


@dataclass(frozen=True, slots=True)
class Stream:
    """A model to run: its parts, how their values are read, and whether states are nudged."""

    name: str
    language: LayeredLLM
    tower: ClipTower
    reading: Reading = field(default_factory=Reading)
    nudged: bool = False


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


@dataclass(slots=True)
class Figures:
    """The numbers of a run; `stages` are the largest differences of hidden states, in order."""

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


def fixed_input(*models: Stream) -> ModelInput:
    """A fixed image of the size that the tower takes, and ids spread over the vocabulary."""
    import torch

    size, channels = (models[0].tower.config.get(key) for key in ("image_size", "num_channels"))
    steps = torch.linspace(0, 1, size if isinstance(size, int) else 224)
    waves = [
        1.5 * torch.sin(6.0 * (1 + c) * steps[:, None] + 11.0 * steps[None, :] * (2 + c))
        for c in range(channels if isinstance(channels, int) else 3)
    ]
    rows = min(model.language.weights[model.language.embedding].rows for model in models)
    ids = [(17 + 7919 * n) % rows for n in range(_BEFORE + _AFTER)]
    return ModelInput(ids[:_BEFORE], ids[_BEFORE:], torch.stack(waves)[None])


@dataclass(slots=True)
class Run:
    """`streams` on `given`: the distances of `pairs` of their logits, and of wrong models.

    One of the streams is `FOLDER`: wrong models branch off from it in the middle layer, and the
    distance of the first name of each pair from them is computed too. `compared` are two streams
    whose hidden states are compared after each layer. `reference` are logits of the last positions,
    (positions, vocabulary), called `REFERENCE`. `advance` counts the bytes of weights that were
    run.
    """

    streams: Sequence[Stream]
    given: ModelInput
    pairs: Sequence[tuple[str, str]]
    advance: Callable[[int], None]
    compared: tuple[str, str] | None = None
    reference: torch.Tensor | None = None
    _figures: Figures = field(default_factory=Figures)
    _hidden: dict[str, torch.Tensor] = field(default_factory=dict)
    _normed: dict[str, torch.Tensor] = field(default_factory=dict)
    _wrong: list[str] = field(default_factory=list)

    def figures(self) -> Figures:
        """Runs all of it."""
        images = {stream.name: self._embed(stream) for stream in self.streams}
        self._figures.positions = self._hidden[FOLDER].shape[1]
        if all(image is not None for image in images.values()):
            self._note("image features", images)
        self._note("embeddings", self._hidden)
        for number in range(self.streams[0].language.count):
            for (language, reading), group in groupby(
                self.streams, lambda stream: (stream.language, stream.reading)
            ):
                self._layer(number, language, reading, list(group))
            self._note(f"layer {number}", self._hidden)
        self._head()
        return self._figures

    def _embed(self, stream: Stream) -> torch.Tensor | None:
        """Makes the hidden states that go into the first layer; returns the image's."""
        import torch

        given = self.given
        hidden = stream.language.embed([*given.before, *given.after], stream.reading)
        image = given.features
        if given.pixels is not None:
            image = stream.tower.features(given.pixels, stream.reading)
        if image is not None:
            cut = len(given.before)
            hidden = torch.cat([hidden[:, :cut], image, hidden[:, cut:]], dim=1)
        self._hidden[stream.name] = _nudged(hidden) if stream.nudged else hidden
        return image

    def _note(self, stage: str, states: Mapping[str, torch.Tensor | None]) -> None:
        if self.compared is not None:
            one, other = (states[name] for name in self.compared)
            alike = one is not None and other is not None and one.shape == other.shape
            apart = float((one - other).abs().max()) if alike else float("nan")  # type: ignore[operator]
            self._figures.stages[stage] = apart

    def _layer(
        self, number: int, language: LayeredLLM, reading: Reading, streams: Sequence[Stream]
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
                    wrong = {f"{_WRONG}{t}": inner for t, inner in wrong_layers(tensors).items()}
                    jobs += [(name, inner, start) for name, inner in wrong.items()]
                    self._wrong = [*wrong]
        for name, inner, start in jobs:
            if number == language.count - 1:
                self._hidden[name], self._normed[name] = language.run_last(inner, start, reading)
            else:
                self._hidden[name] = language.run(number, inner, start)
        self.advance(sum(tensor.nbytes for tensor in tensors.values()))

    def _head(self) -> None:
        """Logits of some positions at a time, and their distances."""
        figures, reference = self._figures, self.reference
        ones = dict.fromkeys(one for one, _ in self.pairs)
        wrong = [(one, name) for one in ones if one != TRAINED for name in self._wrong]
        parts: dict[tuple[str, str], list[torch.Tensor]] = {p: [] for p in [*self.pairs, *wrong]}
        positions = figures.positions if reference is None else len(reference)
        heads = [s.language.weights[s.language.head].rows for s in self.streams]
        figures.columns = min([*heads, *([] if reference is None else [reference.shape[1]])])
        step = max(1, _LOGITS // figures.columns)
        for start in range(0, positions, step):
            stop = min(start + step, positions)
            logits = {}
            if reference is not None:
                logits[REFERENCE] = reference[start:stop, : figures.columns].float()
            for stream in self.streams:
                names = [stream.name, *(self._wrong if stream.name == FOLDER else ())]
                states = {name: self._normed[name][-positions:][start:stop] for name in names}
                logits |= self._logits(stream, states)
            for pair, found in parts.items():
                found.append(by_position(*(logits[name] for name in pair)))
            scale = max(float(block.abs().max()) for block in logits.values())
            figures.scale = max(figures.scale, scale)
        for (one, other), found in parts.items():
            figures.distances[f"{one} - {other}"] = Distance.of(found)

    def _logits(
        self, stream: Stream, states: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the head of `stream` makes of `states`; it is read in blocks of rows."""
        import torch

        weight = stream.language.weights[stream.language.head]
        blocks: dict[str, list[torch.Tensor]] = {name: [] for name in states}
        step = max(1, _HEAD_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, self._figures.columns, step):
            rows = stream.reading.rows(weight, start, min(start + step, self._figures.columns))
            for name, state in states.items():
                blocks[name].append(state @ rows.T)
        return {name: torch.cat(found, dim=1) for name, found in blocks.items()}


def wrong_layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """A layer's tensors with two kinds of them exchanged, for each exchange whose shapes agree."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for title, one, other in _EXCHANGES:
        pairs = [(name, name.replace(one, other)) for name in tensors if one in name]
        fit = [(a, b) for a, b in pairs if b in tensors and tensors[a].shape == tensors[b].shape]
        if fit:
            there, back = ({a: tensors[b] for a, b in fit}, {b: tensors[a] for a, b in fit})
            found[title] = {**tensors, **there, **back}
    if "q and k" in found:
        found.pop("k and v", None)
    fused = [name for name in tensors if _GATE_UP in name]
    if fused:
        halves = {name: tensors[name].roll(len(tensors[name]) // 2, 0) for name in fused}
        found["gate and up"] = {**tensors, **halves}
    return found


def _nudged(hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` with each value moved to the float32 next to it, up or down at random."""
    import torch

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
    return hidden * (1 + signs * 2.0**-23)
