"""Whether what a mapping makes is what the plain class has: same names, same shapes."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.apply import Origin
from xtuner2llava.mapping.names import Suggestions, TensorFaults, fold, shortened
from xtuner2llava.mapping.plain_class import ExpectedTensor, PlainClass


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
    expected, tied = plain.tensors(config), plain.tied_names(config)
    made_by = {name: origin.where for name, origin in (origins or {}).items()}
    extra = [name for name in shapes if name not in expected]
    lacking, wrong, too_many = TensorFaults(), TensorFaults(), TensorFaults()
    like = Suggestions({folded.template: str(folded) for folded in fold(extra)})
    for name, tensor in expected.items():
        if name not in shapes and name not in tied:
            what = f"is missing: {plain.architecture} has it and no rule makes it"
            near = like.near(name)
            advice = f"{near} is like it, and not expected." if near else ""
            lacking.add(tensor.where, name, what, advice)
    for name, shape in shapes.items():
        one = expected.get(name)
        if one is None:
            too_many.add(
                made_by.get(name, plain.file.name),
                name,
                f"is not a tensor of {plain.architecture} with this config",
                "Drop it with a reason, or give it the name that it has there.",
            )
        elif tuple(shape) != one.shape:
            where = made_by.get(name, one.where)
            wrong.add(where, name, *_wrong_shape(plain, config, tuple(shape), one))
    return shortened([*lacking.faults(), *wrong.faults(), *too_many.faults()])


def _wrong_shape(
    plain: PlainClass, config: Mapping[str, object], shape: tuple[int, ...], one: ExpectedTensor
) -> tuple[str, str]:
    """What is wrong with a shape, by the config keys that it contradicts where there are any."""
    if len(shape) == len(one.shape):
        sizes = zip(one.formulas, one.shape, shape, strict=True)
        doubtful = {
            f"{found} where the config has `{formula}: {wanted}`": formula
            for formula, wanted, found in sizes
            if wanted != found and formula in config
        }
        if doubtful:
            keys = " and ".join(f"`{key}`" for key in doubtful.values())
            advice = f"{keys} must be that of the model that was trained, in its config or mapping."
            return f"has {' and '.join(doubtful)}", advice
    formulas = ", ".join(one.formulas)
    what = f"has shape {list(shape)}, {plain.architecture} expects [{formulas}] = {list(one.shape)}"
    return what, f"The shape stands in {one.where}."
