"""What the training run says of itself, from its XTuner config."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from xtuner2llava.errors import (
    CheckpointError,
    CorruptFileError,
    Fault,
    UnsupportedError,
    raise_faults,
)
from xtuner2llava.training_config.datasets import TrainingData, UsedValue
from xtuner2llava.training_config.evaluator import TEXT_LIMIT, read_python
from xtuner2llava.training_config.lora import LoraArguments
from xtuner2llava.training_config.section import Section
from xtuner2llava.training_config.values import ANY_NAME, Table, Unknown, Value, dotted, shown

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
    "use_flash_attention_2 load_in_8bit load_in_4bit mirror from_tf from_flax use_cache".split(),
)
# XTuner's model by all the names under which its registry and imports find it.
_LLAVA_MODELS = frozenset(
    {
        "LLaVAModel",
        "xtuner.LLaVAModel",
        "xtuner.model.LLaVAModel",
        "xtuner.model.llava.LLaVAModel",
    }
)
# All arguments of `LLaVAModel.__init__` from v0.1.11 to today (v0.1.17 added the last one), and the
# keys that mmengine itself takes out of a dict before it calls a class
# (mmengine/registry/build_functions.py, config/config.py).
_ARGUMENTS = frozenset(
    "llm visual_encoder freeze_llm freeze_visual_encoder visual_select_layer pretrained_pth "
    "projector_depth llm_lora visual_encoder_lora use_activation_checkpointing "
    "max_position_embeddings type _scope_ _delete_".split()
)
_ONLY_LLAVA = "Only what XTuner's own LLaVAModel trained can be converted."
_LIBRARIES = ("transformers", "modelscope")  # modelscope hands transformers' classes on


@dataclass(frozen=True, slots=True, eq=False)
class TrainingConfig:
    """The parts of an XTuner config that a conversion needs; nothing of it was ever run.

    Paths are as written in the config. A property raises `CheckpointError`, with the line and what
    to do, where its value follows only from running code or has the wrong type: so
    `options.llm or training_config.llm_path` fails only for those who gave nothing. What
    merely describes the training (`data`) never raises; what of it could not be read is in `notes`.
    Defaults are those of LLaVAModel (xtuner/model/llava.py, the same from v0.1.23 to today).
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
        return cls.from_text(_text_of(Path(path)), str(path))

    @property
    def model(self) -> Section:
        """The arguments of the model."""
        model = self.config.section("model")
        assert model is not None  # noqa: S101 - looked at when the config was read
        return model

    @property
    def model_type(self) -> str:
        """`xtuner.model.LLaVAModel`, or what was trained in its place."""
        name = self.model.path_of("type")
        if name is None:
            raise self.model.error("type", "is missing, xtuner.model.LLaVAModel was expected")
        return name

    def check_model(self) -> None:
        """Raises `UnsupportedError` where this is not a training of XTuner's LLaVAModel.

        Forks train classes of other names, or give arguments that LLaVAModel does not have; what
        such a class computes does not show in its tensors. The same holds for an LLM or a tower
        whose class is not transformers', and for adapters that are not PEFT's LoRA.
        """
        raise_faults(UnsupportedError, list(self._model_faults()))

    @property
    def llm_path(self) -> str | None:
        return self._text("llm", _PATH)

    @property
    def llm_type(self) -> str | None:
        """`AutoModelForCausalLM`: the class, without its module and `from_pretrained`."""
        return self._class("llm")

    @property
    def llm_torch_dtype(self) -> str | None:
        """`float16`, `bfloat16`, `float32`, `auto`, or None where the config says nothing."""
        llm = self.model.section("llm")
        name = llm.path_of("torch_dtype") if llm else None
        return name.removeprefix("torch.") if name else None

    @property
    def llm_overrides(self) -> Mapping[str, Value]:
        """Further arguments of the LLM's `from_pretrained`: each overrides a key of its config."""
        llm = _known_section(self.model, "llm")
        return llm.others(_LOADING_KEYS) if llm else {}

    @property
    def quantization(self) -> Table | None:
        """`quantization_config`: not None for QLoRA, whose adapters belong to the plain base."""
        llm = _known_section(self.model, "llm")
        quantization = llm.section("quantization_config") if llm else None
        return quantization.table if quantization else None

    @property
    def inexact(self) -> tuple[str, ...]:
        """Why what becomes of this training is near to what was trained, and not the same."""
        if self.quantization is None:
            return ()
        if self.llm_lora is not None:
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
    def vision_path(self) -> str | None:
        return self._text("visual_encoder", _PATH)

    @property
    def vision_type(self) -> str | None:
        """`CLIPVisionModel` or `SiglipVisionModel`: without its module and `from_pretrained`."""
        return self._class("visual_encoder")

    @property
    def vision_overrides(self) -> Mapping[str, Value]:
        """As `llm_overrides`, for the vision tower."""
        vision = _known_section(self.model, "visual_encoder")
        return vision.others(_LOADING_KEYS) if vision else {}

    @property
    def freeze_llm(self) -> bool:
        return self.model.flag("freeze_llm")

    @property
    def freeze_visual_encoder(self) -> bool:
        return self.model.flag("freeze_visual_encoder")

    @property
    def visual_select_layer(self) -> int:
        return self.model.integer("visual_select_layer", -2)

    @property
    def projector_depth(self) -> int:
        return self.model.positive("projector_depth", 2)

    @property
    def pretrained_pth(self) -> str | None:
        """The checkpoint that the training started from, which a frozen part may come from."""
        return self.model.text("pretrained_pth")

    @property
    def max_position_embeddings(self) -> int | None:
        """See `planning.language_model`; None where the argument is not given."""
        if self.model.value("max_position_embeddings") is None:
            return None
        return self.model.positive("max_position_embeddings", 1)

    @property
    def llm_lora(self) -> LoraArguments | None:
        section = self.model.section("llm_lora")
        return LoraArguments(section) if section else None

    @property
    def visual_encoder_lora(self) -> LoraArguments | None:
        section = self.model.section("visual_encoder_lora")
        return LoraArguments(section) if section else None

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._unread_parts(), *self.data.notes)

    @property
    def used(self) -> tuple[UsedValue, ...]:
        """What was read, for a report: names, values and lines, no paths of training data."""
        return (*self._used_of_model(), *self.data.used)

    def _model_faults(self) -> Iterator[Fault]:
        model = self.model
        if self.model_type not in _LLAVA_MODELS:
            what = f"is {self.model_type}, which is another class than XTuner's LLaVAModel"
            yield from model.error("type", what, advice=_ONLY_LLAVA).faults
            return
        unknown = [key for key in model.table if key not in _ARGUMENTS]
        if unknown:
            names = ", ".join(str(key)[:40] for key in unknown[:8])
            what = f"has arguments that XTuner's LLaVAModel does not have: {names}"
            line = model.line(unknown[0])
            yield from self.config.error("model", what, line, advice=_ONLY_LLAVA).faults
        for part in ("llm", "visual_encoder"):
            section = _known_section(model, part)
            name = dotted(section.table.get("type")) if section else None
            if section and name and not _is_of(name.removesuffix(".from_pretrained"), _LIBRARIES):
                what = f"is {name}, which is not a class of transformers"
                yield from section.error("type", what, advice=_ONLY_LLAVA).faults
            lora = _known_section(model, f"{part}_lora")
            name = dotted(lora.table.get("type")) if lora else None
            if (
                lora
                and name
                and not (_is_of(name, ("peft",)) and name.rpartition(".")[2] == "LoraConfig")
            ):
                what = f"is {name}, peft.LoraConfig was expected"
                yield from lora.error("type", what, advice=_ONLY_LLAVA).faults

    def _unread_parts(self) -> Iterator[str]:
        """The LLM or the tower where it is not a dict, so that only the user can name its base."""
        model = _known_section(self.config, "model")
        for part in ("llm", "visual_encoder") if model is not None else ():
            try:
                self.model.section(part)
            except CheckpointError as error:
                fault = error.faults[0]
                yield f"{fault.where}: {fault.what}; the base model is taken as it is."

    def _text(self, part: str, key: str) -> str | None:
        section = self.model.section(part)
        return section.text(key) if section else None

    def _class(self, part: str) -> str | None:
        section = self.model.section(part)
        name = section.path_of("type") if section else None
        return name.removesuffix(".from_pretrained").rpartition(".")[2] if name else None

    def _used_of_model(self) -> Iterator[UsedValue]:
        model = _known_section(self.config, "model")
        if model is None:
            return
        yield from _used(model)
        for part in ("llm", "visual_encoder", "llm_lora", "visual_encoder_lora"):
            section = _known_section(model, part)
            if section is not None:
                yield from _used(section)


def _known_section(section: Section, key: str) -> Section | None:
    """The dict under `key`; None where there is none, or it is not known."""
    table = section.table.get(key)
    return Section(table, section.name(key), section.where) if isinstance(table, Table) else None


def _is_of(name: str, libraries: tuple[str, ...]) -> bool:
    """Whether a class comes from one of these, or is named without its module."""
    module = name.rpartition(".")[0]
    return not module or module.partition(".")[0] in libraries


def _used(section: Section) -> Iterator[UsedValue]:
    for key, value in section.table.items():
        name, line = section.name(key), section.line(key)
        if isinstance(value, Unknown) or value is None:
            continue
        if isinstance(value, (bool, int, float)):
            yield UsedValue(name, value, line)
        elif not isinstance(value, Table):
            text = value[:_TEXT_SHOWN] if isinstance(value, str) else shown(value)
            yield UsedValue(name, dotted(value) or text, line)


def _text_of(path: Path) -> str:
    where = str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorruptFileError("is not a file, an XTuner config was expected", where=where)
        with path.open("rb") as file:
            data = file.read(TEXT_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such path"
        raise CheckpointError(
            f"cannot be read ({reason})",
            where=where,
            advice="Give the path of the training config with --xtuner-config.",
        ) from error
    if len(data) > TEXT_LIMIT:
        raise CheckpointError(
            f"has more than {TEXT_LIMIT} bytes, an XTuner config was expected", where=where
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"is not UTF-8 (byte {error.start})",
            where=where,
            advice="An XTuner config is a Python file; save it as UTF-8.",
        ) from error
