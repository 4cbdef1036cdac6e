"""The two models inside a LLaVA, in the memory of one module.

The real classes are made without memory for their parameters. Those of a module are read as it
begins to run, and dropped as it ends; a model of any size runs, in any version of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CheckpointError, ConversionError, UnsupportedError
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import BY_NAME, FLOAT32
from xtuner2llava.tensors.lazy import Derived, LazyTensor, row_blocks
from xtuner2llava.tensors.rows import concat, split
from xtuner2llava.verification.plain_model import in_files, new_tower, project

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, LazyTensor]
# Called with the name of a stage and the hidden states that come out of it.
Seen = Callable[[str, "torch.Tensor"], None]

_BLOCK_BYTES = 16 << 20
# Buffers that older checkpoints carry, and that modules now make themselves.
_BUFFERS = ("inv_freq", "position_ids")
# What is exchanged within one layer, where both have the same shape.
_EXCHANGES = (
    ("gate and up", ".gate_proj.", ".up_proj."),
    ("gate and up", ".w1.", ".w3."),
    ("q and k", ".q_proj.", ".k_proj."),
    ("k and v", ".k_proj.", ".v_proj."),
)
_GATE_UP = ".gate_up_proj."  # Phi-3 has both in one tensor, gate first


def rounded(weights: Weights, dtype: str) -> Weights:
    """`weights` in `dtype`, torch's name, or in the dtype that is stored where that is "keep"."""
    return {
        name: cast(tensor, tensor.stored_dtype if dtype == "keep" else BY_NAME[dtype])
        if tensor.dtype.is_float
        else tensor
        for name, tensor in weights.items()
    }


class Moved(Derived):
    """`source` in float32 as one more rounding would change it, the same in every run.

    A random part of half a unit in its last place is added to each value.
    """

    def __init__(self, source: LazyTensor) -> None:
        super().__init__(source, FLOAT32, source.shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        stored = self._source.read(start, stop)
        values = stored.float()
        if self._source.dtype.is_float:
            generator = torch.Generator().manual_seed(start)
            part = torch.rand(values.shape, generator=generator) * 2 - 1
            _, exponent = torch.frexp(values)
            values = values + torch.ldexp(part * torch.finfo(stored.dtype).eps / 4, exponent)
        return values


def stream(
    model: Any, weights: Weights, read: Callable[[str], torch.Tensor], apart: Sequence[str] = ()
) -> None:
    """Has the modules of `model` get their parameters by `read` as they run, and drop them then.

    `read` takes their names in files; the modules called `apart` get none. Raises `CheckpointError`
    unless `weights` has exactly those of the others.
    """
    import torch
    from torch.nn import Parameter

    names = {name: [file for file, _ in parts] for name, parts in in_files(model).items()}

    def fill(prefix: str, module: Any, _: Any) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            files = names[prefix + name]
            parts = [read(file) for file in files]
            value = parts[0] if len(parts) == 1 else torch.cat(parts).view(parameter.shape)
            if value.shape != parameter.shape:
                shapes = f"{list(value.shape)}, expected {list(parameter.shape)}"
                raise CheckpointError(f"{files[0]} has shape {shapes}")
            setattr(module, name, Parameter(value, requires_grad=False))

    def drop(module: Any, _: Any, output: Any) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, Parameter(parameter.to("meta"), requires_grad=False))

    wanted = set()
    for place, module in model.named_modules():
        prefix = f"{place}." if place else ""
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own and place not in apart:
            wanted |= {file for name in own for file in names[prefix + name]}
            module.register_forward_pre_hook(partial(fill, prefix))
            module.register_forward_hook(drop)
    different = wanted ^ {name for name in weights if name.rpartition(".")[0] not in apart}
    if listed := [name for name in sorted(different) if not name.endswith(_BUFFERS)]:
        what = f"{type(model).__name__} and the tensors to run it with"
        raise CheckpointError(f"{what} differ in {', '.join(listed[:3])}")


class StreamedLanguageModel:
    """A causal language `model` of transformers with `weights`, by their names in files.

    `embedding` and `head` are (vocabulary, hidden size), `layer_bytes` the size of a layer. Raises
    `ConversionError` where it cannot be run.
    """

    def __init__(self, model: Any, weights: Weights) -> None:
        import torch

        self.title, self._model, self._weights = type(model).__name__, model, weights
        names = {module: name for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        lists = [module for module in names if isinstance(module, torch.nn.ModuleList)]
        if not lists or type(head).__name__ != "Linear" or not {head, embedding} <= names.keys():
            what = "is not a list of layers with a plain linear head"
            raise UnsupportedError(f"{self.title} {what}")
        apart = [names[embedding], names[head]]
        stream(model, weights, self._read, apart)
        if f"{apart[0]}.weight" not in weights:
            raise CheckpointError(f"{apart[0]}.weight is missing")
        self.embedding = weights[f"{apart[0]}.weight"]
        self.head = weights.get(f"{apart[1]}.weight", self.embedding)
        # What goes into it is enough: a block of rows at a time makes the logits of that.
        head.weight, head.bias = torch.nn.Parameter(torch.zeros(1, head.in_features)), None
        head.register_forward_pre_hook(self._before_head)
        layers = min(lists, key=lambda module: names[module].count("."))
        for number, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._after_layer, number))
        self._middle = f"{names[layers]}.{len(layers) // 2}."
        self.layer_bytes = sum(tensor.nbytes for tensor in weights.values()) // len(layers)
        self._wrong: Weights = {}
        self._nudge = False
        self._seen: Seen
        self._normed: Any = None

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """(1, ids, hidden size) in float32; only the rows of `ids` are read."""
        import torch

        return torch.cat([self.embedding.read(n, n + 1).float() for n in ids])[None]

    def run(
        self,
        embedded: torch.Tensor,
        seen: Seen,
        *,
        nudge: bool = False,
        wrong: Weights | None = None,
    ) -> torch.Tensor:
        """What goes into the head, (positions, hidden size), for `embedded` as `embed` makes them.

        `seen` gets what comes out of each layer. With `nudge`, all hidden states are off by half a
        unit in the last place. `wrong` are used in place of some of the weights.
        """
        self._seen, self._nudge, self._wrong = seen, nudge, wrong or {}
        _execute(
            self._model, inputs_embeds=nudged(embedded) if nudge else embedded, use_cache=False
        )
        normed: torch.Tensor = self._normed
        return normed

    def exchanged(self) -> dict[str, Weights]:
        """Tensors of the middle layer in place of others, by what is exchanged."""
        middle = self._middle
        return wrong_layers({n: t for n, t in self._weights.items() if n.startswith(middle)})

    def _read(self, file: str) -> torch.Tensor:
        return whole(self._wrong.get(file) or self._weights[file])

    def _after_layer(self, number: int, module: Any, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self._seen(f"layer {number}", hidden)
        if not self._nudge:
            return output
        return (nudged(hidden), *output[1:]) if isinstance(output, tuple) else nudged(hidden)

    def _before_head(self, module: Any, arguments: tuple[Any, ...]) -> None:
        self._normed = arguments[0][0]


@dataclass(frozen=True, slots=True)
class ModelInput:
    """Token ids before and after the image, and the image: pixels, features, or none.

    `pixels` are (1, channels, height, width); `features` are (1, patches, hidden size), what the
    projector makes.
    """

    before: Sequence[int]
    after: Sequence[int]
    pixels: torch.Tensor | None = None
    features: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A LLaVA to run: `vision` is the config of its CLIP tower, whose `select_layer` is seen."""

    language: StreamedLanguageModel
    vision: Mapping[str, Json]
    tower: Weights
    projector: Weights
    select_layer: int

    def embed(self, given: ModelInput, seen: Seen) -> torch.Tensor:
        """What goes into the first layer, (1, positions, hidden size); `seen` gets the parts."""
        import torch

        hidden = self.language.embed([*given.before, *given.after])
        image = given.features if given.pixels is None else self._features(given.pixels)
        if image is not None:
            seen("image features", image)
            cut = len(given.before)
            hidden = torch.cat([hidden[:, :cut], image, hidden[:, cut:]], dim=1)
        seen("embeddings", hidden)
        return hidden

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        with parameters_on_meta():
            model = new_tower(self.vision)
        stream(model, self.tower, lambda file: whole(self.tower[file]))
        states = _execute(model, pixel_values=pixels, output_hidden_states=True).hidden_states
        with _running(model):
            projector = {name: whole(tensor) for name, tensor in self.projector.items()}
            return project(states[self.select_layer], projector)


def whole(tensor: LazyTensor) -> torch.Tensor:
    """All of `tensor` in float32, read in blocks."""
    import torch

    result = torch.empty((tensor.rows, *tensor.row_shape), dtype=torch.float32)
    for start, stop in row_blocks(tensor, _BLOCK_BYTES):
        result[start:stop] = tensor.read(start, stop)
    return result.view(tensor.shape)


def wrong_layers(layer: Weights) -> dict[str, Weights]:
    """A layer's tensors with two kinds of them exchanged, for each exchange whose shapes agree."""
    found: dict[str, Weights] = {}
    for title, one, other in _EXCHANGES:
        pairs = [(name, name.replace(one, other)) for name in layer if one in name]
        fit = [(a, b) for a, b in pairs if b in layer and layer[a].shape == layer[b].shape]
        if fit:
            there, back = ({a: layer[b] for a, b in fit}, {b: layer[a] for a, b in fit})
            found[title] = {**layer, **there, **back}
    if "q and k" in found:
        found.pop("k and v", None)
    fused = [(name, layer[name].rows // 2) for name in layer if _GATE_UP in name]
    if fused:
        halves = {name: concat(split(layer[name], [half, half])[::-1]) for name, half in fused}
        found["gate and up"] = {**layer, **halves}
    return found


def nudged(hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` with each value moved to the float32 next to it, up or down at random."""
    import torch

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
    return hidden * (1 + signs * 2.0**-23)


def _execute(model: Any, **inputs: Any) -> Any:
    """What `model` makes of `inputs`. Raises `CheckpointError` if it cannot be run."""
    import torch

    with _running(model), torch.no_grad():
        return model(**inputs)


def parameters_on_meta() -> AbstractContextManager[object]:
    """The parameters of modules that are made meanwhile have no memory; their buffers have."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OnMeta(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), named: Any = None
        ) -> Any:
            device = {"device": "meta"} if function is torch.empty else {}
            return function(*arguments, **{**(named or {}), **device})

    return OnMeta()


@contextmanager
def _running(model: Any) -> Iterator[None]:
    """Raises `CheckpointError` for what torch raises of tensors that do not fit."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        what = f"{type(model).__name__} cannot be run: {type(error).__name__}: {error}"
        raise CheckpointError(what) from error
