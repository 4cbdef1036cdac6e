"""What the training run says of itself, from its XTuner config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from xtuner2llava.errors import CheckpointError, Fault, UnsupportedError, raise_faults
from xtuner2llava.storage.small_file import read_plain
from xtuner2llava.training_config.datasets import TrainingData
from xtuner2llava.training_config.evaluator import TEXT_LIMIT, read_python
from xtuner2llava.training_config.values import (
    ANY_NAME,
    Section,
    Table,
    Unknown,
    Value,
    dotted,
    shown,
)

_TEXT_SHOWN = 200  # characters
_PATH = "pretrained_model_name_or_path"
# Arguments of `from_pretrained` that say how to load, not what the model is
# (transformers `modeling_utils.py`, `PreTrainedModel.from_pretrained`).
_LOADING_KEYS = (
    "type",
    _PATH,
    *"trust_remote_code torch_dtype quantization_config attn_implementation low_cpu_mem_usage "
    "device_map revision code_revision cache_dir token use_auth_token local_files_only "
    "force_download resume_download proxies subfolder variant use_safetensors max_memory "
    "offload_folder config offload_state_dict ignore_mismatched_sizes output_loading_info "
    "use_flash_attention_2 load_in_8bit load_in_4bit mirror from_tf from_flax use_cache "
    "gguf_file".split(),
)
# Of these, those that choose other files than the folder's usual ones, or another config, and the
# values that do not.
_CHOOSING: Mapping[str, Value] = {
    "revision": "main", "subfolder": "", "variant": "", "use_safetensors": True, "gguf_file": "",
    "config": None,
}  # fmt: skip
# XTuner's model by all the names under which its registry and imports find it.
_LLAVA_MODELS = tuple(
    f"{module}LLaVAModel" for module in ("", "xtuner.", "xtuner.model.", "xtuner.model.llava.")
)
# All arguments of `LLaVAModel.__init__` from v0.1.11 to today (v0.1.17 added the last one), and the
# keys that mmengine itself takes out of a dict before it calls a class
# (mmengine/registry/build_functions.py, config/config.py).
_ARGUMENTS = frozenset(
    "llm visual_encoder freeze_llm freeze_visual_encoder visual_select_layer pretrained_pth "
    "projector_depth llm_lora visual_encoder_lora use_activation_checkpointing "
    "max_position_embeddings type _scope_ _delete_".split()
)
# The class of each part and adapter; modelscope hands transformers' classes on.
_TRANSFORMERS = re.compile(r"((transformers|modelscope)\..+|[^.]+)(\.from_pretrained)?")
_PEFT = re.compile(r"(peft\.(\w+\.)*)?LoraConfig")
_CLASSES = (
    ("llm", _TRANSFORMERS, "which is not a class of transformers"),
    ("llm_lora", _PEFT, "peft.LoraConfig was expected"),
    ("visual_encoder", _TRANSFORMERS, "which is not a class of transformers"),
    ("visual_encoder_lora", _PEFT, "peft.LoraConfig was expected"),
)
_ONLY_LLAVA = "Only what XTuner's own LLaVAModel trained can be converted."


@dataclass(frozen=True, slots=True, eq=False)
class TrainingConfig:
    """The parts of an XTuner config that a conversion needs; nothing of it was ever run.

    `part` is "llm" or "visual_encoder". Paths are as written in the config. What is asked for
    raises `CheckpointError`, with the line and what to do, where its value follows only from
    running code or has the wrong type: so it fails only for those who did not say it otherwise.
    What merely describes the training (`data`) never raises; what of it could not be read is in
    `notes`. Defaults are those of LLaVAModel (xtuner/model/llava.py, the same from v0.1.23 to
    today).
    """

    where: str
    config: Section = field(repr=False)
    data: TrainingData = field(repr=False)

    @classmethod
    def from_text(cls, text: str, where: str) -> TrainingConfig:
        """Reads the text of a config; `where` names it in errors. Raises `CheckpointError`."""
        config = Section(read_python(text, where), "", where)
        model = config.table.get("model", config.table.get(ANY_NAME))
        if not isinstance(model, (Table, Unknown)):
            names = ", ".join([str(name) for name in config.table][:12]) or "nothing"
            found = f"missing, found: {names}" if model is None else shown(model)
            raise config.error("model", f"is {found}, a dict was expected")
        return cls(where, config, TrainingData.of(config))

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> TrainingConfig:
        """Reads a config file of at most 4 MiB, in UTF-8. Raises `CheckpointError`."""
        data = read_plain(Path(path), TEXT_LIMIT)
        try:
            return cls.from_text(data.decode("utf-8-sig"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"is not UTF-8 (byte {error.start})",
                where=str(path),
                advice="An XTuner config is a Python file; save it as UTF-8.",
            ) from error

    @property
    def model(self) -> Section:
        """The arguments of the model."""
        model = self.config.section("model")
        assert model is not None  # noqa: S101 - looked at when the config was read
        return model

    def check_model(self) -> None:
        """Raises `UnsupportedError` where this is not a training of XTuner's LLaVAModel.

        Forks train classes of other names, or give arguments that LLaVAModel does not have; what
        such a class computes does not show in its tensors. The same holds for an LLM or a tower
        whose class is not transformers', and for adapters that are not PEFT's LoRA.
        """
        raise_faults(UnsupportedError, list(self._model_faults()))

    def base_path(self, part: str) -> str | None:
        """The folder or Hub repo id of the part's base model."""
        section = self.model.section(part)
        return section.text(_PATH) if section else None

    def overrides(self, part: str) -> Mapping[str, Value]:
        """Further arguments of `from_pretrained`: each overrides a key of the base's config."""
        section = self.model.known(part)
        return section.others(_LOADING_KEYS) if section else {}

    def choices(self, part: str) -> Mapping[str, Value]:
        """Arguments of `from_pretrained` with which the path alone does not say what was loaded."""
        section = self.model.known(part)
        found = {key: section.table.get(key) for key in _CHOOSING} if section else {}
        return {k: v for k, v in found.items() if v is not None and v != _CHOOSING[k]}

    def frozen(self, part: str) -> bool:
        return self.model.flag(f"freeze_{part}")

    def lora(self, part: str) -> Section | None:
        """The arguments of the part's `peft.LoraConfig`; None where it had no adapter."""
        return self.model.section(f"{part}_lora")

    @property
    def inexact(self) -> tuple[str, ...]:
        """Why what becomes of this training is near to what was trained, and not the same."""
        llm = self.model.known("llm")
        flags = ("load_in_4bit", "load_in_8bit")
        if llm is None or not (llm.section("quantization_config") or any(map(llm.flag, flags))):
            return ()
        if self.lora("llm") is not None:
            return (
                "The LLM was trained as QLoRA, on quantised weights; the adapter is merged onto "
                "the unquantised base, as XTuner and PEFT do. Outputs are near those seen in "
                "training, not the same.",
            )
        return (
            "The LLM was quantised in training; the unquantised base is written, as XTuner does. "
            "Outputs are near those seen in training, not the same.",
        )

    @property
    def visual_select_layer(self) -> int:
        return self.model.integer("visual_select_layer", -2)

    @property
    def projector_depth(self) -> int:
        return self.model.positive("projector_depth", 2)

    def started_from(self, key: str) -> str | None:
        """The checkpoint that the run started from, which a frozen part may come from.

        `key` is `pretrained_pth` of LLaVAModel, or mmengine's `load_from`. With `resume`, that is
        a checkpoint of the same run, and holds of a frozen part as little.
        """
        if key == "pretrained_pth":
            return self.model.text(key)
        started = self.config.text(key)
        return None if started is None or self.config.flag("resume") else started

    @property
    def max_position_embeddings(self) -> int | None:
        """See `planning.language_model`; None where the argument is not given."""
        return self.model.positive("max_position_embeddings", 0) or None

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the config could not be read, and does not stop a conversion."""
        unread = []
        for part in ("llm", "visual_encoder") if self.config.known("model") else ():
            try:
                self.model.section(part)
            except CheckpointError as error:
                fault = error.faults[0]
                what = f"{fault.where}: {fault.what}; the base model is taken as it is."
                unread.append(what)
        return (*unread, *self.data.notes)

    @property
    def used(self) -> Mapping[str, str | int | float | bool]:
        """What was read, for a report: values by dotted names, no paths of training data."""
        used: dict[str, str | int | float | bool] = {}
        if (model := self.config.known("model")) is not None:
            keys = ("llm", "visual_encoder", "llm_lora", "visual_encoder_lora")
            for section in filter(None, (model, *map(model.known, keys))):
                for key, value in section.table.items():
                    if isinstance(value, (bool, int, float)):
                        used[section.name(key)] = value
                    elif value is not None and not isinstance(value, (Table, Unknown)):
                        text = value[:_TEXT_SHOWN] if isinstance(value, str) else shown(value)
                        used[section.name(key)] = dotted(value) or text
        return {**used, **self.data.used}

    @property
    def decisive(self) -> Mapping[str, str | int | float | bool]:
        """What decides the trained model and its images, of `used`; not where models lie."""
        others = (_PATH, ".pretrained_pth", ".use_activation_checkpointing")
        used = {
            key: value
            for key, value in self.used.items()
            if key.startswith("model.") and not key.endswith(others)
        }
        return {**used, "image_aspect_ratio": self.data.image_aspect_ratio or "square"}

    def _model_faults(self) -> Iterator[Fault]:
        model = self.model
        kind = model.path_of("type")
        if kind is None:
            raise model.error("type", "is missing, xtuner.model.LLaVAModel was expected")
        if kind not in _LLAVA_MODELS:
            what = f"is {kind}, which is another class than XTuner's LLaVAModel"
            yield from model.error("type", what, advice=_ONLY_LLAVA).faults
            return
        unknown = [key for key in model.table if key not in _ARGUMENTS]
        if unknown:
            names = ", ".join(str(key)[:40] for key in unknown[:8])
            what = f"has arguments that XTuner's LLaVAModel does not have: {names}"
            line = model.table.lines.get(unknown[0])
            yield from self.config.error("model", what, line, advice=_ONLY_LLAVA).faults
        for key, expected, otherwise in _CLASSES:
            section = model.known(key)
            name = dotted(section.table.get("type")) if section else None
            if section and name and not expected.fullmatch(name):
                what = f"is {name}, {otherwise}"
                yield from section.error("type", what, advice=_ONLY_LLAVA).faults
