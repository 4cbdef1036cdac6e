"""A converted folder as loaders see it: its config, the headers of its weights, and its record.

The names of the two formats are written down here from the programs that read such folders, and not
taken from `mappings/formats`, so that an error in a mapping does not verify itself.

llava  haotian-liu/LLaVA `llava/model/llava_arch.py`, `multimodal_projector/builder.py`,
       `multimodal_encoder/clip_encoder.py`; the same in LLaVA-VL/LLaVA-NeXT
hf     transformers `models/llava/modeling_llava.py` (`LlavaForConditionalGeneration`), whose
       tensors have other names since 4.52; both are in use
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import ConversionError, CorruptFileError, UsageError
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.storage.safetensors_file import SafetensorsFile
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.writing.out_record import RECORD_NAME

# LLaVA's classes: the transformers class that each derives from, and its own model_type.
LLAVA_CLASSES = {
    "LlavaLlamaForCausalLM": ("llama", "llava_llama"),
    "LlavaQwenForCausalLM": ("qwen2", "llava_qwen"),
    "LlavaMistralForCausalLM": ("mistral", "llava_mistral"),
    "LlavaMixtralForCausalLM": ("mixtral", "llava_mixtral"),
}
_ADVICE = "Give a folder that `xtuner2llava convert` wrote."
_HF_CLASS = "LlavaForConditionalGeneration"
# Keys of a LLaVA config that do not belong to the plain class.
_NOT_PLAIN = re.compile(
    r"mm_.*|image_.*|unfreeze_.*|use_mm_proj|architectures|model_type|torch_dtype|dtype|"
    r"transformers_version|tune_.*|freeze_.*"
)
# A tensor belongs to the first prefix that its name begins with.
_PREFIXES = {
    "llava": (
        ("model.vision_tower.vision_tower.", VISUAL_ENCODER, ""),
        ("model.mm_projector.", PROJECTOR, ""),
        ("", LLM, ""),
    ),
    "hf": (
        ("model.multi_modal_projector.linear_1.", PROJECTOR, "0."),
        ("model.multi_modal_projector.linear_2.", PROJECTOR, "2."),
        ("multi_modal_projector.linear_1.", PROJECTOR, "0."),
        ("multi_modal_projector.linear_2.", PROJECTOR, "2."),
        ("model.vision_tower.vision_model.", VISUAL_ENCODER, "vision_model."),
        ("vision_tower.vision_model.", VISUAL_ENCODER, "vision_model."),
        ("model.vision_tower.", VISUAL_ENCODER, "vision_model."),
        ("language_model.", LLM, ""),
        ("model.language_model.", LLM, "model."),
        ("lm_head.", LLM, "lm_head."),
    ),
}


class UnreadableWeights(CorruptFileError):
    """What needs all tensors of a folder was asked where a weight file is damaged."""


@dataclass(frozen=True, slots=True)
class ConvertedFolder:
    """A folder whose config could be read; `shards` are its readable safetensors files by name.

    `text` is the config of the plain language model, with its `model_type`; `vision` that of the
    tower, which the format `llava` leaves to `mm_vision_tower`. `damage` has the faults of the
    weight files that could not be read, `record_damage` those of the record.
    """

    path: Path
    format: str
    architecture: str
    config: Mapping[str, Json]
    text: Mapping[str, Json]
    vision: Mapping[str, Json] | None
    shards: Mapping[str, SafetensorsFile]
    record: Mapping[str, Json]
    damage: Mapping[str, list[str]]
    record_damage: list[str]

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors by name. Raises `UnreadableWeights`."""
        if self.damage:
            raise UnreadableWeights(f"{min(self.damage)} cannot be read")
        return {n: tensor for shard in self.shards.values() for n, tensor in shard.tensors.items()}

    def part(self, part: str) -> dict[str, LazyTensor]:
        """The tensors of the "llm", "visual_encoder" or "projector" by their names there.

        Those of the language model and the tower are the plain classes' as files spell them
        (`vision_model.…`), those of the projector a Sequential's (`0.weight`).
        """
        places = ((self.place(name), tensor) for name, tensor in self.tensors.items())
        return {place[1]: tensor for place, tensor in places if place and place[0] == part}

    def place(self, name: str) -> tuple[str, str] | None:
        """The part that a tensor belongs to, and its name there; None if no class has it."""
        for prefix, part, instead in _PREFIXES[self.format]:
            if name.startswith(prefix):
                return part, instead + name[len(prefix) :]
        return None

    @property
    def dtype(self) -> str | None:
        """The dtype that the config claims for the tensors."""
        value = self.config.get("torch_dtype", self.config.get("dtype"))
        return value if isinstance(value, str) else None

    def json(self, name: str) -> dict[str, Json]:
        """The object in the file `name`; empty if there is no such file.

        Raises `CorruptFileError` for anything else in it.
        """
        return read_json(self.path / name) if (self.path / name).is_file() else {}

    def files(self) -> list[Path]:
        """All files at top level, sorted by name."""
        return sorted(path for path in self.path.iterdir() if path.is_file())


def open_folder(path: Path) -> ConvertedFolder:
    """The folder at `path`; reads small files and headers.

    Raises `UsageError` if it is not a folder, and `CorruptFileError` for a config.json that is not
    one of a converted model.
    """
    if not path.is_dir():
        raise UsageError("is not a folder", where=str(path), advice=_ADVICE)
    if not (path / "config.json").exists():
        what = "has no config.json, so it is not a converted folder"
        raise CorruptFileError(what, where=str(path), advice=_ADVICE)
    config = read_json(path / "config.json")
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    inner, vision = config.get("text_config"), config.get("vision_config")
    if isinstance(architecture, str) and architecture in LLAVA_CLASSES:
        format, vision = "llava", None
        text = {key: value for key, value in config.items() if not _NOT_PLAIN.fullmatch(key)}
        text["model_type"] = LLAVA_CLASSES[architecture][0]
    elif architecture == _HF_CLASS and isinstance(inner, dict) and isinstance(vision, dict):
        format, text = "hf", inner
    else:
        raise CorruptFileError(
            f"architectures is {named!r}, expected one of {', '.join([*LLAVA_CLASSES, _HF_CLASS])}",
            where="config.json",
            advice=_ADVICE,
        )
    shards: dict[str, SafetensorsFile] = {}
    damage: dict[str, list[str]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            shards[file.name] = SafetensorsFile(file)
        except ConversionError as error:
            damage[file.name] = _texts(error, path)
    record, wrong = dict[str, Json](), list[str]()
    try:
        record = read_json(path / RECORD_NAME)
    except ConversionError as error:
        wrong = _texts(error, path)
    return ConvertedFolder(
        path, format, str(architecture), config, text, vision, shards, record, damage, wrong
    )


def _texts(error: ConversionError, folder: Path) -> list[str]:
    return [f"{fault.where}: {fault.what}".removeprefix(f"{folder}/") for fault in error.faults]
