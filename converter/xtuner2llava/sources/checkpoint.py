"""`Checkpoint`: a whole trained model, its parts gathered from the artefact and the base models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, UnsupportedError
from xtuner2llava.options import SourceOptions
from xtuner2llava.recipe import Recipe
from xtuner2llava.sources.adapter import (
    Adapter,
    LoraSettings,
    is_adapted,
    merge,
    read_adapter,
)
from xtuner2llava.sources.base_model import (
    FLAGS,
    TITLES,
    find_base,
    is_remote,
    open_base,
    open_streamed,
    read_config,
)
from xtuner2llava.sources.contents import LLM, PROJECTOR, VISUAL_ENCODER, Contents
from xtuner2llava.sources.model_config import ModelConfig
from xtuner2llava.sources.weights import Fingerprint, find_weights
from xtuner2llava.tensors import LazyTensor


@dataclass(frozen=True, slots=True)
class Part:
    """One of the three parts of the trained model.

    `origin` says where its tensors come from; `folder` holds its tokenizer or image processor;
    `name` is what the XTuner config calls its base model. Without tensors, it is not to be had.
    """

    tensors: Mapping[str, LazyTensor]
    origin: str
    trained: bool
    config: ModelConfig | None = None
    folder: Path | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The trained model as lazy tensors.

    `faults` are what must be mended before it can be converted, such as a base model that is not
    there; those that are `pending` too a conversion mends by a download. `base_files` fingerprints
    what came from base models. `inexact`, which `notes` have too, are reasons why these weights are
    not quite those that were trained.
    """

    contents: Contents
    recipe: Recipe | None
    llm: Part
    visual_encoder: Part
    projector: Part
    base_files: tuple[Fingerprint, ...]
    notes: tuple[str, ...]
    faults: tuple[Fault, ...]
    inexact: tuple[str, ...] = ()
    pending: tuple[Fault, ...] = ()


# Opens the artefact that a run started from, if it is here; None if it is not.
OpenPretrained = Callable[[str], Contents | None]


def gather(
    contents: Contents,
    recipe: Recipe | None,
    options: SourceOptions,
    open_pretrained: OpenPretrained,
    *,
    stream_base: bool = False,
    base_weights: bool = True,
) -> Checkpoint:
    """The model that `contents` and the base models make together; headers only are read.

    A part's config and tokenizer come from the folder that the user gave, else from the artefact's
    own, else from the base model that the XTuner config names. `stream_base` and `base_weights` are
    those of `open_checkpoint`.
    """
    work = _Gathering(contents, recipe, options, open_pretrained, stream_base, base_weights)
    llm, tower = work.part(LLM), work.part(VISUAL_ENCODER)
    projector = Part(contents.weights[PROJECTOR], "trained", trained=True)
    inexact = work.inexact()
    work.check_model()
    return Checkpoint(
        contents,
        recipe,
        llm,
        tower,
        projector,
        tuple(work.base_files),
        tuple(dict.fromkeys((*contents.notes, *work.notes, *inexact))),
        tuple(dict.fromkeys(work.faults)),
        inexact,
        tuple(work.pending),
    )


class _NotDownloadedError(UnsupportedError):
    pass


class _Gathering:
    """The work of `gather`, with what it collects on the way."""

    def __init__(
        self,
        contents: Contents,
        recipe: Recipe | None,
        options: SourceOptions,
        open_pretrained: OpenPretrained,
        stream_base: bool,
        base_weights: bool,
    ) -> None:
        self._contents, self._recipe, self._options = contents, recipe, options
        self._stream, self._base_weights = stream_base, base_weights
        self._open_pretrained = open_pretrained
        self.base_files: list[Fingerprint] = []
        self.notes: list[str] = []
        self.faults: list[Fault] = []
        self.pending: list[Fault] = []

    def part(self, part: str) -> Part:
        """The part, whole, from the artefact where it was trained, else from its base model.

        What is wrong with it is collected in `faults`, so that both parts are looked at.
        """
        recorded: str | None = None
        try:
            recorded = self._recorded(part)
            return self._part(part, recorded)
        except (ConversionError, OSError) as error:
            self.faults.extend(
                error.faults
                if isinstance(error, ConversionError)
                else [Fault(FLAGS[part], f"cannot be looked at ({error.strerror})")]
            )
            trained = part in self._contents.weights or part in self._contents.adapters
            return Part({}, "not available", trained, name=recorded)

    def _part(self, part: str, recorded: str | None) -> Part:
        contents = self._contents
        given = self._options.base(part)
        own = contents.folders.get(part)
        full = contents.weights.get(part)
        if full is not None and own is not None and given is None:
            return Part(full, "trained", True, read_config(part, own), own, recorded)
        streamed = part == LLM and self._stream and is_remote(given, recorded)
        needs_weights = full is None and self._base_weights and not streamed
        folder = find_base(part, given, recorded, contents.path, weights=needs_weights)
        result = Part({}, "trained", True, read_config(part, folder), folder, recorded or given)
        if full is not None:
            return replace(result, tensors=full)
        adapted = is_adapted(contents.adapters.get(part, {}))
        name = recorded or given or folder.name
        try:
            base, origin = self._base_tensors(part, folder, name, adapted=adapted)
        except _NotDownloadedError as error:
            self.faults.extend(error.faults)
            self.pending.extend(error.faults)
            trained = part in contents.adapters
            return replace(result, origin="not downloaded", trained=trained)
        if part not in contents.adapters:
            return replace(result, tensors=base, origin=origin, trained=False)
        adapter, what = self._adapter(part)
        merged = merge(base, adapter, f"{contents.path}, {TITLES[part]}")
        return replace(result, tensors=merged, origin=f"{what} on {origin}")

    def check_model(self) -> None:
        """Whether XTuner's own LLaVAModel was trained, by the config in use and by the artefact's
        own: another config does not make another class of it."""
        recipe, own = self._recipe, self._contents.config
        try:
            if recipe is not None:
                recipe.check_model()
        except ConversionError as error:
            self.faults.extend(error.faults)
        try:
            if recipe is not None and own is not None and own[1] != recipe.where:
                Recipe.from_text(*own).check_model()
        except UnsupportedError as error:
            self.faults.extend(error.faults)
        except ConversionError:
            pass  # It cannot be read; the config in use says which class it is.

    def inexact(self) -> tuple[str, ...]:
        """Why the LLM is near to the trained one, and not the same."""
        if self._recipe is None or LLM in self._contents.weights:
            return ()
        try:
            return self._recipe.inexact
        except ConversionError as error:
            self.faults.extend(error.faults)
            return ()

    def _recorded(self, part: str) -> str | None:
        """What the XTuner config names; it need not be known where the user gives a base model."""
        if self._recipe is None:
            return None
        try:
            return self._recipe.llm_path if part == LLM else self._recipe.vision_path
        except ConversionError:
            if self._options.base(part) is None:
                raise
            return None

    def _started_from(self) -> str | None:
        """`pretrained_pth`; where only running code would tell, a note says so."""
        if self._recipe is None:
            return None
        try:
            return self._recipe.pretrained_pth
        except ConversionError as error:
            fault = error.faults[0]
            self.notes.append(
                f"{fault.where}: {fault.what}. If the run started from a checkpoint with a trained "
                "LLM or vision tower, give a folder with its weights as --llm or --vision."
            )
            return None

    def _base_tensors(
        self, part: str, folder: Path, name: str, *, adapted: bool
    ) -> tuple[Mapping[str, LazyTensor], str]:
        """What the part was before this run, and where from.

        Not always the base model: the run may have started from an earlier stage's checkpoint
        (`pretrained_pth`) that had trained the part. XTuner loads that after it has put LoRA
        layers in, and not strictly: the names of an adapted part then match none of its full
        weights, which are silently left out (xtuner/model/llava.py, `__init__`).
        """
        started = self._started_from()
        if started is not None:
            earlier = self._open_pretrained(started)
            if earlier is not None and part in earlier.weights and adapted:
                self.notes.append(
                    f"The run started from '{started}', which holds a trained {TITLES[part]}. "
                    "XTuner does not load that under LoRA, so the adapter was trained on the base "
                    "model's weights, and these are used."
                )
            elif earlier is not None and part in earlier.weights:
                self.base_files.extend(earlier.files)
                return earlier.weights[part], f"pretrained_pth {Path(started).name}"
            elif earlier is None and not adapted:
                self.notes.append(
                    f"The run started from '{started}', which cannot be read here. If that trained "
                    f"the {TITLES[part]}, give {FLAGS[part]} a folder with its weights: the base "
                    f"model's are used."
                )
        given, recorded = self._options.base(part), self._recorded(part)
        if part == LLM and self._stream and is_remote(given, recorded):
            opened = open_streamed(part, given, recorded, folder)
        elif self._base_weights or not is_remote(given, recorded) or find_weights(folder):
            opened = open_base(part, folder)
        else:
            raise _NotDownloadedError(
                f"the weights of the base {TITLES[part]} are not in the local cache yet",
                where=name,
                advice="A conversion downloads them.",
            )
        self.base_files.extend(opened.files)
        return opened.tensors, f"base {Path(name).name if Path(name).is_dir() else name}"

    def _adapter(self, part: str) -> tuple[Adapter, str]:
        """The part's adapter with its settings, and what to call it."""
        tensors = self._contents.adapters[part]
        alpha = self._options.alpha(part)
        settings = self._contents.settings.get(part) or self._settings_of_recipe(part, alpha)
        if alpha is not None:
            settings = (
                replace(settings, alpha=alpha, alpha_pattern={})
                if settings is not None
                else LoraSettings("the command line", alpha)
            )
        adapter = read_adapter(tensors, settings, f"{self._contents.path}, {TITLES[part]}")
        if not adapter.factors:
            return adapter, "saved biases"
        ranks = ", ".join(str(rank) for rank in adapter.ranks)
        known = settings.alpha if settings is not None else None
        return adapter, f"LoRA (rank {ranks}, alpha {'unknown' if known is None else f'{known:g}'})"

    def _settings_of_recipe(self, part: str, alpha: float | None) -> LoraSettings | None:
        """What the XTuner config says; its alpha is not asked for where the user gave one."""
        if self._recipe is None:
            return None
        lora = self._recipe.llm_lora if part == LLM else self._recipe.visual_encoder_lora
        if lora is None:
            return None
        values: dict[str, object] = {
            **lora.other,
            "lora_alpha": lora.lora_alpha if alpha is None else alpha,
            "use_rslora": lora.use_rslora,
            "use_dora": lora.use_dora,
            "fan_in_fan_out": lora.fan_in_fan_out,
            "bias": lora.bias,
            "alpha_pattern": dict(lora.alpha_pattern) if alpha is None else {},
        }
        return LoraSettings.from_mapping(values, self._recipe.where)
