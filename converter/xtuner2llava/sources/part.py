"""The LLM and the vision tower, each from the artifact, its adapter and its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, UnsupportedError, raise_faults
from xtuner2llava.hub.download import local_path
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.adapter import Adapter, is_adapted, merge, read_adapter, share_in
from xtuner2llava.sources.artifact import LLM, VISUAL_ENCODER, Artifact
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
from xtuner2llava.sources.opening import open_artifact
from xtuner2llava.sources.xtuner_folder import ADAPTERS
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.json_file import text
from xtuner2llava.storage.weights import find_weights
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.training_config import TrainingConfig, shown

_ALPHA_FLAGS = {LLM: "--lora-alpha", VISUAL_ENCODER: "--vision-lora-alpha"}
# An adapter is in a base's weights, or is not, where its share is this near to 1 or 0.
_NEAR = 0.25


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
class PartAssembly:
    """The work for one part, and the notes, faults and files that it finds.

    `stream_base` and `base_weights` are those of `open_checkpoint`, `before_training` that of
    `Checkpoint`.
    """

    part: str
    artifact: Artifact
    config: TrainingConfig | None
    options: SourceOptions
    stream_base: bool
    base_weights: bool
    before_training: bool
    recorded: RecordedBase = field(default_factory=lambda: RecordedBase(None))
    base_files: list[Fingerprint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    pending: list[Fault] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.part]

    @property
    def flag(self) -> str:
        return FLAGS[self.part]

    @property
    def given(self) -> str | None:
        """The base model that the user gave."""
        return self.options.base(self.part)

    @property
    def adapted(self) -> Mapping[str, LazyTensor]:
        """The tensors of the part's adapter; empty if it has none."""
        return self.artifact.adapters.get(self.part, {})

    @property
    def reference(self) -> str | None:
        """Where the base model is: a folder or a Hub repo id."""
        return self.given if self.given is not None else self.recorded.place

    def assembled(self) -> Part:
        """The part, whole, from the artifact where it was trained, else from its base model.

        What is wrong with it is collected in `faults`.
        """
        own = self.artifact.weights.get(self.part)
        try:
            self.recorded = self._recorded_base()
            return self._assembled(own)
        except ConversionError as error:
            self.faults.extend(error.faults)
        except OSError as error:
            self.faults.append(Fault(self.flag, f"cannot be read ({error.strerror})"))
        name = self.recorded.name
        if self.adapted:
            return Part({}, "adapter, its base not available", True, name=name)
        if own is None:
            return Part({}, "not available", False, name=name)
        return Part(own, "trained", True, name=name)

    def _assembled(self, own: Mapping[str, LazyTensor] | None) -> Part:
        where = f"{self.artifact.path}, {self.title}"
        adapter = self._adapter(where) if self.adapted else None
        if own is None and adapter is not None:
            own = adapter.own_base(where)
        folder = self._folder(weights=own is None)
        config = read_config(self.part, folder)
        if self.part == VISUAL_ENCODER:
            self._check_overrides(config)
        name = self.recorded.name or self.given
        part = Part({}, "trained", True, config, folder, name, adapter)
        if own is not None:
            if adapter is None:
                return replace(part, tensors=own)
            merged = merge(own, adapter, where)
            self._note_own_base(own, adapter)
            origin = f"{adapter.title} on the checkpoint's own weights"
            return replace(part, tensors=merged, origin=origin)
        if adapter is None:
            trained = self.before_training and self._will_be_trained()
            part = replace(part, trained=trained)
            if not self.before_training:
                self._require_frozen()
        found = self._pretrained() or self._base_tensors(folder, name or folder.name)
        if found is None:
            return replace(part, origin="not downloaded")
        base, origin = found
        if adapter is None:
            return replace(part, tensors=base, origin=origin)
        merged = merge(base, adapter, where)
        if self.given is not None and adapter.factors:
            self._note_given_base(self.given, base, adapter, part)
        return replace(part, tensors=merged, origin=f"{adapter.title} on {origin}")

    def _recorded_base(self) -> RecordedBase:
        """The base model that the XTuner config names, or else adapter_config.json."""
        settings = self.artifact.settings.get(self.part)
        beside = settings.base if settings is not None else None
        record, of_adapter = "the XTuner config", f"{ADAPTERS[self.part]}'s config"
        name: str | None = None
        try:
            if self.config is not None:
                name = self.config.base_path(self.part)
        except ConversionError:
            if self.given is None and beside is None:
                raise
        if name is None:
            name, record = beside, of_adapter
        elif self.given is None and beside and _model_name(beside) != _model_name(name):
            self.notes.append(
                f"The base {self.title} is '{name}', as the XTuner config says; {of_adapter} says "
                f"'{beside}'. {self.flag} decides."
            )
        if name is None:
            return RecordedBase(None)
        return RecordedBase(name, record, find_beside(name, self.artifact.path))

    def _folder(self, *, weights: bool) -> Path:
        """The folder of the part's config and small files, and of its weights if these are needed.

        It is that of the artifact, where the weights are there too and the user gave no other.
        """
        own, checkpoint = self.artifact.folders.get(self.part), self.artifact.path
        if not weights and own is not None and self.given is None:
            return own
        streamed = self.stream_base and is_remote(self.reference)
        needed = weights and self.base_weights and not streamed
        recorded = self.recorded
        folder = find_base(self.part, self.given, recorded, checkpoint, weights=needed)
        if self.given is None and recorded.folder is not None:
            within = folder.parent == checkpoint.absolute().parent
            near = "in the checkpoint's folder" if within else "beside the checkpoint's folder"
            self.notes.append(
                f"The base {self.title} is '{folder.name}' {near}: {recorded.record} names "
                f"'{recorded.name}', which is not a folder here. {self.flag} decides."
            )
        return folder

    def _check_overrides(self, tower: ModelConfig) -> None:
        """Raises `UnsupportedError` where the XTuner config trained another tower than its base.

        Further arguments of `from_pretrained` replace keys of the tower's config.
        """
        if self.config is None:
            return
        changed = [
            Fault(
                f"{self.config.where}, model.visual_encoder.{key}",
                f"is {shown(value)} in training, and {tower.values.get(key)!r} in {tower.path}",
                f"Give {self.flag} a folder whose config.json says what was trained.",
            )
            for key, value in self.config.overrides(VISUAL_ENCODER).items()
            if not key.startswith("_") and tower.values.get(key) != value
        ]
        raise_faults(UnsupportedError, changed)

    def _adapter(self, where: str) -> Adapter:
        """The part's adapter with its settings."""
        adapter = read_adapter(self.adapted, None, where)
        beside, alpha = self.artifact.settings.get(self.part), self.options.alpha(self.part)
        config: LoraSettings | None = None
        try:
            config = self._config_lora()
        except ConversionError:
            # Not needed where another record, or the user, says it.
            if beside is None and alpha is None:
                raise
        flag = _ALPHA_FLAGS[self.part]
        settings, notes = settle(beside, config, alpha, adapter.ranks, flag)
        self.notes.extend(notes)
        return replace(adapter, settings=settings)

    def _config_lora(self) -> LoraSettings | None:
        """The LoRA of the XTuner config; its alpha need not be readable where the user gave one."""
        if self.config is None:
            return None
        lora = self.config.lora(self.part)
        if lora is None:
            return None
        return LoraSettings.from_config(lora, self.options.alpha(self.part))

    def _will_be_trained(self) -> bool:
        """Whether the training changes the part. Raises `ConversionError` for an adapter that
        cannot be merged afterwards."""
        if self.config is None:
            return True
        return self._config_lora() is not None or not self.config.frozen(self.part)

    def _require_frozen(self) -> None:
        """Raises `UnsupportedError` where the XTuner config trains a part that is not here.

        A note instead, if the user gave another model than the base: the trained one, merged or
        taken out of the checkpoint before.
        """
        try:
            if self.config is None or not self._will_be_trained():
                return
        except ConversionError:
            return  # A config that cannot be read contradicts nothing.
        what = f"XTuner config trains the {self.title}, and the checkpoint holds nothing of it"
        if self.given is None or _model_name(self.given) == _model_name(self.recorded.name):
            raise UnsupportedError(
                f"the {what}",
                where=str(self.artifact.path),
                advice=f"Is it complete, and the config that of this run? If the trained "
                f"{self.title} lies elsewhere, give it with {self.flag}.",
            )
        self.notes.append(
            f"The {what}: the weights of {self.flag} '{self.given}' are used as trained."
        )

    def _pretrained(self) -> _Found | None:
        """The part from the checkpoint that the run started from (`pretrained_pth`), if it has it.

        XTuner loads that after it has put LoRA layers in, and not strictly: the names of an adapted
        part then match none of its full weights, which are silently left out
        (xtuner/model/llava.py, `__init__`).
        """
        try:
            started = self.config.pretrained_pth if self.config is not None else None
        except ConversionError as error:
            fault = error.faults[0]
            self.notes.append(
                f"{fault.where}: {fault.what}. If the run started from a checkpoint with a trained "
                "LLM or vision tower, give a folder with its weights as --llm or --vision."
            )
            return None
        if started is None:
            return None
        earlier, adapted = _open_pretrained(started), is_adapted(self.adapted)
        if earlier is None and not adapted:
            self.notes.append(
                f"The run started from '{started}', which cannot be read here. If that trained "
                f"the {self.title}, give {self.flag} a folder with its weights: the base "
                f"model's are used."
            )
        if earlier is None or self.part not in earlier.weights:
            return None
        if adapted:
            self.notes.append(
                f"The run started from '{started}', which holds a trained {self.title}. XTuner "
                "does not load that under LoRA, so the adapter was trained on the base model's "
                "weights, and these are used."
            )
            return None
        self.base_files.extend(earlier.files)
        return earlier.weights[self.part], f"pretrained_pth {Path(started).name}"

    def _base_tensors(self, folder: Path, name: str) -> _Found | None:
        """The base model in `folder`; None if its weights are not here yet, and may be missing."""
        remote, found = is_remote(self.reference), find_weights(folder)
        if self.stream_base and remote:
            opened = open_streamed(self.part, str(self.reference), folder)
        elif found is not None or not (self.before_training or (remote and not self.base_weights)):
            opened = open_base(self.part, folder)
        else:
            where, advice = "in the local cache", "A conversion downloads them."
            if self.before_training:
                where, advice = "here", ""
            what = f"the weights of the base {self.title} are not {where} yet"
            self.pending.append(Fault(name, what, advice))
            return None
        self.base_files.extend(opened.files)
        return opened.tensors, f"base {Path(name).name if Path(name).is_dir() else name}"

    def _note_own_base(self, own: Mapping[str, LazyTensor], adapter: Adapter) -> None:
        """Notes that weights and an adapter lie together. Raises if the weights are merged ones."""
        path, home = self.artifact.path, self.artifact.folders.get(self.part)
        places = "under it, in the same file"
        if home is not None:
            at = "at top level" if home == path else f"in {home.name}/"
            places = f"{at}, beside {ADAPTERS[self.part]}/"
        share = self._share(own, adapter, home)
        note = (
            f"The checkpoint holds an adapter of the {self.title}, and the weights for it "
            f"{places}: the adapter is merged onto these, as XTuner's chat and mmbench do."
        )
        if share is None or abs(share) > _NEAR:
            note += " If they have it in them already, remove the adapter."
        if self.given is not None:
            note += f" {self.flag} gives config and small files only."
        self.notes.append(note)

    def _note_given_base(
        self, given: str, base: Mapping[str, LazyTensor], adapter: Adapter, part: Part
    ) -> None:
        """Notes signs that the user gave a base merged before. Raises if it surely is one."""
        share = self._share(base, adapter, part.folder)
        if share is not None and abs(share) < _NEAR:
            return
        signs = list(self._signs_of_a_merge(given, base, adapter, part))
        if signs:
            self.notes.append(
                f"The adapter of the {self.title} is merged onto {self.flag} '{given}', but "
                f"{' and '.join(signs)}. If the adapter is in those weights already (`xtuner "
                f"convert merge`), it is now in them twice. Give the base model with {self.flag}."
            )

    def _signs_of_a_merge(
        self, given: str, base: Mapping[str, LazyTensor], adapter: Adapter, part: Part
    ) -> Iterator[str]:
        recorded, folder = self.recorded, part.folder or Path(given)
        for name in ("adapter_config.json", "xtuner_config.py"):
            if (folder / name).is_file():
                yield f"it holds {name}"
        expected = _model_name(recorded.name)
        if expected not in (None, _model_name(given)) and folder.parent.name != "snapshots":
            yield f"{recorded.record} names '{recorded.name}'"
            made_from = text(part.config.values, "_name_or_path") if part.config else None
            if _model_name(made_from) == expected:
                yield f"its config.json says that it was made from '{made_from}'"
        for name, tensor in adapter.replacements.items():
            if name in base and len(tensor.shape) > 1 and _same_start(tensor, base[name]):
                yield "it has tensors that this training made"
                return

    def _share(
        self, weights: Mapping[str, LazyTensor], adapter: Adapter, folder: Path | None
    ) -> float | None:
        """How much of the adapter `weights` hold already, where the recorded base is here.

        Raises `UnsupportedError` if that is all of it.
        """
        recorded, given = self.recorded, self.given
        try:
            path = local_path(recorded.place or "")
            if not recorded.place or not path.is_dir() or (folder and path.samefile(folder)):
                return None
            share = share_in(weights, open_base(self.part, path).tensors, adapter)
        except (ConversionError, OSError):
            return None
        if share is None or abs(share - 1) > _NEAR:
            return share
        own = self.part in self.artifact.weights or given is None
        raise UnsupportedError(
            f"the adapter of the {self.title} is in these weights already: they are those of "
            f"'{recorded.name}', which {recorded.record} names, with the adapter merged",
            where=str(self.artifact.path) if own else f"{self.flag} {given}",
            advice=f"Remove {ADAPTERS[self.part]}/, or replace these by the base model's weights."
            if own
            else f"Give the base model with {self.flag}; the adapter is merged here.",
        )


def _open_pretrained(reference: str) -> Artifact | None:
    """The artifact that a run started from; None if it is not here."""
    try:
        path = local_path(reference)
        return open_artifact(str(path)) if path.exists() else None
    except (ConversionError, OSError):
        return None


def _model_name(name: str | None) -> str | None:
    """The last component of a model's path or repo id, also where that is a folder of the cache."""
    parts = Path((name or "").partition("@")[0]).parts
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1]) if parts else None


def _same_start(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether the first rows of two tensors are equal."""
    return one.shape == other.shape and bool((one.read(0, 1) == other.read(0, 1)).all())
