"""`Checkpoint`: a whole trained model, assembled from the artifact and the base models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xtuner2llava.errors import ConversionError, Fault, UnsupportedError
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER, Artifact
from xtuner2llava.sources.part import OpenPretrained, Part, PartAssembly
from xtuner2llava.storage.weights import Fingerprint
from xtuner2llava.training_config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The trained model as lazy tensors.

    `faults` must be fixed before it can be converted, such as a base model that is missing; those
    that are `pending` too are only weights that are not here yet. `before_training` says that this
    is a config and its base models, of which training will make one. `base_files` fingerprints
    what came from base models. `inexact`, which `notes` have too, are reasons why these weights
    are not quite those that were trained.
    """

    artifact: Artifact
    training_config: TrainingConfig | None
    llm: Part
    visual_encoder: Part
    projector: Part
    base_files: tuple[Fingerprint, ...]
    notes: tuple[str, ...]
    faults: tuple[Fault, ...]
    inexact: tuple[str, ...] = ()
    pending: tuple[Fault, ...] = ()
    before_training: bool = False


def assemble(
    artifact: Artifact,
    training_config: TrainingConfig | None,
    options: SourceOptions,
    open_pretrained: OpenPretrained,
    *,
    stream_base: bool = False,
    base_weights: bool = True,
    before_training: bool = False,
) -> Checkpoint:
    """The model that `artifact` and the base models make together; headers only are read.

    A part's config and tokenizer come from the folder that the user gave, else from the artifact's
    own, else from the base model that the XTuner config names. `stream_base` and `base_weights` are
    those of `open_checkpoint`; `before_training`, weights may be missing.
    """
    work = [
        PartAssembly(
            part,
            artifact,
            training_config,
            options,
            open_pretrained,
            stream_base=stream_base and part == LLM,
            base_weights=base_weights,
            before_training=before_training,
        )
        for part in (LLM, VISUAL_ENCODER)
    ]
    llm, tower = (each.assembled() for each in work)
    origin = "not trained yet" if before_training else "trained"
    faults = [fault for each in work for fault in each.faults]
    inexact: tuple[str, ...] = ()
    try:
        # Of an LLM that was trained in full, the weights do not depend on how its base was loaded.
        if training_config is not None and LLM not in artifact.weights:
            inexact = training_config.inexact
    except ConversionError as error:
        faults.extend(error.faults)
    faults.extend(_class_faults(training_config, artifact.config))
    notes = [*artifact.notes, *(note for each in work for note in each.notes), *inexact]
    return Checkpoint(
        artifact,
        training_config,
        llm,
        tower,
        Part(artifact.weights.get(PROJECTOR, {}), origin, trained=True),
        base_files=tuple(file for each in work for file in each.base_files),
        notes=tuple(dict.fromkeys(notes)),
        faults=tuple(dict.fromkeys(faults)),
        inexact=inexact,
        pending=tuple(fault for each in work for fault in each.pending),
        before_training=before_training,
    )


def _class_faults(used: TrainingConfig | None, own: tuple[str, str] | None) -> Iterator[Fault]:
    """Faults where another class than XTuner's LLaVAModel was trained.

    By the config in use, and by the artifact's own: another config does not change its class.
    """
    if used is None:
        return
    try:
        used.check_model()
    except ConversionError as error:
        yield from error.faults
    if own is None or own[1] == used.where:
        return
    try:
        TrainingConfig.from_text(*own).check_model()
    except UnsupportedError as error:
        yield from error.faults
    except ConversionError:
        pass  # It cannot be read; the config in use names the class.
