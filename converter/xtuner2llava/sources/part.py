"""The LLM and the vision tower, each from the artifact, its adapter and its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, UnsupportedError, raise_faults
from xtuner2llava.hub.download import local_path
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.adapter import (
    Adapter,
    is_adapted,
    merge,
    read_adapter,
    share_in,
    untied,
)
from xtuner2llava.sources.artifact import LLM, VISUAL_ENCODER, Artifact
from xtuner2llava.sources.base_model import BaseModel, find_beside, model_name, resemble
from xtuner2llava.sources.lora_settings import LoraSettings, settle
from xtuner2llava.sources.model_config import ModelConfig
from xtuner2llava.sources.opening import open_artifact
from xtuner2llava.sources.xtuner_folder import ADAPTERS
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.json_file import text
from xtuner2llava.storage.weights import find_weights
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.training_config.config import TrainingConfig
from xtuner2llava.training_config.values import shown

_ALPHA_FLAGS = {LLM: "--lora-alpha", VISUAL_ENCODER: "--vision-lora-alpha"}
# An adapter is in a base's weights, or is not, where its share is this near to 1 or 0.
_NEAR = 0.25
# The default of transformers 4.
_ROPE_THETA = 10000.0
# Where no config is known, what the checkpoint does not hold is taken for frozen.
WITHOUT_CONFIG = TrainingConfig.from_text(
    "model = dict(freeze_llm=True, freeze_visual_encoder=True)", "no XTuner config"
)

# Tensors, and where they come from.
_Found = tuple[Mapping[str, LazyTensor], str]


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


@dataclass(slots=True)
class Assembly:
    """The work of making whole parts of `artifact` and base models, and what it finds on the way.

    `stream_base` and `base_weights` are those of `open_checkpoint`, `before_training` that of
    `Checkpoint`.
    """

    artifact: Artifact
    training_config: TrainingConfig | None
    options: SourceOptions
    stream_base: bool = False
    base_weights: bool = True
    before_training: bool = False
    base_files: list[Fingerprint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    pending: list[Fault] = field(default_factory=list)

    @property
    def config(self) -> TrainingConfig:
        return self.training_config or WITHOUT_CONFIG

    def part(self, part: str) -> Part:
        """A part from the artifact where it was trained, else from its base model.

        What is wrong with it is collected in `faults`.
        """
        base = BaseModel(part, self.artifact.path, self.options.base(part))
        own = self.artifact.weights.get(part)
        try:
            base = self._recorded(base)
            return self._assembled(base, own)
        except ConversionError as error:
            self.faults.extend(error.faults)
        except OSError as error:
            self.faults.append(Fault(base.flag, f"cannot be read ({error.strerror})"))
        if part in self.artifact.adapters:
            return Part({}, "adapter, its base not available", True, name=base.name)
        origin = "not available" if own is None else "trained"
        return Part(own or {}, origin, own is not None, name=base.name)

    def _assembled(self, base: BaseModel, own: Mapping[str, LazyTensor] | None) -> Part:
        where = f"{self.artifact.path}, {base.title}"
        adapter = self._adapter(base, where) if base.part in self.artifact.adapters else None
        if own is None and adapter is not None:
            own = adapter.own_base(where)
        folder = self._folder(base, weights=own is None)
        config = base.read_config(folder)
        self._check_choices(base, folder)
        if base.part == VISUAL_ENCODER:
            self._check_overrides(base, config)
        elif folder != self.artifact.folders.get(LLM):
            self._note_rope(config)
        name = base.name or base.given
        trained, as_trained = True, False
        found: _Found | None
        if own is not None:
            found = own, "trained" if adapter is None else "the checkpoint's own weights"
        else:
            if adapter is None and self.before_training:
                trained = self._will_be_trained(base.part)
            elif adapter is None:
                trained = False
                as_trained = self._given_as_trained(base)
            found = self._pretrained(base) or self._base_tensors(base, folder)
        tensors, origin = found or ({}, "not downloaded")
        if adapter is not None:
            tensors = untied(tensors, adapter, config)
        if adapter is None and not self.before_training and self.options.alpha(base.part):
            self.notes.append(
                f"{_ALPHA_FLAGS[base.part]} has no effect: the {base.title} has no LoRA."
            )
        part = Part(tensors, origin, trained, config, folder, name, adapter)
        merged = None
        if adapter is not None and found is not None:
            merged = replace(
                part,
                tensors=merge(tensors, adapter, where),
                origin=f"{adapter.title} on {origin}",
            )
            if own is not None:
                self._note_own_base(base, part, adapter)
        if base.given is not None and not as_trained and not self.before_training:
            self._note_given_base(base, part, own=own is not None)
        return merged or part

    def _recorded(self, base: BaseModel) -> BaseModel:
        """`base` with what the XTuner config, or else adapter_config.json, names."""
        settings = self.artifact.settings.get(base.part)
        beside = settings.base if settings is not None else None
        record, of_adapter = "the XTuner config", f"{ADAPTERS[base.part]}'s config"
        name: str | None = None
        try:
            name = self.config.base_path(base.part)
        except ConversionError:
            if base.given is None and beside is None:
                raise
        if name is None:
            name, record = beside, of_adapter
        elif base.given is None and beside and model_name(beside) != model_name(name):
            self.notes.append(
                f"The base {base.title} is '{name}', as the XTuner config says; {of_adapter} "
                f"says '{beside}'. {base.flag} decides."
            )
        if name is None:
            return base
        near = find_beside(name, self.artifact.path)
        return replace(base, name=name, record=record, beside=near)

    def _folder(self, base: BaseModel, *, weights: bool) -> Path:
        """The folder of the part's config and small files, and of its weights if these are needed.

        It is that of the artifact, where the weights are there too and the user gave no other.
        """
        own, checkpoint = self.artifact.folders.get(base.part), self.artifact.path
        if not weights and own is not None and base.given is None:
            return own
        streamed = self.stream_base and base.part == LLM and base.is_remote
        folder = base.find(weights=weights and self.base_weights and not streamed)
        if base.given is None and base.beside is not None:
            within = folder.parent == checkpoint.absolute().parent
            near = "in the checkpoint's folder" if within else "beside the checkpoint's folder"
            self.notes.append(
                f"The base {base.title} is '{folder.name}' {near}: {base.record} names "
                f"'{base.name}', which is not a folder here. {base.flag} decides."
            )
        return folder

    def _check_choices(self, base: BaseModel, folder: Path) -> None:
        """Raises `UnsupportedError` where the recorded path alone does not say what was loaded.

        What the user gave is it. transformers ignores the revision of a folder.
        """
        if base.given is not None or folder == self.artifact.folders.get(base.part):
            return
        is_folder = local_path(base.recorded_place or "").is_dir()
        faults = [
            Fault(
                f"{self.config.where}, model.{base.part}.{key}",
                f"is {shown(value)} in training: '{base.name}' alone does not say what was loaded",
                f"Give {base.flag} the folder with the config and weights that were, or "
                "OWNER/NAME@REVISION.",
            )
            for key, value in self.config.choices(base.part).items()
            if not (key == "revision" and is_folder)
        ]
        raise_faults(UnsupportedError, faults)

    def _check_overrides(self, base: BaseModel, tower: ModelConfig) -> None:
        """Raises `UnsupportedError` where the XTuner config trained another tower than its base.

        Further arguments of `from_pretrained` replace keys of the tower's config.
        """
        changed = [
            Fault(
                f"{self.config.where}, model.visual_encoder.{key}",
                f"is {shown(value)} in training, and {tower.values.get(key)!r} in {tower.path}",
                f"Give {base.flag} a folder whose config.json says what was trained.",
            )
            for key, value in self.config.overrides(base.part).items()
            if not key.startswith("_") and tower.values.get(key) != value
        ]
        raise_faults(UnsupportedError, changed)

    def _note_rope(self, config: ModelConfig) -> None:
        """Notes a rotary embedding of the base LLM that its training may not have had."""
        theta, scaling = (config.values.get(key) for key in ("rope_theta", "rope_scaling"))
        if config.rope_since_5 and (scaling is not None or theta != _ROPE_THETA):
            self.notes.append(
                f"{config.path} says rope_theta {theta} where only transformers 5 reads it. If the "
                "training read this file with an earlier version, such as the 4.48 of XTuner 0.2, "
                f"it had rope_theta {_ROPE_THETA:g} without scaling: then write that in the file."
            )

    def _adapter(self, base: BaseModel, where: str) -> Adapter:
        """The part's adapter with its settings."""
        adapter = read_adapter(self.artifact.adapters[base.part], None, where)
        beside, alpha = self.artifact.settings.get(base.part), self.options.alpha(base.part)
        config: LoraSettings | None = None
        try:
            config = self._config_lora(base.part)
        except ConversionError:
            # Not needed where another record, or the user, says it.
            if beside is None and alpha is None:
                raise
        flag = _ALPHA_FLAGS[base.part]
        if not adapter.factors and (beside or config or not adapter.replacements):
            raise UnsupportedError(
                f"the adapter of the {base.title} is empty",
                where=where,
                advice="It was not saved whole: give XTuner's iter_N.pth or DeepSpeed directory.",
            )
        settings, notes = settle(beside, config, alpha, adapter.ranks, flag)
        self.notes.extend(notes)
        return replace(adapter, settings=settings)

    def _config_lora(self, part: str) -> LoraSettings | None:
        """The LoRA of the XTuner config; its alpha need not be readable where the user gave one."""
        lora = self.config.lora(part)
        return LoraSettings.from_config(lora, self.options.alpha(part)) if lora else None

    def _will_be_trained(self, part: str) -> bool:
        """Whether the training changes the part.

        Raises `ConversionError` for an adapter that cannot be merged afterwards.
        """
        return self._config_lora(part) is not None or not self.config.frozen(part)

    def _given_as_trained(self, base: BaseModel) -> bool:
        """Whether the XTuner config trains a part that is not here, and the user gave it.

        That is another model than the base: the trained one, merged or taken out of the checkpoint
        before, which a note says. Raises `UnsupportedError` where none was given.
        """
        try:
            if not self._will_be_trained(base.part):
                return False
        except ConversionError:
            return False  # A config that cannot be read contradicts nothing.
        what = f"XTuner config trains the {base.title}, and the checkpoint holds nothing of it"
        if base.given is None or model_name(base.given) == model_name(base.name):
            raise UnsupportedError(
                f"the {what}",
                where=str(self.artifact.path),
                advice=f"Is it complete, and the config that of this run? If the trained "
                f"{base.title} lies elsewhere, give it with {base.flag}.",
            )
        self.notes.append(
            f"The {what}: the weights of {base.flag} '{base.given}' are used as trained."
        )
        return True

    def _pretrained(self, base: BaseModel) -> _Found | None:
        """The part from a checkpoint that the run started from, if one has it.

        XTuner loads `pretrained_pth` when it has made the model, mmengine then `load_from`, and
        neither strictly: where LoRA layers are in, the names of the part match none of its full
        weights, which are silently left out (xtuner/model/llava.py, `__init__`; mmengine
        `runner/runner.py`, `load_or_resume`).
        """
        adapted = is_adapted(self.artifact.adapters.get(base.part, {}))
        for key in ("load_from", "pretrained_pth"):
            earlier = self._earlier(base, key, adapted=adapted)
            if earlier is not None and base.part in earlier.weights:
                if not adapted:
                    self.base_files.extend(earlier.files)
                    if earlier.layout.startswith("DeepSpeed ZeRO") and key == "pretrained_pth":
                        # xtuner/utils/zero_to_any_dtype.py, where `guess_load_checkpoint` has it.
                        self.notes.append(
                            f"The {base.title} is that of '{earlier.path}', from its float32 "
                            "weights. XTuner since 0.1.20 rounds these to float16 when it starts "
                            "from them, so those in training may differ in their last bits."
                        )
                    return earlier.weights[base.part], f"{key} {earlier.path.name}"
                self.notes.append(
                    f"The run started from '{earlier.path}', which holds a trained {base.title}. "
                    "XTuner does not load that under LoRA, so the adapter was trained on the base "
                    "model's weights, and these are used."
                )
        return None

    def _earlier(self, base: BaseModel, key: str, *, adapted: bool) -> Artifact | None:
        """The checkpoint that the config names under `key`, if it is here."""
        try:
            started = self.config.started_from(key)
        except ConversionError as error:
            fault = error.faults[0]
            self.notes.append(
                f"{fault.where}: {fault.what}. If the run started from a checkpoint with a trained "
                "LLM or vision tower, give a folder with its weights as --llm or --vision."
            )
            return None
        earlier = None if started is None else _open_earlier(started)
        if started is not None and earlier is None and not adapted:
            self.notes.append(
                f"The run started from '{started}', which cannot be read here. If that trained "
                f"the {base.title}, give {base.flag} a folder with its weights: the base model's "
                "are used."
            )
        return earlier

    def _base_tensors(self, base: BaseModel, folder: Path) -> _Found | None:
        """The base model in `folder`; None if its weights are not here yet, and may be missing."""
        name, remote = base.name or base.given or folder.name, base.is_remote
        stream = self.stream_base and base.part == LLM and remote
        may_be_missing = self.before_training or (remote and not self.base_weights)
        if may_be_missing and not stream and find_weights(folder) is None:
            where, advice = "in the local cache", "A conversion downloads them."
            if self.before_training:
                where, advice = "here", ""
            what = f"the weights of the base {base.title} are not {where} yet"
            self.pending.append(Fault(name, what, advice))
            self.faults.append(self.pending[-1])
            return None
        opened = base.open(folder, stream=stream)
        self.base_files.extend(opened.files)
        return opened.tensors, f"base {Path(name).name if Path(name).is_dir() else name}"

    def _note_own_base(self, base: BaseModel, own: Part, adapter: Adapter) -> None:
        """Notes that weights and an adapter lie together. Raises if the weights are merged ones."""
        path, home = self.artifact.path, self.artifact.folders.get(base.part)
        share = self._share(base, own.tensors, adapter, home)
        places = "under it, in the same file"
        if home is not None:
            at = "at top level" if home == path else f"in {home.name}/"
            places = f"{at}, beside {ADAPTERS[base.part]}/"
        note = (
            f"The checkpoint holds an adapter of the {base.title}, and the weights for it "
            f"{places}: the adapter is merged onto these, as XTuner's chat and mmbench do."
        )
        if share is None or abs(share) > _NEAR:
            note += " If they have it in them already, remove the adapter."
        if base.given is not None:
            note += f" {base.flag} gives config and small files only."
        self.notes.append(note)

    def _note_given_base(self, base: BaseModel, part: Part, *, own: bool) -> None:
        """Notes signs that the user gave a base merged before, or another model than the base.

        Raises if it surely is a merged one. With `own`, the weights are the checkpoint's.
        """
        flag, adapter = base.flag, part.adapter
        if adapter is not None and adapter.factors and not own:
            share = self._share(base, part.tensors, adapter, part.folder)
            signs = list(_signs_of_a_merge(base, part, adapter))
            if signs and (share is None or abs(share) >= _NEAR):
                self.notes.append(
                    f"The adapter of the {base.title} is merged onto {flag} '{base.given}', but "
                    f"{' and '.join(signs)}. If the adapter is in those weights already (`xtuner "
                    f"convert merge`), it is now in them twice. Give the base model with {flag}."
                )
                return
        another = base.has_another_name and base.part not in self.artifact.folders
        if another and (own or not self._is_recorded_base(base, part)):
            gives = "config and small files" if own else "weights"
            self.notes.append(
                f"The {gives} of the base {base.title} are those of {flag} '{base.given}', and "
                f"{base.record} names '{base.name}': this is the trained model only if both are "
                "the same."
            )

    def _is_recorded_base(self, base: BaseModel, part: Part) -> bool:
        """Whether the recorded base is here and has the same weights, as far as a few rows say."""
        try:
            path = local_path(base.recorded_place or "")
            return path.is_dir() and resemble(part.tensors, base.open(path).tensors)
        except (ConversionError, OSError):
            return False

    def _share(
        self,
        base: BaseModel,
        weights: Mapping[str, LazyTensor],
        adapter: Adapter,
        folder: Path | None,
    ) -> float | None:
        """How much of the adapter `weights` hold already, where the recorded base is here.

        Raises `UnsupportedError` if that is all of it.
        """
        try:
            path = local_path(base.recorded_place or "")
            if not base.name or not path.is_dir() or (folder and path.samefile(folder)):
                return None
            share = share_in(weights, base.open(path).tensors, adapter)
        except (ConversionError, OSError):
            return None
        if share is None or abs(share - 1) > _NEAR:
            return share
        where = f"{base.flag} {base.given}"
        advice = f"Give the base model with {base.flag}; the adapter is merged here."
        if base.part in self.artifact.weights or base.given is None:
            where = str(self.artifact.path)
            advice = f"Remove {ADAPTERS[base.part]}/, or replace these by the base model's weights."
        raise UnsupportedError(
            f"the adapter of the {base.title} is in these weights already: they are those of "
            f"'{base.name}', which {base.record} names, with the adapter merged",
            where=where,
            advice=advice,
        )


def _signs_of_a_merge(base: BaseModel, part: Part, adapter: Adapter) -> Iterator[str]:
    folder = part.folder or Path(base.given or "")
    for name in ("adapter_config.json", "xtuner_config.py"):
        if (folder / name).is_file():
            yield f"it holds {name}"
    expected = model_name(base.name)
    if base.has_another_name and folder.parent.name != "snapshots":
        yield f"{base.record} names '{base.name}'"
        made_from = text(part.config.values, "_name_or_path") if part.config else None
        if model_name(made_from) == expected:
            yield f"its config.json says that it was made from '{made_from}'"
    for name, saved in adapter.replacements.items():
        own = part.tensors[name]
        comparable = len(saved.shape) > 1 and saved.shape == own.shape
        if comparable and bool((saved.read(0, 1) == own.read(0, 1)).all()):
            yield "it has tensors that this training made"
            return


def _open_earlier(reference: str) -> Artifact | None:
    """The artifact that a run started from; None if it is not here."""
    try:
        path = local_path(reference)
        return open_artifact(str(path)) if path.exists() else None
    except (ConversionError, OSError):
        return None
