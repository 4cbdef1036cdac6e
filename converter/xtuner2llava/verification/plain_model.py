"""The real transformers classes: made from a config, and what their tensors are called in files.

Any version of transformers may be installed: configs are given to it with the keys of 4.37, which
all versions read, and its modules are described by the files that they are loaded from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import ConversionError, CorruptFileError, UnsupportedError
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.sources.model_config import in_437_vocabulary
from xtuner2llava.storage.json_file import Json

if TYPE_CHECKING:
    import torch

# A hostile config may ask for a billion layers; no model has more than these.
_MOST = {
    re.compile(r".*layers?|.*experts"): 1000,
    re.compile(r"image_size|num_channels"): 1 << 14,
}
# Keys that are not about what is computed: classes that may not be known here, matrices that are
# multiplied in slices, and attentions or experts that transformers 5 takes, as code, from the Hub.
_NOT_COMPUTED = re.compile(r"architectures|auto_map|pretraining_tp|_.*|.*_implementation")
# The experts of a layer as transformers 5 holds them (`conversion_mapping.py` there): gate and up
# of each expert in one tensor, and down in another.
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_TOWER = "vision_model."
_Shape = tuple[int, ...]


class NewerModelType(UnsupportedError):
    """A class that a conversion may become, and that the installed transformers does not have."""


def plain_config(values: Mapping[str, Json]) -> Any:
    """The transformers config with these `values`, among them the `model_type` of its class.

    Raises `UnsupportedError` for a `model_type` that the installed transformers does not have, and
    `CorruptFileError` for values that it does not take.
    """
    import transformers
    from transformers import AutoConfig

    spelled = in_437_vocabulary(dict(values)).items()
    given = {key: value for key, value in spelled if not _NOT_COMPUTED.fullmatch(key)}
    _check_counts(given)
    model_type = given.pop("model_type", None)
    known = getattr(transformers, "CONFIG_MAPPING", {})
    if not isinstance(model_type, str) or model_type not in known:
        shipped = [each.model_type for each in Catalogue.shipped().classes.values()]
        missing = NewerModelType if model_type in shipped else UnsupportedError
        raise missing(
            f"transformers {transformers.__version__} has no model_type {model_type!r}",
            where="config.json",
        )
    with _making("config"):
        return AutoConfig.for_model(model_type, **given)


def new_language_model(
    config: Any, kind: type[ConversionError] = CorruptFileError, **options: Any
) -> Any:
    """The causal language model that transformers has for `config`. Raises `kind` if it has none.

    As of `new_tower`, all parameters are where torch puts new tensors.
    """
    import transformers

    classes: Any = transformers
    make = classes.AutoModelForCausalLM.from_config
    with _making("model", kind):
        return make(config, attn_implementation="eager", **options).float().eval()


def new_tower(values: Mapping[str, Json]) -> Any:
    """A `CLIPVisionModel` with the vision config `values`."""
    import transformers

    classes: Any = transformers
    _check_counts(values)
    ours = ("model_type", "torch_dtype", "dtype", "transformers_version")
    known = {
        key: value
        for key, value in values.items()
        if key not in ours and not _NOT_COMPUTED.fullmatch(key)
    }
    with _making("model"):
        config = classes.CLIPVisionConfig(**known, attn_implementation="eager")
        return classes.CLIPVisionModel(config).float().eval()


def project(hidden: torch.Tensor, projector: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What `projector` makes of the hidden states of a tower, (1, 1 + patches, hidden size).

    That is without the class token. It is linear layers, "0.weight" or "weight" if there is one,
    with an exact GELU between them (LLaVA `multimodal_projector/builder.py`).
    """
    from torch.nn import functional

    made = hidden[:, 1:]
    prefixes = {name.removesuffix("weight").removesuffix("bias") for name in projector}
    for number, prefix in enumerate(sorted(prefixes, key=lambda each: int(each.rstrip(".") or 0))):
        made = functional.gelu(made) if number else made
        made = functional.linear(made, projector[f"{prefix}weight"], projector[f"{prefix}bias"])
    return made


def tower_config_of_shapes(shapes: Mapping[str, _Shape]) -> dict[str, Json]:
    """A vision config for tensors of these shapes; the number of heads cannot be seen in them.

    Raises `CorruptFileError` where there are no such tensors.
    """
    inner = f"{_TOWER}encoder.layers."
    layers = [int(n.split(".")[3]) for n in shapes if re.match(re.escape(inner) + r"\d{1,4}\.", n)]
    patch = shapes.get(f"{_TOWER}embeddings.patch_embedding.weight", ())
    positions = shapes.get(f"{_TOWER}embeddings.position_embedding.weight", ())
    wide = shapes.get(f"{inner}0.mlp.fc1.weight", ())
    if len(patch) != 4 or len(positions) != 2 or len(wide) != 2 or positions[0] < 2:
        raise CorruptFileError("lacks the embeddings or the first layer of a CLIP tower")
    side = math.isqrt(positions[0] - 1)
    return {
        "hidden_size": patch[0],
        "intermediate_size": wide[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": 1,
        "num_channels": patch[1],
        "patch_size": patch[2],
        "image_size": side * patch[2],
    }


def in_files(model: Any) -> dict[str, list[tuple[str, _Shape]]]:
    """For each tensor of `model`, the names and shapes of what files have in its place.

    That is the tensor itself, under the same name or another; or, for the experts of a layer that
    are one tensor here, those whose concatenation it is.
    """
    kind = getattr(model.config, "model_type", None)
    experts, *gate_up, down = (
        ("block_sparse_moe", "w1", "w3", "w2")
        if kind == "mixtral"
        else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    found: dict[str, list[tuple[str, _Shape]]] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        stored = name
        if name.endswith((_GATE_UP, _DOWN)):
            parts = gate_up if name.endswith(_GATE_UP) else [down]
            inner = f"{name.removesuffix(_GATE_UP).removesuffix(_DOWN)}{experts}.experts"
            size = (shape[1] // len(parts), shape[2])
            found[name] = [
                (f"{inner}.{n}.{part}.weight", size) for n in range(shape[0]) for part in parts
            ]
            continue
        if kind == "mixtral":
            stored = name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")
        elif kind == "clip_vision_model" and not name.startswith(_TOWER):
            stored = _TOWER + name
        found[name] = [(stored, shape)]
    return found


def _check_counts(values: Mapping[str, Json]) -> None:
    """Raises `CorruptFileError` for a model that would take all time or memory to make."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif isinstance(value, int):
            for pattern, most in _MOST.items():
                if value > most and pattern.fullmatch(key):
                    raise CorruptFileError(f"{key} is {value:,}", where="config.json")


@contextmanager
def _making(what: str, kind: type[ConversionError] = CorruptFileError) -> Iterator[None]:
    """Raises `kind` where transformers makes no `what`; changes no random numbers."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except Exception as error:
        text = f"transformers makes no {what} of it: {type(error).__name__}: {error}"
        raise kind(text, where="config.json") from error
