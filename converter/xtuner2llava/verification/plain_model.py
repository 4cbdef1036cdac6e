"""The real transformers classes: made from a config, and what their tensors are called in files.

Whatever version of transformers is installed: configs are given to it in the words of 4.37, which
all versions read, and names that a version changed in memory are changed back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CorruptFileError, UnsupportedError
from xtuner2llava.storage.json_file import Json

if TYPE_CHECKING:
    import torch

# A hostile config may ask for a billion layers; no model has more than these.
_MOST = {"num_hidden_layers": 1000, "num_local_experts": 1000, "n_layer": 1000}
# Experts in files, and in the memory of transformers 5 (`conversion_mapping.py` there).
_EXPERT = re.compile(
    r"(?P<layer>.+\.)(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\."
    r"(?P<part>w[123]|(?:gate|up|down)_proj)\.weight"
)
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "gate_proj": "gate_proj",
          "up_proj": "up_proj", "down_proj": "down_proj"}  # fmt: skip
_FUSED, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_MIXTRAL_GATE, _GATE = ".block_sparse_moe.gate.weight", ".mlp.gate.weight"
_TOWER = "vision_model."


@dataclass(frozen=True, slots=True)
class ClassShapes:
    """The tensors of a class under the names of files; `optional` ones need not be there."""

    title: str
    shapes: Mapping[str, tuple[int, ...]]
    optional: frozenset[str]


def plain_config(values: Mapping[str, Json]) -> Any:
    """The transformers config with these `values`, of which `model_type` says the class.

    Raises `UnsupportedError` for a `model_type` that the installed transformers does not have, and
    `CorruptFileError` for values that it does not take.
    """
    import transformers
    from transformers import AutoConfig

    given = in_older_words(values)
    model_type = given.pop("model_type", None)
    for key, most in _MOST.items():
        number = given.get(key)
        if isinstance(number, int) and number > most:
            raise CorruptFileError(f"{key} is {number:,}", where="config.json")
    # Neither is about what is computed, and both may name classes that are not known here.
    given.pop("architectures", None)
    given.pop("auto_map", None)
    known = getattr(transformers, "CONFIG_MAPPING", {})
    if not isinstance(model_type, str) or model_type not in known:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no model_type {model_type!r}",
            where="config.json",
        )
    try:
        return AutoConfig.for_model(model_type, **given)
    except Exception as error:
        what = f"transformers does not take it: {type(error).__name__}: {error}"
        raise CorruptFileError(what, where="config.json") from error


def in_older_words(values: Mapping[str, Json]) -> dict[str, Json]:
    """A config with `rope_theta` and `rope_scaling` for transformers 5's `rope_parameters`."""
    result = dict(values)
    rope = result.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        del result["rope_parameters"]
        scaling = dict(rope)
        if "rope_theta" in scaling:
            result["rope_theta"] = scaling.pop("rope_theta")
        kind = scaling.get("rope_type", scaling.get("type"))
        result["rope_scaling"] = scaling if kind not in (None, "default") else None
    return result


def language_model_shapes(values: Mapping[str, Json], found: Iterable[str]) -> ClassShapes:
    """What the class of the config `values` has; a tied head may be left out of `found`."""
    import torch
    import transformers

    classes: Any = transformers
    config = plain_config(values)
    with torch.device("meta"):
        model = _made(lambda: classes.AutoModelForCausalLM.from_config(config))
    shapes = _file_shapes(model)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    head = {"lm_head.weight"} if tied and "lm_head.weight" not in set(found) else set()
    return ClassShapes(type(model).__name__, shapes, frozenset(head))


def tower_shapes(values: Mapping[str, Json]) -> ClassShapes:
    """What `CLIPVisionModel` has with the config `values`."""
    import torch

    with torch.device("meta"):
        model = _made(lambda: new_tower(values))
    shapes = _file_shapes(model, _TOWER)
    optional = frozenset(name for name in shapes if name.endswith("position_ids"))
    return ClassShapes("CLIPVisionModel", shapes, optional)


def new_tower(values: Mapping[str, Json], **others: object) -> Any:
    """A `CLIPVisionModel` with the vision config `values`, where torch puts new tensors."""
    import transformers

    classes: Any = transformers
    ours = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version")
    known = {key: value for key, value in values.items() if key not in ours}
    return classes.CLIPVisionModel(classes.CLIPVisionConfig(**{**known, **others}))


def tower_config_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
    """A vision config for tensors of these shapes; they do not say the number of heads.

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


def installed_names(
    tensors: Mapping[str, torch.Tensor], wanted: Iterable[str]
) -> dict[str, torch.Tensor]:
    """`tensors` of files under the names that the modules of the installed version have.

    transformers 5 has no module `vision_model`, and holds the experts of a layer in two tensors:
    gate and up by expert, and down by expert.
    """
    import torch

    names = set(wanted)
    result = dict(tensors)
    if not any(name.startswith(_TOWER) for name in names):
        result = {name.removeprefix(_TOWER): tensor for name, tensor in result.items()}
    if not any(name.endswith(_FUSED) for name in names):
        return result
    layers: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name in list(result):
        match = _EXPERT.fullmatch(name)
        if match is not None:
            part = _PARTS[match["part"]]
            layers.setdefault(match["layer"], {})[int(match["expert"]), part] = result.pop(name)
        elif name.endswith(_MIXTRAL_GATE):
            result[name.replace(_MIXTRAL_GATE, _GATE)] = result.pop(name)
    for layer, parts in layers.items():
        order = range(1 + max(expert for expert, _ in parts))
        if len(parts) != 3 * len(order):
            continue  # Something is missing, and is missed where names are compared.
        joined = [torch.cat([parts[n, "gate_proj"], parts[n, "up_proj"]]) for n in order]
        result[f"{layer}{_FUSED}"] = torch.stack(joined)
        result[f"{layer}{_DOWN}"] = torch.stack([parts[n, "down_proj"] for n in order])
    return result


def _file_shapes(model: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors as files have them, where all begin with `prefix`."""
    shapes: dict[str, tuple[int, ...]] = {}
    mixtral = getattr(model.config, "model_type", None) == "mixtral"
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith(_FUSED):
            layer = name.removesuffix(_FUSED)
            experts, both, hidden = shape
            for part, kind in _PARTS.items():
                if part.startswith("w") is mixtral:
                    inner = "block_sparse_moe" if mixtral else "mlp"
                    size = (hidden, both // 2) if kind == "down_proj" else (both // 2, hidden)
                    for n in range(experts):
                        shapes[f"{layer}{inner}.experts.{n}.{part}.weight"] = size
        elif mixtral and name.endswith(_GATE):
            shapes[name.replace(_GATE, _MIXTRAL_GATE)] = shape
        elif not name.endswith(_DOWN):
            shapes[name if name.startswith(prefix) else prefix + name] = shape
    return shapes


def _made(make: Any) -> Any:
    """What `make` makes; raises `CorruptFileError` where transformers does not."""
    try:
        return make()
    except Exception as error:
        what = f"transformers makes no model of it: {type(error).__name__}: {error}"
        raise CorruptFileError(what, where="config.json") from error
