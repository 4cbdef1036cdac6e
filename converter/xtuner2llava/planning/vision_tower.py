"""The vision tower and the projector of a plan: what they must be.

XTuner's projector is linear layers with an exact GELU between them. `projector.model` is a
Sequential with the linears at even indices (InternLM/xtuner
`xtuner/model/modules/projector/modeling_projector.py`), and so is LLaVA's `mm_projector` of type
`mlp{depth}x_gelu` (haotian-liu/LLaVA `llava/model/multimodal_projector/builder.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xtuner2llava.errors import Fault, MappingError, PlanError, raise_faults
from xtuner2llava.mapping import PlainClass, check_against_class
from xtuner2llava.options import Options
from xtuner2llava.sources import Checkpoint
from xtuner2llava.sources.artifact import PROJECTOR
from xtuner2llava.storage.json_file import integer, read_json
from xtuner2llava.tensors import Shape

# The plain class that every tower is.
TOWER_CLASS = "clip_vision_model"


def writes_tower(checkpoint: Checkpoint, options: Options) -> bool:
    """Whether the tower's tensors are written. Raises `PlanError` if they must be and may not."""
    if not options.include_vision_tower and checkpoint.visual_encoder.trained:
        raise PlanError(
            "the vision tower was trained, so it must be written",
            where="--no-include-vision-tower",
            advice="Leave the option out.",
        )
    return options.include_vision_tower


def check_tower(checkpoint: Checkpoint, plain: PlainClass) -> dict[str, object] | None:
    """The tower's complete config, if there is one. Raises `MappingError` if it is not `plain`."""
    tower = checkpoint.visual_encoder
    if tower.config is None:
        return None
    values, faults = plain.complete(dict(tower.config.values))
    # Older checkpoints carry this buffer; the format drops it.
    shapes = {n: t.shape for n, t in tower.tensors.items() if not n.endswith("position_ids")}
    if shapes and not faults:
        faults = check_against_class(plain, values, shapes)
    raise_faults(MappingError, faults)
    return values


def check_projector_of(checkpoint: Checkpoint, llm: Mapping[str, object] | None) -> None:
    """Raises `PlanError` with all that keeps the projector from being LLaVA's.

    `llm` is the config of the plain class, since families spell `hidden_size` in their own ways;
    without it, there are faults already, and sizes are not compared.
    """
    tower = checkpoint.visual_encoder.config
    hidden = llm.get("hidden_size") if llm is not None else None
    vision_hidden = integer(tower.values, "hidden_size") if tower else None
    if not isinstance(hidden, int) or vision_hidden is None:
        return
    shapes = {name: tensor.shape for name, tensor in checkpoint.projector.tensors.items()}
    faults = check_projector(shapes, vision_hidden, hidden, str(checkpoint.artifact.path))
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
    found = [name.split(".") for name in names]
    indices = [int(parts[1]) for parts in found if len(parts) == 3 and parts[1].isdecimal()]
    return max(indices, default=0) // 2 + 1


def check_projector(
    shapes: Mapping[str, Shape], vision_hidden: int, llm_hidden: int, where: str
) -> list[Fault]:
    """What keeps the projector from being LLaVA's: layers missing, of other sizes, or no bias."""
    faults: list[Fault] = []
    expected: dict[str, Shape] = {}
    for layer in range(depth_of(shapes)):
        inputs = vision_hidden if layer == 0 else llm_hidden
        expected[f"model.{2 * layer}.weight"] = (llm_hidden, inputs)
        expected[f"model.{2 * layer}.bias"] = (llm_hidden,)
    biases = [name for name in expected if name.endswith("bias")]
    if biases and not any(name in shapes for name in biases):
        return [Fault(where, "a projector without bias", "LLaVA's mlp projectors always have one.")]
    for name, shape in expected.items():
        if name not in shapes:
            faults.append(Fault(f"{where}, projector.{name}", "is missing"))
        elif shapes[name] != shape:
            faults.append(
                Fault(
                    f"{where}, projector.{name}",
                    f"has shape {list(shapes[name])}, expected {list(shape)} = "
                    "[LLM hidden_size, vision or LLM hidden_size]",
                    "Do the base LLM and the base vision tower belong to this checkpoint?",
                )
            )
    faults.extend(
        Fault(f"{where}, projector.{name}", "is unexpected") for name in set(shapes) - set(expected)
    )
    return faults
