"""What the two output formats look like: names of tensors, and keys of `config.json`.

Written down once more, from what reads these folders, and not taken from `mappings/formats`: so a
slip in a mapping does not verify itself.

llava  haotian-liu/LLaVA `llava/model/llava_arch.py`, `multimodal_projector/builder.py`,
       `multimodal_encoder/clip_encoder.py`; the same in LLaVA-VL/LLaVA-NeXT
hf     transformers `models/llava/modeling_llava.py` (`LlavaForConditionalGeneration`), whose
       tensors are called otherwise since 4.52; both namings are in use
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.json_file import Json

LLM = "llm"
VISUAL_ENCODER = "visual_encoder"
PROJECTOR = "projector"

# LLaVA's classes, and the transformers class that each derives from, by model_type.
_LLAVA_CLASSES = {
    "LlavaLlamaForCausalLM": ("llama", "llava_llama"),
    "LlavaQwenForCausalLM": ("qwen2", "llava_qwen"),
    "LlavaMistralForCausalLM": ("mistral", "llava_mistral"),
    "LlavaMixtralForCausalLM": ("mixtral", "llava_mixtral"),
}
_HF_CLASS = "LlavaForConditionalGeneration"
# Keys of a LLaVA config that the plain class knows nothing of.
_NOT_PLAIN = re.compile(
    r"mm_.*|image_.*|unfreeze_.*|use_mm_proj|architectures|model_type|torch_dtype|dtype|"
    r"transformers_version|tune_.*|freeze_.*"
)
# The longest first: a name belongs to the first prefix that it begins with.
_LLAVA_PREFIXES = (
    ("model.vision_tower.vision_tower.", VISUAL_ENCODER, ""),
    ("model.mm_projector.", PROJECTOR, ""),
    ("", LLM, ""),
)
_HF_PREFIXES = (
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
)
_ANY = object()
# What LLaVA must find, and the value where only one is right. A missing `mm_use_im_patch_token` is
# true, and adds a token (LLaVA `llava/model/builder.py`).
_LLAVA_KEYS: Mapping[str, object] = {
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": _ANY,
    "mm_projector_type": _ANY,
    "mm_vision_select_layer": _ANY,
    "mm_vision_tower": _ANY,
    "unfreeze_mm_vision_tower": _ANY,
    "image_aspect_ratio": _ANY,
    "use_cache": True,
    "vocab_size": _ANY,
    "eos_token_id": _ANY,
}
_HF_KEYS: Mapping[str, object] = {
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": _ANY,
    "text_config": _ANY,
    "vision_config": _ANY,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read a folder: its format, and its config by component.

    `text` is the config of the plain language model, with its `model_type`; `vision` that of the
    tower, which the `llava` format leaves to `mm_vision_tower`.
    """

    format: str
    architecture: str
    config: Mapping[str, Json]
    text: Mapping[str, Json]
    vision: Mapping[str, Json] | None

    def place(self, name: str) -> tuple[str, str] | None:
        """The component of a tensor, and its name there; None if no model has it.

        The language model's and tower's names are those of the plain classes as files spell them
        (`vision_model.…`), the projector's those of a Sequential (`0.weight`).
        """
        for prefix, component, instead in (
            _LLAVA_PREFIXES if self.format == "llava" else _HF_PREFIXES
        ):
            if name.startswith(prefix):
                return component, instead + name[len(prefix) :]
        return None

    @property
    def select_layer(self) -> Json:
        """Which of the tower's hidden states is taken; -2 is the last but one."""
        key = "mm_vision_select_layer" if self.format == "llava" else "vision_feature_layer"
        return self.config.get(key)

    @property
    def dtype(self) -> str | None:
        """The dtype that the config claims for the tensors."""
        value = self.config.get("torch_dtype", self.config.get("dtype"))
        return value if isinstance(value, str) else None

    def key_faults(self) -> list[str]:
        """What is missing of the keys that a reader needs, or has a value that it must not have."""
        wanted = _LLAVA_KEYS if self.format == "llava" else _HF_KEYS
        faults = []
        for key, value in wanted.items():
            if key not in self.config:
                faults.append(f"{key} is missing")
            elif value is not _ANY and self.config[key] != value:
                faults.append(f"{key} is {self.config[key]!r}, expected {value!r}")
        if self.format == "llava":
            # transformers 4.37.2, which LLaVA pins, knows only the older words for these.
            faults += [
                f"{key} is a word of transformers 5, which LLaVA's 4.37.2 does not read"
                for key in ("rope_parameters", "dtype")
                if key in self.config
            ]
            known = _LLAVA_CLASSES[self.architecture][1]
            if self.config.get("model_type") not in (known, "llava"):
                faults.append(f"model_type is {self.config.get('model_type')!r}, expected {known}")
        return faults

    def projector_depth(self) -> tuple[int | None, str]:
        """How many linear layers the config says the projector has, and how it says so."""
        if self.format == "hf":
            return 2, "LlavaMultiModalProjector has linear_1 and linear_2"
        kind = self.config.get("mm_projector_type")
        match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind) if isinstance(kind, str) else None
        if match is None and kind == "linear":
            return 1, "mm_projector_type 'linear'"
        return int(match[1]) if match else None, f"mm_projector_type {kind!r}"


def read_layout(config: Mapping[str, Json], where: str) -> Layout:
    """The layout of a folder with this `config.json`. Raises `CorruptFileError` if it has none."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if isinstance(architecture, str) and architecture in _LLAVA_CLASSES:
        text = {key: value for key, value in config.items() if not _NOT_PLAIN.fullmatch(key)}
        text["model_type"] = _LLAVA_CLASSES[architecture][0]
        return Layout("llava", architecture, config, text, None)
    inner, vision = config.get("text_config"), config.get("vision_config")
    if architecture == _HF_CLASS and isinstance(inner, dict) and isinstance(vision, dict):
        return Layout("hf", _HF_CLASS, config, inner, vision)
    raise CorruptFileError(
        f"architectures is {named!r}, expected one of {', '.join([*_LLAVA_CLASSES, _HF_CLASS])}",
        where=where,
        advice="verify looks at folders that `xtuner2llava convert` wrote.",
    )
