"""`verify --logits`: the folder against the trained model, run in its own architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import ConversionError, UnsupportedError
from xtuner2llava.planning.language_model import trained_llm_config
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.logits.comparison import (
    FOLDER,
    NOISE,
    NUDGED,
    ROUNDED,
    TRAINED,
    Comparison,
    fixed_input,
)
from xtuner2llava.verification.logits.streamed import (
    Model,
    StreamedLanguageModel,
    Weights,
    parameters_on_meta,
    rounded,
)
from xtuner2llava.verification.outcome import FAILED, LOGITS, OK, SKIPPED, Check
from xtuner2llava.verification.plain_model import new_language_model, plain_config

if TYPE_CHECKING:
    from xtuner2llava.planning.plan import Plan

# How stored weights are read: rounded, or moved.
Read = Callable[[Weights], Weights]

_OF_WRONG = "logits of a wrong model differ"


def as_stored(weights: Weights) -> Weights:
    return weights


def logits_checks(
    out: ConvertedFolder,
    plan: Plan,
    trust_remote_code: bool,
    figures: dict[str, Json],
    advance: Callable[[int], None],
) -> Iterator[Check]:
    """Runs both models and compares their logits; `figures` gets the numbers."""
    # The trained tower's config: the folder's may say anything.
    folder, vision = folder_model(out, plan.checkpoint), _vision_config(plan.checkpoint)
    source = partial(_source_model, plan.checkpoint, trust_remote_code)
    try:
        trained = source(partial(rounded, dtype=plan.dtype))
    except UnsupportedError as error:
        yield Check(LOGITS, SKIPPED, f"{error.faults[0]}; only the folder itself was run")
        comparison = Comparison(fixed_input(vision, folder), advance)
        comparison.add(FOLDER, folder)
        comparison.compare([(FOLDER, FOLDER)])
        figures["logits"] = comparison.to_dict()
        yield comparison.wrong_check(FOLDER, 0.0, _OF_WRONG)
        return
    kinds = {planned.how for planned in plan.tensors}
    pairs = [(ROUNDED, FOLDER), (ROUNDED, NUDGED)]
    comparison = Comparison(fixed_input(vision, folder, trained), advance)
    if kinds != {"copy"}:
        comparison.add(TRAINED, source(as_stored))
        pairs.append((TRAINED, FOLDER))
    comparison.add(ROUNDED, trained, NUDGED)
    comparison.add(FOLDER, folder)
    comparison.compare(pairs)
    figures["logits"] = comparison.to_dict()
    found = comparison.distances[ROUNDED, FOLDER]
    # Equal weights in equal modules give equal bits.
    exact = trained.language.title == folder.language.title and "compute" not in kinds
    allowed = 0.0 if exact else NOISE * comparison.distances[ROUNDED, NUDGED].largest
    why = "same weights, same class" if exact else f"{NOISE} times the noise of float32"
    detail = f"{found} over {comparison.positions} positions; {allowed:.2g} is allowed: {why}"
    if (far := comparison.distances.get((TRAINED, FOLDER))) is not None:
        detail += f"; from {trained.language.title} before rounding to {plan.dtype}: {far}"
    if found.largest <= allowed:
        yield Check(LOGITS, OK, detail)
    else:
        where = next(
            (name for name, apart in comparison.stages.items() if not apart <= 0), "the head"
        )
        yield Check(LOGITS, FAILED, f"{detail}; the first to differ is: {where}")
    yield comparison.wrong_check(ROUNDED, allowed, _OF_WRONG)


def folder_model(
    out: ConvertedFolder, checkpoint: Checkpoint | None, read: Read = as_stored
) -> Model:
    """The folder as its own config has it. Raises `ConversionError` where it cannot be run.

    Without tensors or a config of its own, the tower is that of `checkpoint`.
    """
    key = "mm_vision_select_layer" if out.format == "llava" else "vision_feature_layer"
    layer = out.config.get(key)
    if not isinstance(layer, int):
        raise ConversionError(f"the selected layer is {layer!r}", where="config.json")
    tower: Weights = out.part(VISUAL_ENCODER)
    vision = out.vision or {}
    if checkpoint is not None:
        tower = tower or checkpoint.visual_encoder.tensors
        vision = vision or _vision_config(checkpoint)
    with parameters_on_meta():
        model = new_language_model(plain_config(out.text))
    return Model(
        StreamedLanguageModel(model, read(out.part(LLM))),
        vision,
        read(tower),
        read(out.part(PROJECTOR)),
        layer,
    )


def _source_model(checkpoint: Checkpoint, trust: bool, read: Read) -> Model:
    """The trained model in its own architecture. Raises `UnsupportedError` if it cannot be run."""
    llm, training = checkpoint.llm, checkpoint.training_config
    assert llm.config is not None  # noqa: S101 - it was planned
    values = trained_llm_config(llm.config, training)
    if values.get("model_type") == "gemma" and values.get("hidden_act") == "gelu":
        # The first configs of Gemma mean this (transformers, pull request 29402); 4.57 takes them
        # at their word.
        values |= dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
    config = _source_config(values, str(llm.config.path.parent), trust)
    remote = type(config).__module__.startswith("transformers_modules")
    with parameters_on_meta():
        options = {"trust_remote_code": True} if remote else {}
        model = new_language_model(config, UnsupportedError, **options)
    projector = {n.removeprefix("model."): t for n, t in checkpoint.projector.tensors.items()}
    layer = -2 if training is None else training.visual_select_layer
    return Model(
        StreamedLanguageModel(model, read(llm.tensors)),
        _vision_config(checkpoint),
        read(checkpoint.visual_encoder.tensors),
        read(projector),
        layer,
    )


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
