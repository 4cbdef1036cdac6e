"""`open_checkpoint`: a whole trained model, assembled from an artifact and base models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from os import fspath
from pathlib import Path

from xtuner2llava.errors import (
    CheckpointError,
    ConversionError,
    Fault,
    UnsupportedError,
    UsageError,
)
from xtuner2llava.options import PathOrText, SourceOptions
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER, Artifact
from xtuner2llava.sources.opening import open_artifact
from xtuner2llava.sources.part import Assembly, Part
from xtuner2llava.sources.zero_directory import MASTER
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.training_config.config import TrainingConfig
from xtuner2llava.training_config.datasets import TrainingData

_log = logging.getLogger(__name__)
_SHOWN = 8


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

    @property
    def parts(self) -> dict[str, Part]:
        return {LLM: self.llm, VISUAL_ENCODER: self.visual_encoder, PROJECTOR: self.projector}

    @property
    def training_data(self) -> TrainingData:
        """How the training fed the model, as far as a config says it."""
        return TrainingData() if self.training_config is None else self.training_config.data


def open_checkpoint(
    checkpoint: PathOrText,
    options: SourceOptions | None = None,
    *,
    stream_base: bool = False,
    base_weights: bool = True,
) -> Checkpoint:
    """The trained model at the path or Hub repo id `checkpoint`; reads headers only.

    With `stream_base`, the base LLM's weights are read from the Hub as they are needed, and not
    stored; without `base_weights`, those of base models are not downloaded. Raises
    `CheckpointError` for what cannot be opened, and says what it is. What is missing beside it is
    in `faults`.
    """
    options = options or SourceOptions()
    reference = fspath(checkpoint)
    try:
        artifact = open_artifact(reference, options.weights)
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise CheckpointError(what, where=reference[:200]) from error
    training_config = None
    if options.xtuner_config is not None:
        training_config = TrainingConfig.from_file(Path(options.xtuner_config))
    elif artifact.config is not None:
        training_config = TrainingConfig.from_text(*artifact.config)
    return _assembled(Assembly(artifact, training_config, options, stream_base, base_weights))


def open_training(path: PathOrText, options: SourceOptions | None = None) -> Checkpoint:
    """The XTuner config at `path` and its base models, as the model that a training will make.

    Its projector has no tensors yet, and weights of base models may be missing. Raises
    `CheckpointError` for what is not a config.
    """
    options = options or SourceOptions()
    if options.xtuner_config is not None:
        what = f"is for a checkpoint, and {fspath(path)} is a config itself"
        raise UsageError(what, where="--xtuner-config")
    training_config = TrainingConfig.from_file(path)
    artifact = Artifact(Path(path), "XTuner config, before training", {}, ())
    return _assembled(
        Assembly(artifact, training_config, options, base_weights=False, before_training=True)
    )


def _assembled(work: Assembly) -> Checkpoint:
    """The model that the artifact and the base models make together.

    A part's config and tokenizer come from the folder that the user gave, else from the artifact's
    own, else from the base model that the XTuner config names.
    """
    artifact = work.artifact
    llm, tower = (work.part(part) for part in (LLM, VISUAL_ENCODER))
    origin = "not trained yet" if work.before_training else "trained"
    inexact: tuple[str, ...] = ()
    try:
        # Of an LLM that was trained in full, the weights do not depend on how its base was loaded.
        if LLM not in artifact.weights:
            inexact = work.config.inexact
    except ConversionError as error:
        work.faults.extend(error.faults)
    if work.options.weights != MASTER and not artifact.layout.startswith("DeepSpeed"):
        work.notes.append("--weights has no effect: the checkpoint is not a DeepSpeed directory.")
    recorded = _recorded(work.training_config, artifact.config)
    work.faults.extend(_class_faults(work.training_config, recorded))
    if work.training_config is not None and recorded is not None:
        work.notes.extend(_differences(work.training_config, recorded))
    opened = Checkpoint(
        artifact,
        work.training_config,
        llm,
        tower,
        Part(artifact.weights.get(PROJECTOR, {}), origin, trained=True),
        base_files=tuple(work.base_files),
        notes=tuple(dict.fromkeys((*artifact.notes, *work.notes, *inexact))),
        faults=tuple(dict.fromkeys(work.faults)),
        inexact=inexact,
        pending=tuple(work.pending),
        before_training=work.before_training,
    )
    _log_sources(opened)
    return opened


def _log_sources(opened: Checkpoint) -> None:
    artifact, config = opened.artifact, opened.training_config
    _log.debug("checkpoint: %s: %s", artifact.path, artifact.layout)
    if config is not None:
        _log.debug("XTuner config: %s", config.where)
    for file in (*artifact.files, *opened.base_files):
        _log.debug("weights: %s, %d bytes", file.name, file.size)
    for title, part in (("LLM", opened.llm), ("vision tower", opened.visual_encoder)):
        _log.debug("%s: %s; config and small files from %s", title, part.origin, part.folder)


def _recorded(used: TrainingConfig | None, own: tuple[str, str] | None) -> TrainingConfig | None:
    """The artifact's own config beside the one that the user gave; None if it cannot be read."""
    if used is None or own is None or own[1] == used.where:
        return None
    with suppress(ConversionError):
        return TrainingConfig.from_text(*own)
    return None


def _class_faults(used: TrainingConfig | None, recorded: TrainingConfig | None) -> Iterator[Fault]:
    """Faults where another class than XTuner's LLaVAModel was trained.

    By the config in use, and by the artifact's own: another config does not change its class.
    """
    if used is None:
        return
    try:
        used.check_model()
    except ConversionError as error:
        yield from error.faults
    try:
        if recorded is not None:
            recorded.check_model()
    except UnsupportedError as error:
        yield from error.faults
    except ConversionError:
        pass  # It cannot be read; the config in use names the class.


def _differences(used: TrainingConfig, recorded: TrainingConfig) -> Iterator[str]:
    """A note where the config that the user gave is not that of the artifact's training.

    Where models and data lie may differ.
    """
    ours, theirs = used.decisive, recorded.decisive
    listed = [
        f"{key} is {ours.get(key, 'not set')} here and {theirs.get(key, 'not set')} there"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if listed:
        more = [f"and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
        yield (
            f"{used.where} is used, and {recorded.where} records other settings: "
            f"{', '.join([*listed[:_SHOWN], *more])}. Without --xtuner-config, the latter counts."
        )
