"""The verdict on logits, with the figures beside which it is to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import ConversionError, UnsupportedError
from xtuner2llava.planning.language_model import trained_llm_config
from xtuner2llava.sources import Checkpoint
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.logits.model import ClipTower, LayeredLLM
from xtuner2llava.verification.logits.streams import (
    FOLDER,
    NUDGED,
    ROUNDED,
    TRAINED,
    Figures,
    Run,
    Stream,
    fixed_input,
)
from xtuner2llava.verification.logits.values import Reading
from xtuner2llava.verification.outcome import FAILED, OK, SKIPPED, Check
from xtuner2llava.verification.plain_model import plain_config

if TYPE_CHECKING:
    from xtuner2llava.planning.plan import Plan

# How many times further than the noise of float32 the same function may be, computed otherwise.
# The noise is measured: the trained model against itself with every hidden state moved by half a
# unit in the last place, once a layer. A layer whose sums run in another order moves it by a few.
NOISE = 8
# A wrong model must be this much further away than what is let pass.
WRONG = 4
LOGITS = "logits against the trained model"
_OF_WRONG = "logits of a wrong model differ"


def logits_checks(
    out: ConvertedFolder,
    plan: Plan,
    trust_remote_code: bool,
    figures: dict[str, Json],
    advance: Callable[[int], None],
) -> Iterator[Check]:
    """Runs both models and compares their logits; `figures` gets the numbers."""
    folder = folder_model(out, plan.checkpoint)
    streams = [folder]
    try:
        source = _source_model(plan.checkpoint, trust_remote_code)
    except UnsupportedError as error:
        yield Check(LOGITS, SKIPPED, f"{error.faults[0]}; only the folder itself was run")
        result = Run(streams, fixed_input(folder), [(FOLDER, FOLDER)], advance).figures()
        figures["logits"] = result.to_dict()
        yield wrong_check(result, FOLDER, 0.0)
        return
    rounded = replace(source, name=ROUNDED, reading=Reading(plan.dtype))
    streams = [rounded, replace(rounded, name=NUDGED, nudged=True), folder]
    pairs = [(ROUNDED, FOLDER), (ROUNDED, NUDGED)]
    if any(planned.how != "copy" for planned in plan.tensors):
        streams = [source, *streams]
        pairs += [(TRAINED, FOLDER)]
    given = fixed_input(folder, source)
    result = Run(streams, given, pairs, advance, compared=(ROUNDED, FOLDER)).figures()
    figures["logits"] = result.to_dict()
    same_class = source.language.title == folder.language.title
    computed = any(planned.how == "compute" for planned in plan.tensors)
    allowed, why = tolerance(result, exact=same_class and not computed)
    found = result.distance(ROUNDED, FOLDER)
    detail = f"{found} over {result.positions} positions; {allowed:.2g} is allowed: {why}"
    far = result.distances.get(f"{TRAINED} - {FOLDER}")
    if far is not None:
        detail += f"; from {source.language.title} before rounding to {plan.dtype}: {far}"
    if found.largest <= allowed:
        yield Check(LOGITS, OK, detail)
    else:
        where = next((name for name, apart in result.stages.items() if not apart <= 0), "the head")
        yield Check(LOGITS, FAILED, f"{detail}; the first to differ is: {where}")
    yield wrong_check(result, ROUNDED, WRONG * allowed)


def tolerance(result: Figures, *, exact: bool) -> tuple[float, str]:
    """How far the logits may be from those of the equally rounded trained model, and why.

    Equal weights in equal modules give equal bits: then, `exact`, nothing is allowed.
    """
    if exact:
        return 0.0, "same weights, same class"
    return NOISE * result.distance(ROUNDED, NUDGED).largest, f"{NOISE} times the noise of float32"


def wrong_check(result: Figures, against: str, least: float, name: str = _OF_WRONG) -> Check:
    """The same figures for wrong models, without which a small difference proves nothing."""
    wrong = result.wrong(against)
    detail = "; ".join(f"{title} exchanged in one layer: {d}" for title, d in wrong.items())
    if any(distance.largest > least for distance in wrong.values()):
        return Check(name, OK, detail)
    return Check(name, FAILED, f"a wrong model is not further away than a right one: {detail}")


def _source_model(checkpoint: Checkpoint, trust: bool) -> Stream:
    """The trained model in its own architecture. Raises `UnsupportedError` if it cannot be run."""
    llm, training = checkpoint.llm, checkpoint.training_config
    assert llm.config is not None  # noqa: S101 - it was planned
    values = trained_llm_config(llm.config, training)
    config = _source_config(values, str(llm.config.path.parent), trust)
    remote = type(config).__module__.startswith("transformers_modules")
    language = LayeredLLM(config, llm.tensors, trust=remote)
    projector = {n.removeprefix("model."): t for n, t in checkpoint.projector.tensors.items()}
    layer = -2 if training is None else training.visual_select_layer
    tensors = checkpoint.visual_encoder.tensors
    tower = ClipTower(_vision_config(checkpoint), tensors, projector, layer)
    return Stream(TRAINED, language, tower)


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


def folder_model(out: ConvertedFolder, checkpoint: Checkpoint | None) -> Stream:
    """The folder as its own config has it. Raises `ConversionError` where it cannot be run.

    Without tensors or a config of its own, the tower is that of `checkpoint`.
    """
    layer = out.config.get(
        "mm_vision_select_layer" if out.format == "llava" else "vision_feature_layer"
    )
    if not isinstance(layer, int):
        raise ConversionError(f"the selected layer is {layer!r}", where="config.json")
    tower: Mapping[str, LazyTensor] = out.part(VISUAL_ENCODER)
    vision = out.vision or {}
    if checkpoint is not None:
        tower = tower or checkpoint.visual_encoder.tensors
        vision = vision or _vision_config(checkpoint)
    language = LayeredLLM(plain_config(out.text), out.part(LLM))
    return Stream(FOLDER, language, ClipTower(vision, tower, out.part(PROJECTOR), layer))
