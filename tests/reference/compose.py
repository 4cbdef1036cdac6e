"""Logits of an official-LLaVA folder, computed by plain transformers classes.

It shares nothing with the converter: tensors are read with the safetensors package, the language
model and the tower are the classes of transformers, the projector is written down here, and
everything is loaded strictly. Weights are used as stored, and all arithmetic is float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch

IMAGE_TOKEN = -200  # LLaVA `llava/constants.py`, IMAGE_TOKEN_INDEX

_LANGUAGE_MODELS = {
    "LlavaLlamaForCausalLM": ("LlamaConfig", "LlamaForCausalLM"),
    "LlavaQwenForCausalLM": ("Qwen2Config", "Qwen2ForCausalLM"),
    "LlavaMistralForCausalLM": ("MistralConfig", "MistralForCausalLM"),
    "LlavaMixtralForCausalLM": ("MixtralConfig", "MixtralForCausalLM"),
}
_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = "model.mm_projector."


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`, whole or sharded, as stored.

    An index must name exactly what each shard holds.
    """
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        found = load_file(folder / shard)
        assert set(found) == {name for name, file in weight_map.items() if file == shard}, shard
        tensors.update(found)
    return tensors


@dataclass(frozen=True, slots=True)
class Llava:
    """A language model, a CLIP tower and a projector, in float32 and evaluation mode."""

    language_model: Any
    tower: Any
    projector: Any
    select_layer: int

    def image_features(self, pixels: numpy.ndarray[Any, Any]) -> torch.Tensor:
        """What stands for the image: (1, patches, hidden size of the language model)."""
        import torch

        with torch.no_grad():
            seen = self.tower(pixel_values=torch.from_numpy(pixels), output_hidden_states=True)
            patches = seen.hidden_states[self.select_layer][:, 1:]  # without the class token
            features = self.projector(patches)
        assert isinstance(features, torch.Tensor)
        return features

    def logits(
        self, input_ids: numpy.ndarray[Any, Any], pixels: numpy.ndarray[Any, Any]
    ) -> torch.Tensor:
        """(text and image tokens, vocabulary), for one prompt with one `IMAGE_TOKEN`."""
        import torch

        (row,) = input_ids.tolist()
        place = row.index(IMAGE_TOKEN)
        embed = self.language_model.get_input_embeddings()
        before, after = torch.tensor([row[:place]]), torch.tensor([row[place + 1 :]])
        with torch.no_grad():
            spliced = torch.cat([embed(before), self.image_features(pixels), embed(after)], dim=1)
            logits = self.language_model(inputs_embeds=spliced, use_cache=False).logits[0]
        assert isinstance(logits, torch.Tensor)
        return logits


def compose(folder: Path, vision_base: Path) -> Llava:
    """The model of an official-LLaVA folder; the tower's shape comes from `vision_base`'s config.

    A folder without the tower's tensors is refused: read them into `compose_tensors` yourself.
    """
    config = json.loads((folder / "config.json").read_text())
    vision = json.loads((vision_base / "config.json").read_text())
    return compose_tensors(config, read_tensors(folder), vision)


def compose_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], vision: Mapping[str, Any]
) -> Llava:
    """The same from a LLaVA config, tensors under LLaVA's names, and the tower's config.

    Fails unless every tensor finds its place, and every place its tensor.
    """
    import torch
    import transformers

    (architecture,) = config["architectures"]
    config_class, model_class = _LANGUAGE_MODELS[architecture]
    ours = {"architectures", "model_type", "torch_dtype", "transformers_version", "use_mm_proj"}
    plain = {
        key: value
        for key, value in config.items()
        if key not in ours and not key.startswith(("mm_", "image_", "unfreeze_", "_"))
    }
    language_model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**plain, attn_implementation="eager")
    )
    tower = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            **{**vision.get("vision_config", vision), "attn_implementation": "eager"}
        )
    )
    projector = _projector(
        config["mm_projector_type"], config["mm_hidden_size"], config["hidden_size"]
    )

    parts: dict[str, dict[str, torch.Tensor]] = {_TOWER: {}, _PROJECTOR: {}, "": {}}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        parts[prefix][name.removeprefix(prefix)] = tensor.float()
    if config["tie_word_embeddings"]:
        assert "lm_head.weight" not in parts[""], "a tied head is written once"
        parts[""]["lm_head.weight"] = parts[""]["model.embed_tokens.weight"]
    if not any(name.startswith("vision_model.") for name in tower.state_dict()):
        # transformers 5 has no module of that name; the files keep it.
        parts[_TOWER] = {
            name.removeprefix("vision_model."): tensor for name, tensor in parts[_TOWER].items()
        }
    for prefix, model in ((_TOWER, tower), (_PROJECTOR, projector), ("", language_model)):
        model.load_state_dict(parts[prefix], strict=True)
        model.eval()
        assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    return Llava(language_model, tower, projector, config["mm_vision_select_layer"])


def _projector(kind: str, vision_size: int, hidden_size: int) -> torch.nn.Sequential:
    """LLaVA `llava/model/multimodal_projector/builder.py`: linears with exact GELU between."""
    from torch import nn

    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    assert match, kind
    layers: list[nn.Module] = [nn.Linear(vision_size, hidden_size)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
