"""The verdict on logits, with the figures beside which it is to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import ConversionError, UnsupportedError
from xtuner2llava.sources.json_file import Json
from xtuner2llava.verification.layout import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.verification.logits.model import LanguageModel, Tower
from xtuner2llava.verification.logits.streams import (
    FOLDER,
    NUDGED,
    ROUNDED,
    TRAINED,
    Figures,
    Side,
    run_both,
)
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import FAILED, OK, SKIPPED, Check
from xtuner2llava.verification.plain_model import plain_config
from xtuner2llava.verification.recomputed import Comparison, Expected, out_tensors
from xtuner2llava.verification.recomputed.weight import Weight, of_file

if TYPE_CHECKING:
    pass

# How many times further than the noise of float32 the same function may be, computed otherwise.
# The noise is measured: the trained model against itself with every hidden state moved by half a
# unit in the last place, once a layer. A layer whose sums run in another order moves it by a few.
_NOISE = 8
# Merges in float32 and in float64 round a few elements in ten thousand to different neighbours;
# they may not matter more than this part of what rounding all of them does.
_PART_OF_ROUNDING = 0.25
# A wrong model must be this much further away than what is let pass.
_WRONG = 4
_NAME = "logits against the trained model"
_SHOWN = "logits of a wrong model differ"


def logits_checks(
    out: OutFolder,
    expected: Expected,
    comparison: Comparison,
    *,
    trust_remote_code: bool,
    figures: dict[str, Json],
    advance: Callable[[int], None],
) -> Iterator[Check]:
    """Runs both models and compares their logits; `figures` gets the numbers."""
    folder = _folder_side(out, expected)
    source: Side | None = None
    try:
        source = _source_side(expected, trust_remote_code)
    except UnsupportedError as error:
        yield Check(_NAME, SKIPPED, f"{error.faults[0]}; only the folder itself was run")
    result = run_both(source, folder, _rounds(expected), advance)
    figures["logits"] = result.to_dict()
    if source is not None:
        same_class = source.language.title == folder.language.title
        allowed, why = tolerance(result, comparison, same_class)
        title = source.language.title
        yield _verdict(result, allowed, why, f"{title} before rounding to {expected.dtype}")
        yield _wrong(result, ROUNDED, _WRONG * allowed)
    else:
        yield _wrong(result, FOLDER, 0.0)


def _verdict(result: Figures, allowed: float, why: str, unrounded: str) -> Check:
    found = result.distances[f"{ROUNDED} - {FOLDER}"]
    said = f"{found} over {result.positions} positions; {allowed:.2g} is allowed: {why}"
    far = result.distances.get(f"{TRAINED} - {FOLDER}")
    if far is not None:
        said += f"; from {unrounded}: {far}"
    if found.largest <= allowed:
        return Check(_NAME, OK, said)
    where = next((stage for stage, apart in result.stages.items() if not apart <= 0), "the head")
    return Check(_NAME, FAILED, f"{said}; the first to differ is: {where}")


def tolerance(result: Figures, comparison: Comparison, same_class: bool) -> tuple[float, str]:
    """How far the logits may be from those of the equally rounded trained model, and why.

    Equal weights in equal modules give equal bits: then nothing is allowed.
    """
    if comparison.is_exact and same_class:
        return 0.0, "same weights, same class"
    noise = _NOISE * result.distances[f"{ROUNDED} - {NUDGED}"].largest
    rounding = result.distances.get(f"{TRAINED} - {ROUNDED}")
    if comparison.off and rounding is not None and _PART_OF_ROUNDING * rounding.largest > noise:
        part = f"{_PART_OF_ROUNDING:.0%} of what the rounding changes"
        return _PART_OF_ROUNDING * rounding.largest, part
    return noise, f"{_NOISE} times the noise of float32"


def _wrong(result: Figures, against: str, least: float) -> Check:
    """The same figures for wrong models, without which a small difference says nothing."""
    prefix = f"{against} - wrong: "
    wrong = {n.removeprefix(prefix): d for n, d in result.distances.items() if n.startswith(prefix)}
    said = "; ".join(f"{title} exchanged in one layer: {d}" for title, d in wrong.items())
    if any(distance.largest > least for distance in wrong.values()):
        return Check(_SHOWN, OK, said)
    return Check(_SHOWN, FAILED, f"this check cannot tell right from wrong here: {said}")


def _rounds(expected: Expected) -> bool:
    """Whether any tensor has another dtype in the folder than in the checkpoint."""
    return any(
        expected.dtype_of(weight) != weight.dtype or weight.computed
        for weight in expected.weights.values()
    )


def _source_side(expected: Expected, trust: bool) -> Side:
    """The trained model in its own architecture. Raises `UnsupportedError` if it cannot be run."""
    trained = expected.trained
    config = _source_config(trained.llm_config(), str(trained.folders[LLM]), trust)
    remote = type(config).__module__.startswith("transformers_modules")
    language = LanguageModel(config, trained.weights[LLM], trust=remote)
    projector = {n.removeprefix("model."): w for n, w in trained.weights[PROJECTOR].items()}
    vision = trained.vision_config()
    tower = Tower(vision, trained.weights[VISUAL_ENCODER], projector, trained.select_layer)
    return Side(language, tower, expected.dtype_of)


def _source_config(values: dict[str, Json], folder: str, trust: bool) -> Any:
    try:
        return plain_config(values)
    except UnsupportedError:
        remote = values.get("auto_map")
        if not isinstance(remote, dict) or "AutoModelForCausalLM" not in remote:
            raise
    if not trust:
        named = values.get("architectures")
        raise UnsupportedError(
            f"{named} is code beside the base model, and --trust-remote-code was not given"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:
        raise UnsupportedError(f"its config: {type(error).__name__}: {error}") from error
    for key, value in values.items():
        if hasattr(config, key) and key not in ("auto_map", "architectures", "model_type"):
            setattr(config, key, value)
    return config


def _folder_side(out: OutFolder, expected: Expected) -> Side:
    """The folder as its own config has it. Raises `ConversionError` where it cannot be run."""
    parts: dict[str, dict[str, Weight]] = {LLM: {}, VISUAL_ENCODER: {}, PROJECTOR: {}}
    for (part, name), tensor in out_tensors(out).items():
        parts[part][name] = of_file(tensor)
    # Without tensors of its own, the folder gets the tower that `mm_vision_tower` names.
    tower: Mapping[str, Weight] = parts[VISUAL_ENCODER] or expected.trained.weights[VISUAL_ENCODER]
    layer = out.layout.select_layer
    if not isinstance(layer, int):
        raise ConversionError(f"the selected layer is {layer!r}", where="config.json")
    vision = out.layout.vision or expected.trained.vision_config()
    language = LanguageModel(plain_config(out.layout.text), parts[LLM])
    return Side(language, Tower(vision, tower, parts[PROJECTOR], layer), lambda weight: None)
