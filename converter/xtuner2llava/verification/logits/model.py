"""The parts of a LLaVA, run on one image and one prompt, each with little memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.verification.logits.layers import Layers, layer_tensors, one_layer_config
from xtuner2llava.verification.logits.values import Reading
from xtuner2llava.verification.plain_model import new_tower

if TYPE_CHECKING:
    import torch

_TOWER_LAYERS = "vision_model.encoder.layers"


class LayeredLLM:
    """A causal language model of the class of `config`, whose weights are given layer by layer."""

    def __init__(
        self, config: Any, weights: Mapping[str, LazyTensor], *, trust: bool = False
    ) -> None:
        """Makes the class with one layer. Raises `ConversionError` where that cannot be run."""
        self._config, self._trust = config, trust
        self.weights = weights
        self._kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
        self._layers: dict[str, Layers] = {}
        first = self._for(0)
        model = first.model
        self.title = type(model).__name__
        names = {module: f"{name}.weight" for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if type(head).__name__ != "Linear" or head not in names or embedding not in names:
            raise UnsupportedError(f"the head of {self.title} is not a plain linear layer")
        self.embedding = names[embedding]
        self.head = names[head] if names[head] in weights else self.embedding
        self._by_layer = layer_tensors(weights, first.prefix)
        self.count = len(self._by_layer)
        if sorted(self._by_layer) != list(range(self.count)):
            raise UnsupportedError(f"there are layers {sorted(self._by_layer)[:5]} …")
        inner = (self.embedding, names[head])
        outer = (name for name in weights if not name.startswith(f"{first.prefix}."))
        self._outer = [name for name in outer if name not in inner]

    def _for(self, number: int) -> Layers:
        """The one-layer model for layers of the kind of layer `number`."""
        import torch
        import transformers

        classes: Any = transformers
        kind = self._kinds[number] if number < len(self._kinds) else ""
        if kind not in self._layers:
            small = one_layer_config(self._config)
            if kind:
                small.layer_types = [kind]
            options = {"trust_remote_code": True} if self._trust else {}
            try:
                with torch.random.fork_rng(devices=[]):
                    model = classes.AutoModelForCausalLM.from_config(
                        small, attn_implementation="eager", **options
                    )
            except Exception as error:
                what = f"transformers makes no model of its config: {type(error).__name__}: {error}"
                raise UnsupportedError(what) from error
            self._layers[kind] = Layers(model.float().eval())
        return self._layers[kind]

    def embed(self, ids: Sequence[int], reading: Reading) -> torch.Tensor:
        """(1, ids, hidden size) in float32; only the rows of `ids` are read."""
        import torch

        weight = self.weights[self.embedding]
        return torch.cat([reading.rows(weight, n, n + 1) for n in ids])[None]

    def layer(self, number: int, reading: Reading) -> dict[str, torch.Tensor]:
        """The tensors of a layer in float32, by their names within it."""
        inner = self._by_layer[number]
        return {name: reading.whole(self.weights[whole]) for name, whole in inner.items()}

    def run(
        self, number: int, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor
    ) -> torch.Tensor:
        """What layer `number` with these `tensors` makes of `hidden`.

        Layer 0 takes what the model itself makes of embeddings.
        """
        layers = self._for(number)
        layers.load(tensors)
        try:
            return layers.run(None if number == 0 else hidden, inputs_embeds=hidden)
        finally:
            layers.free()

    def run_last(
        self, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor, reading: Reading
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last layer makes of `hidden`, and what of that goes into the head.

        The latter is (positions, hidden size).
        """
        layers = self._for(self.count - 1)
        layers.load_outer({name: reading.whole(self.weights[name]) for name in self._outer})
        last = self.run(self.count - 1, tensors, hidden)
        assert layers.normed is not None  # noqa: S101 - a language model has a head
        return last, layers.normed


@dataclass(frozen=True, slots=True)
class ClipTower:
    """A CLIP tower and the projector behind it."""

    config: Mapping[str, Json]
    weights: Mapping[str, LazyTensor]
    projector: Mapping[str, LazyTensor]
    select_layer: int

    def features(self, pixels: torch.Tensor, reading: Reading) -> torch.Tensor:
        """What stands for the image, (1, patches, hidden size of the LLM), in float32."""
        from torch.nn import functional

        # Without the class token; linear layers with an exact GELU between them.
        hidden = self._selected(pixels, reading)[:, 1:]
        indices = sorted({int(name.split(".")[0]) for name in self.projector})
        for index in indices:
            weight, bias = (self.projector[f"{index}.{kind}"] for kind in ("weight", "bias"))
            if index != indices[0]:
                hidden = functional.gelu(hidden)
            hidden = functional.linear(hidden, reading.whole(weight), reading.whole(bias))
        return hidden

    def _selected(self, pixels: torch.Tensor, reading: Reading) -> torch.Tensor:
        """The hidden state that goes into the projector, with its class token."""
        import torch

        by_layer = layer_tensors(self.weights, _TOWER_LAYERS)
        count = len(by_layer)
        last = self.select_layer if self.select_layer >= 0 else count + 1 + self.select_layer
        if not 0 < last <= count:
            raise UnsupportedError(f"layer {self.select_layer} of a tower of {count} is selected")
        with torch.random.fork_rng(devices=[]):
            one = new_tower(self.config, num_hidden_layers=1, attn_implementation="eager")
        layers = Layers(one.float().eval())
        outer = [name for name in self.weights if not name.startswith(f"{_TOWER_LAYERS}.")]
        layers.load_outer({name: reading.whole(self.weights[name]) for name in outer})
        hidden: torch.Tensor | None = None
        for number in range(last):
            inner = by_layer[number].items()
            layers.load({name: reading.whole(self.weights[whole]) for name, whole in inner})
            hidden = layers.run(hidden, pixel_values=pixels)
            layers.free()
        assert hidden is not None  # noqa: S101 - there is at least one layer
        return hidden
