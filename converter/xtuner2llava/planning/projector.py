"""XTuner's projector: linear layers with an exact GELU between them.

`projector.model` is a Sequential with the linears at even indices (InternLM/xtuner
`xtuner/model/modules/projector/modeling_projector.py`), and so is LLaVA's `mm_projector` of type
`mlp{depth}x_gelu` (haotian-liu/LLaVA `llava/model/multimodal_projector/builder.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xtuner2llava.errors import Fault
from xtuner2llava.tensors import Shape


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
