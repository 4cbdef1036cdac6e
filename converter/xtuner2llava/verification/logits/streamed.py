"""The two models inside a LLaVA, in the memory of one module.

The real classes are made without memory for their parameters. Those of a module are read as it
begins to run, and dropped as it ends; a model of any size runs, in any version of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CheckpointError, ConversionError, UnsupportedError
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import BY_NAME, FLOAT32, LazyTensor, cast, concat, row_blocks, split
from xtuner2llava.tensors.lazy import Derived
from xtuner2llava.verification.plain_model import in_files, new_tower, projector_prefixes

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, LazyTensor]

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


class Streamed:
    """A `model` without parameters, which are read from `weights`, by their names in files.

    The modules called `apart` need none. Raises `CheckpointError` unless `weights` has exactly
    those of the others. `nbytes` counts what was read, as float32.
    """

    def __init__(self, model: Any, weights: Weights, apart: Sequence[str] = ()) -> None:
        self.model, self.weights, self.nbytes = model, weights, 0
        self._files = {n: [file for file, _ in parts] for n, parts in in_files(model).items()}
        wanted = {f"{name}.weight" for name in apart}
        for name, module in model.named_modules():
            own = [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]
            if own and name not in apart:
                wanted |= {file for each in own for file in self._files[each]}
                module.register_forward_pre_hook(partial(self._read, name))
                module.register_forward_hook(_drop)
        there = weights.keys() | {f"{name}.weight" for name in apart}
        different = [n for n in sorted(there ^ wanted) if not n.endswith(_BUFFERS)]
        if different:
            raise CheckpointError(
                f"{type(model).__name__} and the tensors to run it with differ in "
                f"{', '.join(different[:3])}"
            )

    def __call__(self, **inputs: Any) -> Any:
        """What the model makes of `inputs`. Raises `CheckpointError` if it cannot be run."""
        import torch

        with _running(self.model), torch.no_grad():
            return self.model(**inputs)

    def _read(self, name: str, module: Any, _: Any) -> None:
        import torch
        from torch.nn import Parameter

        for each, parameter in list(module.named_parameters(recurse=False)):
            files = self._files[f"{name}.{each}"]
            parts = [whole(self.weights[file]) for file in files]
            value = parts[0] if len(parts) == 1 else torch.cat(parts).view(parameter.shape)
            if value.shape != parameter.shape:
                shapes = f"{list(value.shape)}, expected {list(parameter.shape)}"
                raise CheckpointError(f"{files[0]} has shape {shapes}")
            setattr(module, each, Parameter(value, requires_grad=False))
            self.nbytes += value.nbytes


def _drop(module: Any, _: Any, output: Any) -> None:
    from torch.nn import Parameter

    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, Parameter(parameter.to("meta"), requires_grad=False))


class LanguageModel:
    """A causal language model of the class of `config`, with `weights` by their names in files.

    `embedding` and `head` are (vocabulary, hidden size). Raises `ConversionError` where it cannot
    be run; `trust` executes code beside the model.
    """

    def __init__(self, config: Any, weights: Weights, *, trust: bool = False) -> None:
        import torch
        import transformers

        classes: Any = transformers
        make = partial(classes.AutoModelForCausalLM.from_config, attn_implementation="eager")
        options = {"trust_remote_code": True} if trust else {}
        model = _without_memory(lambda: make(config, **options))
        self.title = type(model).__name__
        names = {module: name for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if type(head).__name__ != "Linear" or head not in names or embedding not in names:
            raise UnsupportedError(f"the head of {self.title} is not a plain linear layer")
        apart = [names[embedding], names[head]]
        self._streamed, self._weights = Streamed(model, weights, apart), weights
        if f"{apart[0]}.weight" not in weights:
            raise CheckpointError(f"{apart[0]}.weight is missing")
        self.embedding = weights[f"{apart[0]}.weight"]
        self.head = weights.get(f"{apart[1]}.weight", self.embedding)
        # What goes into it is enough: a block of rows at a time makes the logits of that.
        head.weight, head.bias = torch.nn.Parameter(torch.zeros(1, head.in_features)), None
        head.register_forward_pre_hook(self._before_head)
        lists = [module for module in names if isinstance(module, torch.nn.ModuleList)]
        self._layers = names[min(lists, key=lambda each: names[each].count("."))]
        for number, layer in enumerate(model.get_submodule(self._layers)):
            layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            layer.register_forward_hook(partial(self._after_layer, number))
        self._nudge = False
        self._seen: Callable[[str, torch.Tensor], None] | None = None
        self._normed: Any = None

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """(1, ids, hidden size) in float32; only the rows of `ids` are read."""
        import torch

        return torch.cat([self.embedding.read(n, n + 1).float() for n in ids])[None]

    def run(
        self,
        embedded: torch.Tensor,
        *,
        nudge: bool = False,
        weights: Weights | None = None,
        seen: Callable[[str, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """What goes into the head, (positions, hidden size), for `embedded` as `embed` makes them.

        With `nudge`, every hidden state is off by half a unit in its last place. `weights` are used
        instead of the model's own. `seen` is called with what comes out of each layer.
        """
        self._streamed.weights = weights or self._weights
        self._nudge, self._seen = nudge, seen
        self._streamed(inputs_embeds=nudged(embedded) if nudge else embedded, use_cache=False)
        normed: torch.Tensor = self._normed
        return normed

    @property
    def nbytes(self) -> int:
        return self._streamed.nbytes

    def exchanged(self) -> dict[str, Weights]:
        """The weights with two kinds of tensors of the middle layer exchanged, by these kinds."""
        layer = f"{self._layers}.{len(self._streamed.model.get_submodule(self._layers)) // 2}."
        inner = {name: each for name, each in self._weights.items() if name.startswith(layer)}
        return {what: {**self._weights, **wrong} for what, wrong in wrong_layers(inner).items()}

    def _before_layer(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not self._nudge:
            return None
        if arguments:
            return (nudged(arguments[0]), *arguments[1:]), named
        return arguments, {**named, "hidden_states": nudged(named["hidden_states"])}

    def _after_layer(self, number: int, module: Any, arguments: Any, output: Any) -> None:
        if self._seen is not None:
            self._seen(f"layer {number}", output[0] if isinstance(output, tuple) else output)

    def _before_head(self, module: Any, arguments: tuple[Any, ...]) -> None:
        self._normed = arguments[0][0]


@dataclass(frozen=True, slots=True)
class ClipTower:
    """A CLIP tower and the projector behind it."""

    config: Mapping[str, Json]
    weights: Weights
    projector: Weights
    select_layer: int

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What stands for the image, (1, patches, hidden size of the LLM), in float32."""
        from torch.nn import functional

        model = _without_memory(lambda: new_tower(self.config, attn_implementation="eager"))
        states = Streamed(model, self.weights)(pixel_values=pixels, output_hidden_states=True)
        with _running(model):
            # Without the class token; linear layers with an exact GELU between them.
            hidden: torch.Tensor = states.hidden_states[self.select_layer][:, 1:]
            for number, prefix in enumerate(projector_prefixes(self.projector)):
                weight, bias = (whole(self.projector[prefix + kind]) for kind in ("weight", "bias"))
                hidden = functional.gelu(hidden) if number else hidden
                hidden = functional.linear(hidden, weight, bias)
        return hidden


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


def _without_memory(make: Callable[[], Any]) -> Any:
    """The model that `make` makes, its parameters without memory and its buffers with.

    Raises `UnsupportedError` where transformers makes none.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class OnMeta(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), named: Any = None
        ) -> Any:
            device = {"device": "meta"} if function is torch.empty else {}
            return function(*arguments, **{**(named or {}), **device})

    with _running(make, UnsupportedError), torch.random.fork_rng(devices=[]), OnMeta():
        return make().float().eval()


@contextmanager
def _running(model: Any, kind: type[ConversionError] = CheckpointError) -> Iterator[None]:
    """Raises `kind` for what transformers and torch raise of a config and its tensors."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        what = f"{type(model).__name__} cannot be run: {type(error).__name__}: {error}"
        raise kind(what) from error
