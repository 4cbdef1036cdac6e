"""A transformers model run layer by layer: one layer in memory, for a model of any size.

A model of the real class with a single layer and a tiny vocabulary is made once. Before each layer
runs, its tensors take the place of that layer's parameters; what went into the layer is replaced by
what came out of the one before. So everything around the layers (masks, positions, rotary tables)
is the class's own, in any version.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CheckpointError
from xtuner2llava.verification.plain_model import in_files

if TYPE_CHECKING:
    import torch

_TINY_VOCABULARY = 8
# Buffers that older checkpoints carry, and that modules now make themselves.
_BUFFERS = ("inv_freq", "position_ids")


def one_layer_config(config: Any) -> Any:
    """`config` for one layer and a vocabulary of eight."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, key, None) is not None:
            setattr(small, key, None)
    if getattr(small, "vocab_size", None) is not None:
        small.vocab_size = _TINY_VOCABULARY
    return small


class Layers:
    """A one-layer `model`, whose layer stands in for any of that kind.

    `normed` is what went into the head in the last run, if the model has a head: what the class
    makes of the layer's output.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefix, layers = _layer_list(model)
        self._layer = layers[0]
        self._given: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None
        self._layer.register_forward_pre_hook(self._before, with_kwargs=True)
        self._layer.register_forward_hook(self._after)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._before_head)
        # Rows of these are read as they are needed.
        apart = [n for n, m in model.named_modules() if head is not None and m in (embedding, head)]
        start = f"{self.prefix}.0."
        self._inner: dict[str, list[str]] = {}
        self._outer: dict[str, list[str]] = {}
        for name, parts in in_files(model).items():
            files = [file for file, _ in parts]
            if name.startswith(start):
                inner = [file.partition(start)[2] for file in files]
                self._inner[name.removeprefix(start)] = inner
            elif name.rpartition(".")[0] not in apart:
                self._outer[name] = files
        self.free()

    def load_outer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts float32 tensors outside of the layer in place: norms, the tower's embeddings.

        Raises `CheckpointError` unless they are all that the model has, but for the embedding and
        the head of a language model.
        """
        self._load(self.model, self._outer, tensors)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts a layer's float32 `tensors`, by their names within the layer, in its place.

        Raises `CheckpointError` unless they are exactly those of the layer.
        """
        self._load(self._layer, self._inner, tensors)

    def _load(
        self, module: Any, files: Mapping[str, list[str]], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Puts `tensors` in place of those of `module`, each of which is made of its `files`."""
        import torch

        wanted = {file for parts in files.values() for file in parts}
        different = [n for n in sorted(tensors.keys() ^ wanted) if not n.endswith(_BUFFERS)]
        if different:
            raise CheckpointError(
                f"{type(self.model).__name__} and the tensors to run it with differ in "
                f"{', '.join(different[:3])}"
            )
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        named = {
            name: tensors[parts[0]]
            if len(parts) == 1
            else torch.cat([tensors[part] for part in parts]).view(shapes[name])
            for name, parts in files.items()
            if not name.endswith(_BUFFERS)
        }
        module.load_state_dict(named, strict=False, assign=True)

    def free(self) -> None:
        """Gives the memory of the layer back; its buffers stay."""
        from torch.nn import Parameter

        for module in self._layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, Parameter(parameter.to("meta"), requires_grad=False))

    def run(self, hidden: torch.Tensor | None, **inputs: torch.Tensor) -> torch.Tensor:
        """What the layer makes of `hidden`; of what the model itself makes of `inputs` if None."""
        import torch

        self._given, self._seen = hidden, None
        with torch.no_grad():
            self.model(**inputs)
        assert self._seen is not None  # noqa: S101 - the hook ran
        return self._seen

    def _before(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._given is None:
            return None
        if arguments:
            return (self._given, *arguments[1:]), named
        return arguments, {**named, "hidden_states": self._given}

    def _after(self, module: Any, arguments: Any, output: Any) -> None:
        self._seen = output[0] if isinstance(output, tuple) else output

    def _before_head(self, module: Any, arguments: tuple[Any, ...]) -> None:
        self.normed = arguments[0][0]


def layer_tensors(names: Iterable[str], prefix: str) -> dict[int, dict[str, str]]:
    """Names of tensors by layer: for each its name within the layer, and its whole name."""
    layers: dict[int, dict[str, str]] = {}
    for name in names:
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if name.startswith(f"{prefix}.") and number.isdecimal() and rest:
            layers.setdefault(int(number), {})[rest] = name
    return layers


def _layer_list(model: Any) -> tuple[str, Any]:
    """The model's list of layers, and its name: the outermost that has one module."""
    from torch import nn

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == 1
    ]
    if not found:
        raise CheckpointError(f"{type(model).__name__} has no list of layers")
    return min(found, key=lambda item: item[0].count("."))
