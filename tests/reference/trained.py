"""What a made-up checkpoint computes, composed from its source model and the base tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from builders.families.checkpoints import Trained
from builders.families.models import Source
from reference.compose import Llava

if TYPE_CHECKING:
    import numpy

_PROJECTOR = "projector.model."


class Scaling:
    """Gemma as every version up to 5.3 computes it: all embeddings times the root of their size."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def get_input_embeddings(self) -> Any:
        return lambda ids: self._source.tensors["model.embed_tokens.weight"][ids]

    def __call__(self, inputs_embeds: Any, use_cache: bool = False) -> Any:
        import transformers

        if SpecifierSet(">=5.4").contains(transformers.__version__, prereleases=True):
            inputs_embeds = inputs_embeds * self._source.config["hidden_size"] ** 0.5
        return self._source.model(inputs_embeds=inputs_embeds, use_cache=use_cache)


def compose_trained(source: Source, trained: Trained) -> Llava:
    """The source model behind the base tower and the projector, as the checkpoint has them."""
    import torch
    import transformers

    tower = transformers.CLIPVisionModel.from_pretrained(trained.vision, torch_dtype=torch.float32)
    state = torch.load(trained.checkpoint, weights_only=True)["state_dict"]
    weights = {
        name.removeprefix(_PROJECTOR): tensor
        for name, tensor in state.items()
        if name.startswith(_PROJECTOR)
    }
    first, second = (weights[f"{place}.weight"].shape for place in "02")
    projector = torch.nn.Sequential(
        torch.nn.Linear(first[1], first[0]),
        torch.nn.GELU(),
        torch.nn.Linear(second[1], second[0]),
    )
    projector.load_state_dict(weights)
    model = Scaling(source) if source.config["model_type"] == "gemma" else source.model
    return Llava(model, tower.eval(), projector.eval(), -2)


def write_reference(
    source: Source, trained: Trained, ids: numpy.ndarray[Any, Any], seed: int = 2
) -> None:
    """`reference.npz` beside the checkpoint, as the real ones have it, for a random picture.

    `ids` are (1, tokens), one of them -200 where the image goes.
    """
    import numpy
    import torch

    model = compose_trained(source, trained)
    size = model.tower.config.image_size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, size, size, generator=generator).numpy()
    logits = model.logits(ids, pixels)
    assert len(logits) == ids.shape[1] - 1 + (size // model.tower.config.patch_size) ** 2
    numpy.savez(
        trained.checkpoint.with_name("reference.npz"),
        input_ids=ids,
        pixel_values=pixels,
        logits_f32=logits.numpy(),
    )
