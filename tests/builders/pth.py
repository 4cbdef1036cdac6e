"""`iter_N.pth` files as XTuner writes them, of tensors that a test can read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# What `meta.cfg` says at least: types are strings, as mmengine leaves them.
_CONFIG = """
model = dict(
    type='xtuner.model.LLaVAModel',
    freeze_llm={freeze_llm},
    freeze_visual_encoder={freeze_visual_encoder},
    llm=dict(
        type='transformers.AutoModelForCausalLM.from_pretrained',
        pretrained_model_name_or_path='{llm}',
        torch_dtype='torch.float16'{llm_extra}),
    visual_encoder=dict(
        type='transformers.CLIPVisionModel.from_pretrained',
        pretrained_model_name_or_path='{vision}'){extra})
"""


def config_text(
    llm: object = "org/llm",
    vision: object = "org/clip",
    *,
    llm_lora: Mapping[str, Any] | None = None,
    visual_encoder_lora: Mapping[str, Any] | None = None,
    pretrained_pth: object = None,
    quantized: bool = False,
    freeze_llm: bool = True,
    load_from: object = None,
    resume: bool = False,
) -> str:
    """The text of an XTuner config; LoRA settings are the keywords of `peft.LoraConfig`."""
    extra = ""
    for key, lora in (("llm_lora", llm_lora), ("visual_encoder_lora", visual_encoder_lora)):
        if lora is not None:
            words = "".join(f", {name}={value!r}" for name, value in lora.items())
            extra += f",\n    {key}=dict(type='peft.LoraConfig'{words})"
    if pretrained_pth is not None:
        extra += f",\n    pretrained_pth='{pretrained_pth}'"
    text = _CONFIG.format(
        llm=llm,
        vision=vision,
        freeze_llm=freeze_llm,
        freeze_visual_encoder=True,
        llm_extra=", quantization_config=dict(load_in_4bit=True)" if quantized else "",
        extra=extra,
    )
    return f"{text}load_from = {load_from and str(load_from)!r}\nresume = {resume}\n"


def projector(hidden: int = 2) -> dict[str, torch.Tensor]:
    """The state dict of a projector from `hidden` to `hidden`."""
    weight = torch.arange(float(hidden * hidden)).view(hidden, hidden)
    bias = torch.arange(float(hidden)) + 0.5
    return {
        "projector.model.0.weight": weight,
        "projector.model.0.bias": bias,
        "projector.model.2.weight": -weight,
        "projector.model.2.bias": -bias,
    }


def save_pth(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: str | None = None,
    *,
    with_projector: bool = True,
    **further: Any,
) -> Path:
    """Saves `tensors` under their full names, such as `llm.lm_head.weight`; returns `path`."""
    state_dict = OrderedDict(tensors)
    if with_projector:
        state_dict.update(projector())
    meta = {"epoch": 0, "iter": 2, "seed": 7, "mmengine_version": "0.10.7"}
    if config is not None:
        meta["cfg"] = config
    value = {"meta": meta, "state_dict": state_dict, "message_hub": {}, "param_schedulers": []}
    torch.save(value | further, path)
    return path
