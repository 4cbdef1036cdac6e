"""The vision tower of a plan and its name, and the projector: what they must be.

LLaVA and LLaVA-NeXT make the tower from the config of `mm_vision_tower` and prepare images with the
image processor there, not from those in the converted folder (haotian-liu/LLaVA
`llava/model/multimodal_encoder/clip_encoder.py`, `load_model`); the weights alone are replaced by
the folder's. So a name fits a tower only where every value of both agrees with it. Both builders
take an existing path, a name that starts with `openai` or `laion`, or one with `ShareGPT4V` in it,
and raise `ValueError: Unknown vision tower` for others (`llava/model/multimodal_encoder/builder.py`
of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT; what NeXT takes besides are not CLIP towers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from xtuner2llava.errors import Fault, MappingError, PlanError, UsageError, raise_faults
from xtuner2llava.mapping.plain_class import PlainClass, check_against_class
from xtuner2llava.sources.artifact import PROJECTOR
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.sources.model_config import CLIP_VISION_DEFAULTS
from xtuner2llava.storage.json_file import Json, integer, read_json
from xtuner2llava.tensors.lazy import LazyTensor, Shape

# The plain class that every tower is.
TOWER_CLASS = "clip_vision_model"
KEY = "mm_vision_tower"
_ADVICE = (
    "Give --vision-tower-name ID, a Hub id that starts with openai or laion and holds this config "
    "and image processor, or a path that exists where the model will be used; --format hf needs no "
    "name."
)
# The owners under whose names the builders look on the Hub; any other `owner/name` is a path there.
_HUB_ID = re.compile(r"(openai|laion|Lin-Chen(?=/ShareGPT4V))/[\w.-]+", re.ASCII)
_SHOWN = 4  # differences in a message
# Hostile names have larger indices.
_LINEAR = re.compile(r"model\.(\d{1,3})\.(?:weight|bias)", re.ASCII)

# Of CLIPVisionConfig, the keys that decide what a tower computes; `projection_dim` does not.
_CONFIG = {key: value for key, value in CLIP_VISION_DEFAULTS.items() if key != "projection_dim"}
# With another of these, loading fails; with another of the rest, LLaVA computes other features.
_SHAPES = frozenset(_CONFIG) - {"hidden_act", "layer_norm_eps", "num_attention_heads"}
# Absent keys mean these (transformers 4.37.2 `models/clip/image_processing_clip.py`,
# CLIPImageProcessor).
_PROCESSOR: Mapping[str, Json] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
PROCESSOR_KEYS = tuple(_PROCESSOR)
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "patch_size", "image_size")  # fmt: skip
# Processors save their numbers from float32 or float64.
_TOLERANCE = 1e-6


def clip_processor(values: Mapping[str, Json]) -> dict[str, Json]:
    """A preprocessor_config.json as CLIPImageProcessor understands it, every value explicit.

    A bare number is the shortest edge for `size`, both edges for `crop_size` (transformers
    `image_processing_utils.py`, `get_size_dict`).
    """
    result = {**_PROCESSOR, **{key: values[key] for key in _PROCESSOR if key in values}}
    for key, edges in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
        sizes = result[key]
        if isinstance(sizes, int):
            result[key] = dict.fromkeys(edges, sizes)
        elif isinstance(sizes, dict):  # Some versions write all edges, None where one is not meant.
            result[key] = {edge: n for edge, n in sizes.items() if n is not None}
    return result


@dataclass(frozen=True, slots=True)
class PublishedTower:
    """What a repository of OpenAI's holds: values of CLIPVisionConfig and CLIPImageProcessor."""

    config: Mapping[str, Json]
    processor: Mapping[str, Json]

    @classmethod
    def of(cls, *sizes: int) -> PublishedTower:
        """The tower with `_SIZES`, whose processor makes images of the last of them."""
        config = {**_CONFIG, **dict(zip(_SIZES, sizes, strict=True))}
        return cls(config, clip_processor({"size": sizes[-1], "crop_size": sizes[-1]}))

    def differences(
        self, config: Mapping[str, Json], processor: Mapping[str, Json]
    ) -> _Differences:
        """Where a tower's `config` and image `processor` say something else."""
        here = {**_CONFIG, **config, **clip_processor(processor)}
        there = {**self.config, **self.processor}
        keys = [key for key in there if not _equal(here[key], there[key])]
        texts = [
            f"{key} is {here[key]!r} here and {there[key]!r} there"
            for key in sorted(keys, key=lambda key: key not in _SHAPES)
        ]
        more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
        return _Differences(", ".join([*texts[:_SHOWN], *more]), not _SHAPES.isdisjoint(keys))


class _Differences(NamedTuple):
    """A list for a message, empty where there are none, and whether tensors have other shapes."""

    listed: str
    of_shape: bool


# The CLIP vision towers that OpenAI published: all that LLaVA loads by one of their names.
PUBLISHED: Mapping[str, PublishedTower] = {
    "openai/clip-vit-large-patch14-336": PublishedTower.of(1024, 4096, 24, 16, 14, 336),
    "openai/clip-vit-large-patch14": PublishedTower.of(1024, 4096, 24, 16, 14, 224),
    "openai/clip-vit-base-patch16": PublishedTower.of(768, 3072, 12, 12, 16, 224),
    "openai/clip-vit-base-patch32": PublishedTower.of(768, 3072, 12, 12, 32, 224),
}


def _equal(one: Json, other: Json) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_TOLERANCE)
    return one == other


# The name


class VisionTowerName(NamedTuple):
    """The name to write, and a note on it for the user, if one is needed."""

    name: str
    note: str | None = None


def vision_tower_name(
    given: str | None,
    recorded: str | None,
    tower: Mapping[str, Json],
    processor: Mapping[str, Json],
    *,
    writes_tower: bool = True,
) -> VisionTowerName:
    """The name for a tower with the config `tower` and the image processor `processor`.

    `given` is what the user names; `recorded` is what the XTuner config names, or the Hub
    repository that the tower was read from. Without `writes_tower`, LLaVA takes the weights too by
    that name.
    Raises `UsageError` where LLaVA would silently compute something else with the name, and where
    only an absolute path is known, which must not be published.
    """
    name = recorded if given is None else given.rstrip("/")  # The Hub has no such names.
    is_local = name is not None and is_absolute(name)
    if given is not None and is_local:
        raise UsageError(
            f"'{given}' is a path of one machine, which must not be published",
            where="--vision-tower-name",
            advice=_ADVICE,
        )
    if name is not None and name in PUBLISHED:
        differences = PUBLISHED[name].differences(tower, processor)
        if not differences.listed:
            return VisionTowerName(name)
        if given is not None and differences.of_shape:
            said = f"{KEY} is '{name}', as asked, and LLaVA cannot load this tower by it"
            return VisionTowerName(name, f"{said}: {differences.listed}.")
        what = "--vision-tower-name is" if given is not None else "the tower is recorded as"
        raise UsageError(
            f"{what} '{name}', but LLaVA would load another config or image processor from there: "
            f"{differences.listed}",
            where=KEY,
            advice=_ADVICE,
        )
    if name is not None and given is not None:
        return VisionTowerName(name, None if is_known_to_llava(name) else _unknown(name))
    if name is not None and _HUB_ID.fullmatch(name) and not Path(name).exists():
        return VisionTowerName(name)
    agreeing, nearest = well_known(tower, processor), _nearest(tower, processor)
    if agreeing is not None and writes_tower:
        what = "no name is recorded" if name is None else f"the tower is known here as '{name}'"
        return VisionTowerName(
            agreeing,
            f"{KEY} is '{agreeing}': its config and image processor, which is all that LLaVA takes "
            f"from there, are this tower's; {'a path is recorded' if is_local else what}.",
        )
    if name is not None and not is_local:
        return VisionTowerName(name, f"{_unknown(name)} {nearest}".strip())
    raise UsageError(
        "the vision tower is known only by a path of this machine, which must not be published"
        if is_local
        else "nothing says what the vision tower is called",
        where=KEY,
        advice=f"{nearest} {_ADVICE}".strip(),
    )


def well_known(tower: Mapping[str, Json], processor: Mapping[str, Json]) -> str | None:
    """The published tower from which LLaVA would load exactly this config and processor."""
    fits = (n for n, one in PUBLISHED.items() if not one.differences(tower, processor).listed)
    return next(fits, None)


def is_known_to_llava(name: str) -> bool:
    """Whether both builders take the name wherever they run, and it can be a repository."""
    return _HUB_ID.fullmatch(name) is not None or "ShareGPT4V" in name


def _unknown(name: str) -> str:
    return (
        f"{KEY} is '{name}'. LLaVA and LLaVA-NeXT find that only where it exists as a path: of "
        "names, they take those that start with openai or laion. --vision-tower-name gives another."
    )


def _nearest(tower: Mapping[str, Json], processor: Mapping[str, Json]) -> str:
    """Why a published tower of the same shapes is not taken; empty where there is none."""
    for name, one in PUBLISHED.items():
        differences = one.differences(tower, processor)
        if not differences.listed:
            return f"'{name}' has this config; whether its weights are these is not known."
        if not differences.of_shape:
            return f"It is not '{name}', whose shapes it has: {differences.listed}."
    return ""


def is_absolute(path: str) -> bool:
    """Whether it is a path of one machine, of any system."""
    return (
        PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).is_absolute()
        or path.startswith("~")
    )


# The parts


def check_tower(
    config: Mapping[str, Json], tensors: Mapping[str, LazyTensor], plain: PlainClass
) -> dict[str, object]:
    """The tower's complete config. Raises `MappingError` if it is not `plain`."""
    values, faults = plain.complete(dict(config))
    # Older checkpoints carry this buffer; the format drops it.
    shapes = {n: t.shape for n, t in tensors.items() if not n.endswith("position_ids")}
    if shapes and not faults:
        faults = check_against_class(plain, values, shapes)
    raise_faults(MappingError, faults)
    return values


def check_projector(checkpoint: Checkpoint, llm_hidden: object) -> None:
    """Raises `PlanError` with all that keeps the projector from being LLaVA's.

    `llm_hidden` is the `hidden_size` of the LLM's plain class, since families spell it in their own
    ways. Where a size is not known, there are faults already, and nothing is compared.
    """
    tower = checkpoint.visual_encoder.config
    vision_hidden = integer(tower.values, "hidden_size") if tower else None
    if not isinstance(llm_hidden, int) or vision_hidden is None:
        return
    shapes = {name: tensor.shape for name, tensor in checkpoint.projector.tensors.items()}
    faults = projector_faults(shapes, vision_hidden, llm_hidden, str(checkpoint.artifact.path))
    home = checkpoint.artifact.folders.get(PROJECTOR)
    if home is not None and (home / "config.json").is_file():
        activation = read_json(home / "config.json").get("hidden_act", "gelu")
        if activation != "gelu":
            faults.append(
                Fault(
                    f"{home}/config.json",
                    f"the projector's hidden_act is {activation!r}",
                    "LLaVA's mlp projectors compute gelu, and its config names no other one.",
                )
            )
    raise_faults(PlanError, faults)


def depth_of(names: Iterable[str]) -> int:
    """The number of linear layers among tensor names such as `model.2.weight`."""
    indices = [int(found[1]) for found in map(_LINEAR.fullmatch, names) if found]
    return max(indices, default=0) // 2 + 1


def projector_faults(
    shapes: Mapping[str, Shape], vision_hidden: int, llm_hidden: int, where: str
) -> list[Fault]:
    """What keeps the projector from being LLaVA's: layers missing, of other sizes, or no bias.

    XTuner's projector is linear layers with an exact GELU between them. `projector.model` is a
    Sequential with the linears at even indices (InternLM/xtuner
    `xtuner/model/modules/projector/modeling_projector.py`), and so is LLaVA's `mm_projector` of
    type `mlp{depth}x_gelu` (haotian-liu/LLaVA `llava/model/multimodal_projector/builder.py`).
    """
    expected: dict[str, Shape] = {}
    for layer in range(depth_of(shapes)):
        inputs = vision_hidden if layer == 0 else llm_hidden
        expected[f"model.{2 * layer}.weight"] = (llm_hidden, inputs)
        expected[f"model.{2 * layer}.bias"] = (llm_hidden,)
    if not any(name in shapes for name in expected if name.endswith("bias")):
        return [Fault(where, "a projector without bias", "LLaVA's mlp projectors always have one.")]
    faults = []
    for name in dict.fromkeys([*expected, *sorted(shapes)]):
        found, wanted = shapes.get(name), expected.get(name)
        if found == wanted:
            continue
        what, advice = "is missing" if found is None else "is unexpected", ""
        if found is not None and wanted is not None:
            what = (
                f"has shape {list(found)}, expected {list(wanted)} = "
                "[LLM hidden_size, vision or LLM hidden_size]"
            )
            advice = "Do the base LLM and the base vision tower belong to this checkpoint?"
        faults.append(Fault(f"{where}, projector.{name}", what, advice))
    return faults
