"""Plain transformers classes as data: their config keys, and the exact names and shapes they have.

A file of `mappings/classes/` says what a class of transformers 4.37.2 is, the version that LLaVA
pins, so that a plan can be checked strictly without importing transformers (two seconds) and
with any version of it. A test holds the files against the real classes.

    config.required    keys without which nothing can be said
    config.default     the value that the config class takes for a key that is missing
    config.when_null   the value it takes for a key that is null, as an expression
    config.optional    keys that only later versions read, and the value that each has, as an
                       expression, where it is left out: written where it has another one
    config.checked     keys of other versions, or of other classes: read by `require`, never written
    config.require     what holds for every config of this class
    dims               names for sizes, for the shapes below
    tied               with tie_word_embeddings: a tensor, and the one it is the same as
    tensors            rules of the one verb `shapes`, in blocks with `for`, `prefix` and `if`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from xtuner2llava.errors import Fault, MappingError, raise_faults
from xtuner2llava.mapping.caveats import Requirement, failures, read_requirements
from xtuner2llava.mapping.expand import literal_steps
from xtuner2llava.mapping.expressions import Environment, Expression, same, show
from xtuner2llava.mapping.fold import shortened
from xtuner2llava.mapping.rules import Entry, read_shapes
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Document


@dataclass(frozen=True, slots=True)
class MappingFile:
    """A file that takes part in a conversion, and the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Expected:
    """The shape that a class gives a tensor, how its file writes it, and where."""

    shape: tuple[int, ...]
    formulas: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class PlainClass:
    """A class of transformers 4.37.2."""

    name: str
    architecture: str
    model_type: str
    required: tuple[str, ...]
    default: Mapping[str, object]
    when_null: Mapping[str, Expression]
    optional: Mapping[str, Expression]
    checked: tuple[str, ...]
    requirements: tuple[Requirement, ...]
    dims: Mapping[str, Expression]
    tied: Mapping[str, str]
    entries: tuple[Entry, ...]
    file: MappingFile

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its config, as it is written."""
        return (*self.required, *self.default)

    @property
    def known(self) -> tuple[str, ...]:
        """`keys`, and those that are optional or only checked."""
        return (*self.keys, *self.optional, *self.checked)

    def complete(self, values: Mapping[str, object]) -> tuple[dict[str, object], list[Fault]]:
        """`values` with every key of the class, and a fault for each that it cannot be.

        Keys that the class does not have are left out, and `optional` ones that say what is so
        without them; `checked` ones are only checked.
        """
        config = {key: values[key] for key in self.required if key in values}
        config |= {key: values.get(key, default) for key, default in self.default.items()}
        faults = [
            Fault(self.file.name, f"`{key}` is missing, and {self.architecture} needs it")
            for key in self.required
            if config.get(key) is None
        ]
        for key in self.required:
            size = config.get(key)
            # Sizes, all of them. A whole float computes the same shapes, and no model loads it.
            if isinstance(size, float) and size.is_integer():
                config[key] = size = int(size)
            if size is not None and (not isinstance(size, int) or size is True or size < 1):
                what = f"`{key}` is {show(size)}, expected a positive whole number"
                faults.append(Fault(self.file.name, what))
        if faults:
            return config, faults
        for key, expression in self.when_null.items():
            if config.get(key) is None:
                try:
                    config[key] = expression.value(config)
                except MappingError as error:
                    faults.extend(error.faults)
        try:
            for key, expression in self.optional.items():
                value = values.get(key)
                if value is not None and not same(value, expression.value(config)):
                    config[key] = value
            environment = self.environment(config)
        except MappingError as error:
            return config, [*faults, *error.faults]
        extra = {key: values.get(key) for key in self.checked}
        return config, [*faults, *failures(self.requirements, {**extra, **environment})]

    def environment(self, config: Mapping[str, object]) -> Environment:
        """The names that its expressions know: config keys, optional ones too, and `dims`."""
        left_out = {k: value for k, value in self.optional.items() if config.get(k) is None}
        return with_dims(config, {**left_out, **self.dims})

    def tied_names(self, config: Mapping[str, object]) -> dict[str, str]:
        """Tensors that need not be written, and the one that each is the same as."""
        return dict(self.tied) if config.get("tie_word_embeddings") is True else {}

    def tensors(self, config: Mapping[str, object]) -> dict[str, Expected]:
        """Every tensor of the class with its shape, tied ones too, in the order of the file.

        `config` is a complete one. Raises `MappingError` where it makes no shapes.
        """
        faults: list[Fault] = []
        found: dict[str, Expected] = {}
        for step in literal_steps(self.entries, self.environment(config), faults):
            found[step.targets[0]] = Expected(step.numbers, step.formulas, step.where)
        raise_faults(MappingError, shortened(faults))
        return found


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


@dataclass(frozen=True, slots=True)
class _ConfigKeys:
    required: tuple[str, ...] = ()
    default: Mapping[str, object] = field(default_factory=dict)
    when_null: Mapping[str, Expression] = field(default_factory=dict)
    optional: Mapping[str, Expression] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    require: Annotated[tuple[Requirement, ...], read_requirements] = ()


@dataclass(frozen=True, slots=True)
class _ClassFile:
    class_: str
    architecture: str
    model_type: str
    config: _ConfigKeys
    tensors: Annotated[tuple[Entry, ...], read_shapes]
    dims: Mapping[str, Expression] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)


def read_class(document: Document) -> PlainClass:
    """The class that a file describes. Raises `MappingError` with all faults of the file."""
    reader = Reader(document)
    file = reader.root(_ClassFile, "a class")
    config = document.root.entries.get("config")
    for key in file.config.default:
        if key in file.config.required and config is not None:
            reader.fault(config.line, f"`{key}` is both required and given a default")
    reader.finish()
    return PlainClass(
        file.class_,
        file.architecture,
        file.model_type,
        file.config.required,
        file.config.default,
        file.config.when_null,
        file.config.optional,
        file.config.checked,
        file.config.require,
        file.dims,
        file.tied,
        file.tensors,
        MappingFile(document.name, document.sha256),
    )
