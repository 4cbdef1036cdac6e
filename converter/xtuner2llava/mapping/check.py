"""Whether what a mapping makes is what the plain class has: same names, same shapes."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.apply import Origin
from xtuner2llava.mapping.fold import Suggestions, TensorFaults, fold, shortened
from xtuner2llava.mapping.plain_class import Expected, PlainClass


def check_against_class(
    plain: PlainClass,
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    origins: Mapping[str, Origin] | None = None,
) -> list[Fault]:
    """What is missing from `shapes`, what is too many, and what has another shape.

    `config` is a complete one of the class. Tensors that it ties may be there or not, and have
    their shape if they are. `origins` tells which rule made a tensor, so that a fault can point
    at it. Raises `MappingError` where the config makes no shapes.
    """
    expected = plain.tensors(config)
    tied = plain.tied_names(config)
    made_by = {name: origin.where for name, origin in (origins or {}).items()}
    extra = [name for name in shapes if name not in expected]
    lacking = [name for name in expected if name not in shapes and name not in tied]
    wrong = TensorFaults()
    for name, shape in shapes.items():
        if name in expected and tuple(shape) != expected[name].shape:
            where = made_by.get(name, expected[name].where)
            wrong.add(where, name, *_wrong_shape(plain, config, tuple(shape), expected[name]))
    faults = [*_lacking(plain, expected, lacking, extra), *wrong.faults()]
    too_many = TensorFaults()
    for name in extra:
        too_many.add(
            made_by.get(name, plain.file.name),
            name,
            f"is not a tensor of {plain.architecture} with this config",
            "Drop it with a reason, or give it the name that it has there.",
        )
    return shortened([*faults, *too_many.faults()])


def _wrong_shape(
    plain: PlainClass, config: Mapping[str, object], shape: tuple[int, ...], expected: Expected
) -> tuple[str, str]:
    """What is wrong with a shape, and which config keys the tensor contradicts."""
    what = (
        f"has shape {list(shape)}, {plain.architecture} expects "
        f"[{', '.join(expected.formulas)}] = {list(expected.shape)}"
    )
    doubtful = []
    if len(shape) == len(expected.shape):
        sizes = zip(expected.formulas, expected.shape, shape, strict=True)
        doubtful = [
            f"`{formula}` is {wanted} in the config, the tensor says {found}."
            for formula, wanted, found in sizes
            if wanted != found and formula in config
        ]
    return what, " ".join([*doubtful, f"The shape stands in {expected.where}."])


def _lacking(
    plain: PlainClass, expected: Mapping[str, Expected], lacking: list[str], extra: list[str]
) -> list[Fault]:
    meant = Suggestions({folded.template: str(folded) for folded in fold(extra)})
    faults = TensorFaults()
    for name in lacking:
        near = meant.near(name)
        what = f"is missing: {plain.architecture} has it and no rule makes it"
        advice = f"{near} is like it, and not expected." if near else ""
        faults.add(expected[name].where, name, what, advice)
    return faults.faults()
