"""`Checkpoint`: a whole trained model, assembled from the artifact and the base models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, UnsupportedError, raise_faults
from xtuner2llava.hub.download import local_path
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.adapter import Adapter, is_adapted, merge, read_adapter, share_in
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER, Artifact
from xtuner2llava.sources.base_model import (
    FLAGS,
    TITLES,
    RecordedBase,
    find_base,
    find_beside,
    is_remote,
    open_base,
    open_streamed,
    read_config,
)
from xtuner2llava.sources.lora_settings import LoraSettings, settle
from xtuner2llava.sources.model_config import ModelConfig
from xtuner2llava.sources.xtuner_folder import ADAPTERS
from xtuner2llava.storage.json_file import text
from xtuner2llava.storage.weights import Fingerprint, find_weights
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.training_config import TrainingConfig, shown

_ALPHA_FLAGS = {LLM: "--lora-alpha", VISUAL_ENCODER: "--vision-lora-alpha"}
# How near a share must be to 0 or 1 to say that an adapter is in a base's weights, or is not.
_NEAR = 0.25


@dataclass(frozen=True, slots=True)
class Part:
    """One of the three parts of the trained model.

    `origin` says where its tensors come from; `folder` holds its tokenizer or image processor;
    `name` is what the records call its base model; `adapter` is what was merged into it. Without
    tensors, it is not available.
    """

    tensors: Mapping[str, LazyTensor]
    origin: str
    trained: bool
    config: ModelConfig | None = None
    folder: Path | None = None
    name: str | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The trained model as lazy tensors.

    `faults` are what must be mended before it can be converted, such as a base model that is not
    there; those that are `pending` too are only weights that are not here yet. `before_training`
    says that this is a config and its base models, of which training will make one. `base_files`
    fingerprints what came from base models. `inexact`, which `notes` have too, are reasons why
    these weights are not quite those that were trained.
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


# Opens the artifact that a run started from, if it is here; None if it is not.
OpenPretrained = Callable[[str], Artifact | None]


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
    those of `open_checkpoint`; `before_training`, weights need not be there at all.
    """
    work = _Assembly(
        artifact,
        training_config,
        options,
        open_pretrained,
        stream_base,
        base_weights,
        before_training,
    )
    llm, tower = work.part(LLM), work.part(VISUAL_ENCODER)
    origin = "not trained yet" if before_training else "trained"
    projector = Part(artifact.weights.get(PROJECTOR, {}), origin, trained=True)
    inexact = work.inexact()
    work.check_model()
    return Checkpoint(
        artifact,
        training_config,
        llm,
        tower,
        projector,
        tuple(work.base_files),
        tuple(dict.fromkeys((*artifact.notes, *work.notes, *inexact))),
        tuple(dict.fromkeys(work.faults)),
        inexact,
        tuple(work.pending),
        before_training,
    )


class _NotDownloadedError(UnsupportedError):
    pass


class _Assembly:
    """The work of `assemble`, with what it collects on the way."""

    def __init__(
        self,
        artifact: Artifact,
        training_config: TrainingConfig | None,
        options: SourceOptions,
        open_pretrained: OpenPretrained,
        stream_base: bool,
        base_weights: bool,
        before_training: bool,
    ) -> None:
        self._artifact, self._training_config, self._options = artifact, training_config, options
        self._stream, self._base_weights = stream_base, base_weights
        self._before_training = before_training
        self._open_pretrained = open_pretrained
        self.base_files: list[Fingerprint] = []
        self.notes: list[str] = []
        self.faults: list[Fault] = []
        self.pending: list[Fault] = []

    def part(self, part: str) -> Part:
        """The part, whole, from the artifact where it was trained, else from its base model.

        What is wrong with it is collected in `faults`, so that both parts are looked at.
        """
        artifact, recorded = self._artifact, RecordedBase(None)
        try:
            recorded = self._recorded(part)
            return self._part(part, recorded)
        except (ConversionError, OSError) as error:
            self.faults.extend(
                error.faults
                if isinstance(error, ConversionError)
                else [Fault(FLAGS[part], f"cannot be looked at ({error.strerror})")]
            )
        if part in artifact.adapters:
            return Part({}, "adapter, its base not available", True, name=recorded.name)
        found = artifact.weights.get(part)
        origin = "not available" if found is None else "trained"
        return Part(found or {}, origin, found is not None, name=recorded.name)

    def _part(self, part: str, recorded: RecordedBase) -> Part:
        artifact = self._artifact
        given = self._options.base(part)
        where = f"{artifact.path}, {TITLES[part]}"
        adapter, what = self._adapter(part) if part in artifact.adapters else (None, "")
        home, full = artifact.folders.get(part), artifact.weights.get(part)
        if full is None and adapter is not None:
            full = adapter.own_base(where)
        streamed = part == LLM and self._stream and is_remote(given, recorded.place)
        if full is not None and home is not None and given is None:
            folder = home
        else:
            needed = full is None and self._base_weights and not streamed
            folder = find_base(part, given, recorded, artifact.path, weights=needed)
            if given is None and recorded.folder is not None:
                near = "in the checkpoint's folder"
                if folder.parent != artifact.path.absolute().parent:
                    near = "beside the checkpoint's folder"
                self.notes.append(
                    f"The base {TITLES[part]} is '{folder.name}' {near}: {recorded.record} names "
                    f"'{recorded.name}', which is not a folder here. {FLAGS[part]} decides."
                )
        config, name = read_config(part, folder), recorded.name or given
        if part == VISUAL_ENCODER:
            self._check_overrides(config)
        result = Part({}, "trained", True, config, folder, name, adapter)
        if full is not None:
            if adapter is None:
                return replace(result, tensors=full)
            merged = merge(full, adapter, where)
            self._note_own_base(part, full, adapter, home, recorded)
            return replace(result, tensors=merged, origin=f"{what} on the checkpoint's own weights")
        will_be_trained = self._before_training and self._will_be_trained(part)
        if part not in artifact.adapters and not self._before_training:
            self._require_frozen(part, recorded)
        adapted = is_adapted(artifact.adapters.get(part, {}))
        name = name or folder.name
        try:
            base, origin = self._base_tensors(part, folder, name, recorded.place, adapted=adapted)
        except _NotDownloadedError as error:
            self.faults.extend(error.faults)
            self.pending.extend(error.faults)
            trained = adapter is not None or will_be_trained
            return replace(result, origin="not downloaded", trained=trained)
        if adapter is None:
            return replace(result, tensors=base, origin=origin, trained=will_be_trained)
        merged = merge(base, adapter, where)
        if given is not None:
            self._note_given_base(part, base, adapter, result, recorded)
        return replace(result, tensors=merged, origin=f"{what} on {origin}")

    def _check_overrides(self, tower: ModelConfig) -> None:
        """Raises `UnsupportedError` where the XTuner config trained another tower than its base.

        Further arguments of `from_pretrained` replace keys of the tower's config.
        """
        training_config = self._training_config
        if training_config is None:
            return
        changed = [
            Fault(
                f"{training_config.where}, model.visual_encoder.{key}",
                f"is {shown(value)} in training, and {tower.values.get(key)!r} in {tower.path}",
                f"Give {FLAGS[VISUAL_ENCODER]} a folder whose config.json says what was trained.",
            )
            for key, value in training_config.vision_overrides.items()
            if not key.startswith("_") and tower.values.get(key) != value
        ]
        raise_faults(UnsupportedError, changed)

    def check_model(self) -> None:
        """Whether XTuner's own LLaVAModel was trained, by the config in use and by the artifact's
        own: another config does not make another class of it."""
        training_config, own = self._training_config, self._artifact.config
        try:
            if training_config is not None:
                training_config.check_model()
        except ConversionError as error:
            self.faults.extend(error.faults)
        try:
            if training_config is not None and own is not None and own[1] != training_config.where:
                TrainingConfig.from_text(*own).check_model()
        except UnsupportedError as error:
            self.faults.extend(error.faults)
        except ConversionError:
            pass  # It cannot be read; the config in use says which class it is.

    def _note_own_base(
        self,
        part: str,
        own: Mapping[str, LazyTensor],
        adapter: Adapter,
        home: Path | None,
        recorded: RecordedBase,
    ) -> None:
        """Says that weights and an adapter lie together. Raises if the weights are merged ones."""
        path, given = self._artifact.path, self._options.base(part)
        places = "under it, in the same file"
        if home is not None:
            at = "at top level" if home == path else f"in {home.name}/"
            places = f"{at}, beside {ADAPTERS[part]}/"
        share = self._share(part, own, adapter, home, recorded)
        note = (
            f"The checkpoint holds an adapter of the {TITLES[part]}, and the weights for it "
            f"{places}: the adapter is merged onto these, as XTuner's chat and mmbench do."
        )
        if share is None or abs(share) > _NEAR:
            note += " If they have it in them already, remove the adapter."
        if given is not None:
            note += f" {FLAGS[part]} gives config and small files only."
        self.notes.append(note)

    def _note_given_base(
        self,
        part: str,
        base: Mapping[str, LazyTensor],
        adapter: Adapter,
        opened: Part,
        recorded: RecordedBase,
    ) -> None:
        """Notes what speaks for a base that the user merged before. Raises if it surely is one."""
        given, folder, flag = self._options.base(part), opened.folder, FLAGS[part]
        if given is None or folder is None or not adapter.factors:
            return
        share = self._share(part, base, adapter, folder, recorded)
        if share is not None and abs(share) < _NEAR:
            return
        signs = [
            f"it holds {name}"
            for name in ("adapter_config.json", "xtuner_config.py")
            if (folder / name).is_file()
        ]
        expected, found = _model_name(recorded.name), _model_name(given)
        made_from = text(opened.config.values, "_name_or_path") if opened.config else None
        if expected is not None and expected != found and folder.parent.name != "snapshots":
            signs.append(f"{recorded.record} names '{recorded.name}'")
            if made_from is not None and _model_name(made_from) == expected:
                signs.append(f"its config.json says that it was made from '{made_from}'")
        if any(_same_start(tensor, base[n]) for n, tensor in adapter.replacements.items()
               if len(tensor.shape) > 1 and n in base):  # fmt: skip
            signs.append("it has tensors that this training made")
        if signs:
            self.notes.append(
                f"The adapter of the {TITLES[part]} is merged onto {flag} '{given}', but "
                f"{' and '.join(signs)}. If the adapter is in those weights already (`xtuner "
                f"convert merge`), it is now in them twice: give the base model with {flag}."
            )

    def _share(
        self,
        part: str,
        weights: Mapping[str, LazyTensor],
        adapter: Adapter,
        folder: Path | None,
        recorded: RecordedBase,
    ) -> float | None:
        """How much of the adapter `weights` hold already, where the recorded base is here.

        Raises `UnsupportedError` if that is all of it.
        """
        share: float | None = None
        try:
            path = local_path(recorded.place or "")
            if recorded.place and path.is_dir() and not (folder and path.samefile(folder)):
                share = share_in(weights, open_base(part, path).tensors, adapter)
        except (ConversionError, OSError):
            return None
        if share is None or abs(share - 1) > _NEAR:
            return share
        given = self._options.base(part)
        mine = part in self._artifact.weights or given is None
        raise UnsupportedError(
            f"the adapter of the {TITLES[part]} is in these weights already: they are those of "
            f"'{recorded.name}', which {recorded.record} names, with the adapter merged",
            where=str(self._artifact.path) if mine else f"{FLAGS[part]} {given}",
            advice=(
                f"Remove {ADAPTERS[part]}/, or put the base model's weights in the place of these."
                if mine
                else f"Give the base model with {FLAGS[part]}; the adapter is merged here."
            ),
        )

    def _will_be_trained(self, part: str) -> bool:
        """Whether the training will change the part. Raises `ConversionError` for an adapter that
        could not be merged afterwards."""
        training_config = self._training_config
        if training_config is None:
            return True
        self._recorded_lora(part, self._options.alpha(part))
        if part == LLM:
            return training_config.llm_lora is not None or not training_config.freeze_llm
        return (
            training_config.visual_encoder_lora is not None
            or not training_config.freeze_visual_encoder
        )

    def _require_frozen(self, part: str, recorded: RecordedBase) -> None:
        """Says that a part is not in the checkpoint, although the XTuner config trained it.

        Raises `UnsupportedError`, unless the user gave another model than the base: the trained
        one, merged or taken out of the checkpoint before.
        """
        given, flag = self._options.base(part), FLAGS[part]
        try:
            if self._training_config is None or not self._will_be_trained(part):
                return
        except ConversionError:
            return  # What cannot be read says nothing.
        what = f"XTuner config trains the {TITLES[part]}, and the checkpoint holds nothing of it"
        if given is None or _model_name(given) == _model_name(recorded.name):
            raise UnsupportedError(
                f"the {what}",
                where=str(self._artifact.path),
                advice=f"Is it complete, and the config that of this run? If the trained "
                f"{TITLES[part]} lies elsewhere, give it with {flag}.",
            )
        self.notes.append(f"The {what}: the weights of {flag} '{given}' are used as trained.")

    def inexact(self) -> tuple[str, ...]:
        """Why the LLM is near to the trained one, and not the same."""
        if self._training_config is None or LLM in self._artifact.weights:
            return ()
        try:
            return self._training_config.inexact
        except ConversionError as error:
            self.faults.extend(error.faults)
            return ()

    def _recorded(self, part: str) -> RecordedBase:
        """What the XTuner config calls the part's base model, or else adapter_config.json."""
        found = self._named(part)
        if found.name is None:
            return found
        return replace(found, folder=find_beside(found.name, self._artifact.path))

    def _named(self, part: str) -> RecordedBase:
        settings = self._artifact.settings.get(part)
        beside = RecordedBase(settings.base if settings else None, f"{ADAPTERS[part]}'s config")
        name: str | None = None
        try:
            if self._training_config is not None:
                name = (
                    self._training_config.llm_path
                    if part == LLM
                    else self._training_config.vision_path
                )
        except ConversionError:
            if self._options.base(part) is None and beside.name is None:
                raise
        if name is None:
            return beside
        given = self._options.base(part)
        if given is None and beside.name and _model_name(beside.name) != _model_name(name):
            self.notes.append(
                f"The base {TITLES[part]} is '{name}', as the XTuner config says; "
                f"{beside.record} says '{beside.name}'. {FLAGS[part]} decides."
            )
        return RecordedBase(name)

    def _started_from(self) -> str | None:
        """`pretrained_pth`; where only running code would tell, a note says so."""
        if self._training_config is None:
            return None
        try:
            return self._training_config.pretrained_pth
        except ConversionError as error:
            fault = error.faults[0]
            self.notes.append(
                f"{fault.where}: {fault.what}. If the run started from a checkpoint with a trained "
                "LLM or vision tower, give a folder with its weights as --llm or --vision."
            )
            return None

    def _base_tensors(
        self, part: str, folder: Path, name: str, recorded: str | None, *, adapted: bool
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
        given = self._options.base(part)
        if part == LLM and self._stream and is_remote(given, recorded):
            opened = open_streamed(part, given, recorded, folder)
        elif self._before_training and find_weights(folder) is None:
            raise _NotDownloadedError(
                f"the weights of the base {TITLES[part]} are not here yet", where=name
            )
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
        artifact, alpha = self._artifact, self._options.alpha(part)
        adapter = read_adapter(artifact.adapters[part], None, f"{artifact.path}, {TITLES[part]}")
        settings, notes = settle(
            artifact.settings.get(part),
            lambda: self._recorded_lora(part, alpha),
            alpha,
            adapter.ranks,
            _ALPHA_FLAGS[part],
        )
        self.notes.extend(notes)
        adapter = replace(adapter, settings=settings)
        if not adapter.factors:
            return adapter, "saved biases"
        ranks = ", ".join(str(rank) for rank in adapter.ranks)
        known = settings.alpha if settings is not None else None
        return adapter, f"LoRA (rank {ranks}, alpha {'unknown' if known is None else f'{known:g}'})"

    def _recorded_lora(self, part: str, alpha: float | None) -> LoraSettings | None:
        """What the XTuner config says; where the user gave alpha, its own need not be readable."""
        if self._training_config is None:
            return None
        lora = (
            self._training_config.llm_lora
            if part == LLM
            else self._training_config.visual_encoder_lora
        )
        if lora is None:
            return None
        values: dict[str, object] = {
            **lora.other,
            "use_rslora": lora.use_rslora,
            "use_dora": lora.use_dora,
            "fan_in_fan_out": lora.fan_in_fan_out,
            "bias": lora.bias,
            "rank_pattern": dict(lora.rank_pattern),
        }
        try:
            values["lora_alpha"], values["r"] = lora.lora_alpha, lora.r
            values["alpha_pattern"] = dict(lora.alpha_pattern)
        except ConversionError:
            if alpha is None:
                raise
        return LoraSettings.from_mapping(values, self._training_config.where)


def _model_name(name: str | None) -> str | None:
    """The last component of a model's path or repo id, also where that is a folder of the cache."""
    parts = Path((name or "").partition("@")[0]).parts
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1]) if parts else None


def _same_start(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether the first rows of two tensors are equal."""
    return one.shape == other.shape and bool((one.read(0, 1) == other.read(0, 1)).all())
