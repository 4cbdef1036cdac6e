"""Plain transformers classes as data: config keys, exact names and shapes, and what is not theirs.

A file of `mappings/classes/` says what a class of transformers 4.37.2 is, the version that LLaVA
pins, so that a plan can be checked strictly without importing transformers (two seconds) and
with any version of it. A test compares the files with the real classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.apply import Expansion, Origin
from xtuner2llava.mapping.config_rules import Requirements, failures
from xtuner2llava.mapping.expressions import Environment, Expression, same, show
from xtuner2llava.mapping.names import Suggestions, TensorFaults, fold, shortened
from xtuner2llava.mapping.rules import RuleOrBlock, read_shapes
from xtuner2llava.mapping.schema import GIVEN, KINDS, Reader, key
from xtuner2llava.mapping.yaml import Document

# Of keys whose default may be null: values of the kind that each has else.
_NULLABLE: Mapping[str, object] = {"rope_scaling": {}, "sliding_window": 0, "hidden_activation": ""}


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """The shape that a class gives a tensor, how its file writes it, and where."""

    shape: tuple[int, ...]
    formulas: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class ClassKeys:
    """The config keys of a class.

    `default` is the value that the config class takes for a key that is missing, and `when_null`
    that for a key that is null. `optional` are keys that only later versions read, with the value
    that each has where it is left out; they are written where they have another one. `checked` are
    keys of other versions or classes, which `require` reads and which are never written.
    """

    required: tuple[str, ...] = ()
    default: Mapping[str, object] = field(default_factory=dict)
    when_null: Mapping[str, Expression] = field(default_factory=dict)
    optional: Mapping[str, Expression] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    requirements: Requirements = field(metadata=key("require"), default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainClass:
    """A class of transformers 4.37.2.

    `dims` are names for sizes in the shapes. With tie_word_embeddings, each of `tied` is the same
    as the tensor that it names.
    """

    name: str = field(metadata=key("class"))
    architecture: str
    model_type: str
    config: ClassKeys
    entries: Annotated[tuple[RuleOrBlock, ...], read_shapes] = field(metadata=key("tensors"))
    dims: Mapping[str, Expression] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    file: Document = field(metadata=GIVEN)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its config, as it is written."""
        return (*self.config.required, *self.config.default)

    @property
    def known(self) -> tuple[str, ...]:
        """`keys`, and those that are optional or only checked."""
        return (*self.keys, *self.config.optional, *self.config.checked)

    def complete(self, values: Mapping[str, object]) -> tuple[dict[str, object], list[Fault]]:
        """`values` with every key of the class, and a fault for each that it cannot be.

        Keys that the class does not have are left out, and `optional` ones that say what is so
        without them; `checked` ones are only checked.
        """
        keys = self.config
        config = {name: _whole(values.get(name)) for name in keys.required}
        config |= {name: values.get(name, default) for name, default in keys.default.items()}
        wrong: dict[str, str] = {}
        for name in keys.required:  # Sizes, all of them.
            size = config[name]
            if size is None:
                wrong[name] = f"is missing, and {self.architecture} needs it"
            elif type(size) is not int or size < 1:
                wrong[name] = f"is {show(size)}, expected a positive whole number"
        if wrong:
            return config, self._faults(wrong)
        usual = {**keys.default, **{n: _NULLABLE[n] for n in keys.default.keys() & _NULLABLE}}
        try:
            for name, expression in keys.when_null.items():
                usual[name] = expression.value(config)
                if config.get(name) is None:
                    config[name] = usual[name]
            for name, expression in keys.optional.items():
                usual[name], value = expression.value(config), values.get(name)
                if value is not None and not same(value, usual[name]):
                    config[name] = value
            for name, value in [*config.items()]:
                if type(usual.get(name)) is int:
                    config[name] = _whole(value)
                if expected := _expected_kind(config[name], usual.get(name)):
                    wrong[name] = f"is {show(value)}, expected {expected}"
            if wrong:
                return config, self._faults(wrong)
            environment = self.environment(config)
        except MappingError as error:
            return config, [*error.faults]
        extra = {name: values.get(name) for name in keys.checked}
        return config, failures(keys.requirements, {**extra, **environment})

    def _faults(self, wrong: Mapping[str, str]) -> list[Fault]:
        advice = "Correct it in the config.json of the base LLM, or make it in a mapping."
        return [Fault(self.file.name, f"`{name}` {what}", advice) for name, what in wrong.items()]

    def environment(self, config: Mapping[str, object]) -> Environment:
        """The names that its expressions know: config keys, optional ones too, and `dims`."""
        optional = self.config.optional.items()
        left_out = {name: value for name, value in optional if config.get(name) is None}
        return with_dims(config, {**left_out, **self.dims})

    def tied_names(self, config: Mapping[str, object]) -> dict[str, str]:
        """Tensors that need not be written, and the one that each is the same as."""
        return dict(self.tied) if config.get("tie_word_embeddings") is True else {}

    def tensors(self, config: Mapping[str, object]) -> dict[str, ExpectedTensor]:
        """Every tensor of the class with its shape, tied ones too, in the order of the file.

        `config` is a complete one. Raises `MappingError` where it makes no shapes.
        """
        faults: list[Fault] = []
        found: dict[str, ExpectedTensor] = {}
        for step in Expansion(faults).steps(self.entries, self.environment(config)):
            found[step.targets[0]] = ExpectedTensor(
                step.numbers, step.rule.formulas, step.rule.where
            )
        raise_faults(MappingError, shortened(faults))
        return found


def _whole(value: object) -> object:
    """A whole float as an integer: it computes the same shapes, and no model loads it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _expected_kind(value: object, usual: object) -> str:
    """What a value is expected to be, if it is of another kind than the usual one; null is not."""
    kinds, title = KINDS.get(type(usual), ((), ""))
    return title if kinds and value is not None and type(value) not in kinds else ""


def with_dims(config: Mapping[str, object], dims: Mapping[str, Expression]) -> Environment:
    """`config` and the values of `dims`, each of which may use those before it.

    Raises `MappingError` with all that have no value.
    """
    environment = dict(config)
    faults: list[Fault] = []
    for name, expression in dims.items():
        try:
            environment[name] = expression.value(environment)
        except MappingError as error:
            faults.extend(error.faults)
    raise_faults(MappingError, faults)
    return environment


def read_class(document: Document) -> PlainClass:
    """The class in a file. Raises `MappingError` with all faults of the file."""
    reader = Reader(document)
    found = reader.root(PlainClass, "a class", file=document)
    for name in found.config.default.keys() & found.config.required:
        what = f"`{name}` is both required and given a default"
        reader.fault(document.table["config"].line, what)
    reader.finish()
    return found


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
