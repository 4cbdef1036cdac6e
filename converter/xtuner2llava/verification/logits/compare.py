"""The verdict on logits, with the figures beside which it is to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xtuner2llava.errors import ConversionError, UnsupportedError
from xtuner2llava.planning.llm_config import trained_llm_config
from xtuner2llava.planning.plan import Plan
from xtuner2llava.sources import Checkpoint
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.verification.against import folder_tensors
from xtuner2llava.verification.layout import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.verification.logits.model import LanguageModel, Tower
from xtuner2llava.verification.logits.streams import (
    FOLDER,
    NUDGED,
    ROUNDED,
    TRAINED,
    Figures,
    Side,
    Stream,
    fixed_prompt,
    run,
)
from xtuner2llava.verification.logits.values import Reading
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import FAILED, OK, SKIPPED, Check
from xtuner2llava.verification.plain_model import plain_config

# How many times further than the noise of float32 the same function may be, computed otherwise.
# The noise is measured: the trained model against itself with every hidden state moved by half a
# unit in the last place, once a layer. A layer whose sums run in another order moves it by a few.
NOISE = 8
# A wrong model must be this much further away than what is let pass.
WRONG = 4
LOGITS = "logits against the trained model"
_SHOWN = "logits of a wrong model differ"


def logits_checks(
    out: OutFolder,
    plan: Plan,
    *,
    trust_remote_code: bool,
    figures: dict[str, Json],
    advance: Callable[[int], None],
) -> Iterator[Check]:
    """Runs both models and compares their logits; `figures` gets the numbers."""
    folder = folder_side(out, plan.checkpoint)
    streams = [Stream(FOLDER, folder)]
    try:
        source = _source_side(plan.checkpoint, trust_remote_code)
    except UnsupportedError as error:
        yield Check(LOGITS, SKIPPED, f"{error.faults[0]}; only the folder itself was run")
        result = run(streams, fixed_prompt(folder), [(FOLDER, FOLDER)], advance)
        figures["logits"] = result.to_dict()
        yield wrong_check(result, FOLDER, 0.0)
        return
    rounded = Reading(plan.dtype)
    streams = [Stream(ROUNDED, source, rounded), Stream(NUDGED, source, rounded, True), *streams]
    pairs = [(ROUNDED, FOLDER), (ROUNDED, NUDGED)]
    if any(planned.how != "copy" for planned in plan.tensors):
        streams = [Stream(TRAINED, source), *streams]
        pairs += [(TRAINED, FOLDER)]
    prompt = fixed_prompt(folder, source)
    result = run(streams, prompt, pairs, advance, compared=(ROUNDED, FOLDER))
    figures["logits"] = result.to_dict()
    same_class = source.language.title == folder.language.title
    computed = any(planned.how == "compute" for planned in plan.tensors)
    allowed, why = tolerance(result, exact=same_class and not computed)
    yield _verdict(result, allowed, why, f"{source.language.title} before rounding to {plan.dtype}")
    yield wrong_check(result, ROUNDED, WRONG * allowed)


def _verdict(result: Figures, allowed: float, why: str, unrounded: str) -> Check:
    found = result.distance(ROUNDED, FOLDER)
    said = f"{found} over {result.positions} positions; {allowed:.2g} is allowed: {why}"
    far = result.distances.get(f"{TRAINED} - {FOLDER}")
    if far is not None:
        said += f"; from {unrounded}: {far}"
    if found.largest <= allowed:
        return Check(LOGITS, OK, said)
    where = next((stage for stage, apart in result.stages.items() if not apart <= 0), "the head")
    return Check(LOGITS, FAILED, f"{said}; the first to differ is: {where}")


def tolerance(result: Figures, *, exact: bool) -> tuple[float, str]:
    """How far the logits may be from those of the equally rounded trained model, and why.

    Equal weights in equal modules give equal bits: then, `exact`, nothing is allowed.
    """
    if exact:
        return 0.0, "same weights, same class"
    return NOISE * result.distance(ROUNDED, NUDGED).largest, f"{NOISE} times the noise of float32"


def wrong_check(result: Figures, against: str, least: float, name: str = _SHOWN) -> Check:
    """The same figures for wrong models, without which a small difference says nothing."""
    wrong = result.wrong(against)
    said = "; ".join(f"{title} exchanged in one layer: {d}" for title, d in wrong.items())
    if any(distance.largest > least for distance in wrong.values()):
        return Check(name, OK, said)
    return Check(name, FAILED, f"this check cannot tell right from wrong here: {said}")


def _source_side(checkpoint: Checkpoint, trust: bool) -> Side:
    """The trained model in its own architecture. Raises `UnsupportedError` if it cannot be run."""
    llm, training_config = checkpoint.llm, checkpoint.training_config
    assert llm.config is not None  # noqa: S101 - it was planned
    values = trained_llm_config(llm.config, training_config)
    config = _source_config(values, str(llm.config.path.parent), trust)
    remote = type(config).__module__.startswith("transformers_modules")
    language = LanguageModel(config, llm.tensors, trust=remote)
    projector = {n.removeprefix("model."): t for n, t in checkpoint.projector.tensors.items()}
    layer = -2 if training_config is None else training_config.visual_select_layer
    tensors = checkpoint.visual_encoder.tensors
    return Side(language, Tower(_vision_config(checkpoint), tensors, projector, layer))


def _vision_config(checkpoint: Checkpoint) -> Mapping[str, Json]:
    config = checkpoint.visual_encoder.config
    assert config is not None  # noqa: S101 - it was planned
    return config.values


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


def folder_side(out: OutFolder, checkpoint: Checkpoint | None) -> Side:
    """The folder as its own config has it. Raises `ConversionError` where it cannot be run.

    Without tensors or a config of its own, the tower is that of `checkpoint`.
    """
    parts: dict[str, dict[str, LazyTensor]] = {LLM: {}, VISUAL_ENCODER: {}, PROJECTOR: {}}
    for name, tensor in folder_tensors(out).items():
        place = out.layout.place(name)
        if place is not None:
            parts[place[0]][place[1]] = tensor
    layer = out.layout.select_layer
    if not isinstance(layer, int):
        raise ConversionError(f"the selected layer is {layer!r}", where="config.json")
    tower: Mapping[str, LazyTensor] = parts[VISUAL_ENCODER]
    vision = out.layout.vision or {}
    if checkpoint is not None:
        tower = tower or checkpoint.visual_encoder.tensors
        vision = vision or _vision_config(checkpoint)
    language = LanguageModel(plain_config(out.layout.text), parts[LLM])
    return Side(language, Tower(vision, tower, parts[PROJECTOR], layer))
