"""The trained model and the folder side by side, layer by layer, and two wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xtuner2llava.sources.json_file import Json
from xtuner2llava.verification.logits.distance import Distance, Distances
from xtuner2llava.verification.logits.model import LanguageModel, Rounding, Tower
from xtuner2llava.verification.recomputed.weight import Weight

if TYPE_CHECKING:
    import torch

# Names of the streams of hidden states.
TRAINED = "trained"  # the weights of the checkpoint as they are
ROUNDED = "rounded"  # the same, rounded to the folder's dtype
NUDGED = "nudged"  # rounded, and every hidden state off by half a unit in the last place
FOLDER = "folder"

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
    """One of the two models; `rounding` says how its values are taken."""

    language: LanguageModel
    tower: Tower
    rounding: Rounding


@dataclass(slots=True)
class Figures:
    """What came out. `stages` are the largest differences of hidden states, in running order."""

    positions: int = 0
    columns: int = 0
    scale: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    distances: dict[str, Distance] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        return {
            "positions": self.positions,
            "vocabulary": self.columns,
            "largest_logit": self.scale,
            "hidden_state_differences": dict(self.stages),
            "distances": {name: d.to_dict() for name, d in self.distances.items()},
        }


def picture(config: Mapping[str, Json]) -> torch.Tensor:
    """A fixed picture of the size that a tower takes, (1, channels, pixels, pixels)."""
    import torch

    size = config.get("image_size", 224)
    edge = size if isinstance(size, int) else 224
    channels = config.get("num_channels", 3)
    steps = torch.linspace(0, 1, edge)
    waves = [
        1.5 * torch.sin(6.0 * (1 + c) * steps[:, None] + 11.0 * steps[None, :] * (2 + c))
        for c in range(channels if isinstance(channels, int) else 3)
    ]
    return torch.stack(waves)[None]


def prompt(rows: int) -> tuple[list[int], list[int]]:
    """Fixed token ids before and after the image, spread over a vocabulary of `rows`."""
    ids = [(17 + 7919 * n) % rows for n in range(_BEFORE + _AFTER)]
    return ids[:_BEFORE], ids[_BEFORE:]


def run_both(
    source: Side | None, folder: Side, rounds: bool, advance: Callable[[int], None]
) -> Figures:
    """Runs the folder, and the trained model unless `source` is None, on the picture and prompt.

    `rounds` says that the folder's dtype is not that of the checkpoint. `advance` is told the
    bytes of weights that were run.
    """
    return _Run(source, folder, rounds, advance).all()


class _Run:
    def __init__(
        self, source: Side | None, folder: Side, rounds: bool, advance: Callable[[int], None]
    ) -> None:
        self._source, self._folder, self._rounds = source, folder, rounds
        self._advance = advance
        self._figures = Figures()
        self._streams: dict[str, torch.Tensor] = {}
        self._normed: dict[str, torch.Tensor] = {}
        self._rows = min(
            side.language.weights[side.language.embedding].count for side in self._sides()
        )

    def _sides(self) -> list[Side]:
        return [side for side in (self._source, self._folder) if side is not None]

    def all(self) -> Figures:
        self._embed()
        for number in range(self._folder.language.count):
            self._layer(number)
        self._head()
        return self._figures

    def _names(self) -> list[tuple[str, Side, Rounding]]:
        """The first streams: name, whose weights, and how these are taken."""
        found: list[tuple[str, Side, Rounding]] = []
        if self._source is not None:
            if self._rounds:
                found.append((TRAINED, self._source, _as_is))
            found.append((ROUNDED, self._source, self._source.rounding))
        return [*found, (FOLDER, self._folder, _as_is)]

    def _embed(self) -> None:
        import torch

        before, after = prompt(self._rows)
        images: dict[str, torch.Tensor] = {}
        for name, side, rounding in self._names():
            images[name] = side.tower.features(picture(side.tower.config), rounding)
            embedded = side.language.embed([*before, *after], rounding)
            parts = [embedded[:, : len(before)], images[name], embedded[:, len(before) :]]
            self._streams[name] = torch.cat(parts, dim=1)
        if self._source is not None:
            self._streams[NUDGED] = _nudged(self._streams[ROUNDED])
        self._figures.positions = self._streams[FOLDER].shape[1]
        if self._source is not None:
            self._figures.stages["image features"] = _apart(images[ROUNDED], images[FOLDER])
        self._note("embeddings")

    def _note(self, stage: str) -> None:
        if self._source is not None:
            apart = _apart(self._streams[ROUNDED], self._streams[FOLDER])
            self._figures.stages[stage] = apart

    def _layer(self, number: int) -> None:
        """Runs one layer of both models; the wrong models branch off in the middle one."""
        if self._source is not None:
            source = self._source
            if self._rounds:
                self._run(number, source, _as_is, [TRAINED])
            self._streams[NUDGED] = _nudged(self._streams[NUDGED])
            self._run(number, source, source.rounding, [ROUNDED, NUDGED])
        wrong = [name for name in self._streams if name.startswith("wrong: ")]
        self._run(number, self._folder, _as_is, [*wrong, FOLDER])
        self._note(f"layer {number}")

    def _run(self, number: int, side: Side, rounding: Rounding, names: Sequence[str]) -> None:
        language = side.language
        tensors = language.layer(number, rounding)
        is_last = number == language.count - 1
        jobs = [(name, tensors, self._streams[name]) for name in names]
        if FOLDER in names and number == language.count // 2:
            start = self._streams[FOLDER]
            jobs += [(f"wrong: {t}", w, start) for t, w in wrong_layers(tensors).items()]
        results: dict[str, torch.Tensor] = {}
        for name, inner, hidden in jobs:
            if is_last:
                results[name], self._normed[name] = language.run_last(inner, hidden, rounding)
            else:
                (results[name],) = language.run(number, inner, [hidden])
        self._streams.update(results)
        self._advance(sum(tensor.nbytes for tensor in tensors.values()))

    def _head(self) -> None:
        """Logits in blocks of the vocabulary, and their distances."""
        wrong = [name for name in self._streams if name.startswith("wrong: ")]
        pairs = [(FOLDER, name) for name in wrong]
        if self._source is not None:
            pairs = [(ROUNDED, name) for name in (FOLDER, NUDGED, *wrong)]
            if self._rounds:
                pairs += [(TRAINED, FOLDER), (TRAINED, ROUNDED)]
        distances = Distances(pairs, self._figures.positions)
        heads: list[tuple[Side, Rounding, list[str]]] = [(self._folder, _as_is, [FOLDER, *wrong])]
        if self._source is not None:
            heads.append((self._source, self._source.rounding, [ROUNDED, NUDGED]))
            if self._rounds:
                heads.append((self._source, _as_is, [TRAINED]))
        weights = [side.language.weights[side.language.head] for side, _, _ in heads]
        columns = min(weight.count for weight in weights)
        step = max(1, _HEAD_ELEMENTS // max(1, weights[0].shape[1]))
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            block: dict[str, torch.Tensor] = {}
            for (_, rounding, names), weight in zip(heads, weights, strict=True):
                rows = _values(weight, start, stop, rounding)
                block |= {name: self._normed[name] @ rows.T for name in names}
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


def _as_is(weight: Weight) -> None:
    return None


def _values(weight: Weight, start: int, stop: int, rounding: Rounding) -> torch.Tensor:
    dtype = rounding(weight)
    value = weight.read(start, stop).value
    return (value if dtype is None else value.to(dtype)).float()


def _nudged(hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` with each value moved to the float32 next to it, up or down at random."""
    import torch

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
    return hidden * (1 + signs * 2.0**-23)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else float("nan")
