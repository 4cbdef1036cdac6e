"""The Python API: what the commands do, with their options as keyword arguments.

The signatures follow from the classes of `options.py`, for type checkers and editors too. What does
the work is imported when it is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from inspect import Signature, signature
from os import PathLike
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from xtuner2llava.errors import ConversionError, Fault, refused_path
from xtuner2llava.options import (
    CheckedOptions,
    ConvertOptions,
    InspectOptions,
    Options,
    PathOrText,
    PushOptions,
    VerifyOptions,
    check_argument,
    choices,
    flag,
)

if TYPE_CHECKING:
    from xtuner2llava.hub.upload import Pushed
    from xtuner2llava.inspection.inspection import Inspection
    from xtuner2llava.metadata.report import Report
    from xtuner2llava.planning.plan import Plan
    from xtuner2llava.verification.outcome import Verification

_P = ParamSpec("_P")
_O = TypeVar("_O", bound=CheckedOptions)
_R = TypeVar("_R")
_A = TypeVar("_A")
_B = TypeVar("_B")


class _Takes(Generic[_P, _O]):
    """Makes the last parameter of a function, an options object, keyword arguments of it.

    Its errors then name arguments as Python spells them: `max_shard_size`, not `--max-shard-size`.
    """

    def __init__(self, make: Callable[_P, _O]) -> None:
        self._make: Callable[..., _O] = make

    @overload
    def __call__(self, function: Callable[[_A, _O], _R]) -> Callable[Concatenate[_A, _P], _R]: ...
    @overload
    def __call__(
        self, function: Callable[[_A, _B, _O], _R]
    ) -> Callable[Concatenate[_A, _B, _P], _R]: ...
    def __call__(self, function: Callable[..., _R]) -> Callable[..., _R]:
        *leading, _ = signature(function).parameters.values()
        own = signature(self._make).parameters.values()
        taken = Signature([*leading, *own], return_annotation=signature(function).return_annotation)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> _R:
            try:
                given = taken.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            try:
                first = [given.pop(parameter.name) for parameter in leading]
                for parameter, value in zip(leading, first, strict=True):
                    check_argument(parameter.name, value)
                return function(*first, self._make(**given))
            except OSError as error:
                if error.filename is None:
                    raise
                raise refused_path(error) from error
            except ConversionError as error:
                amended = type(error).from_faults([_in_python(fault) for fault in error.faults])
                error.faults, error.args = amended.faults, amended.args
                raise

        call.__signature__ = taken  # type: ignore[attr-defined]
        return call


@_Takes(ConvertOptions)
def convert(checkpoint: PathOrText, out: str | PathLike[str], options: ConvertOptions) -> Report:
    """Converts the XTuner checkpoint at `checkpoint` into the folder `out`.

    The options are those of `xtuner2llava convert`, see `docs/cli.md`. `out` appears as a whole
    when everything is written, flushed and, with `verify`, compared with its sources; or it does
    not appear. Memory does not depend on the model's size. `on_plan(plan)` is called before
    anything is written, and may raise to end it; `on_progress(stage, done, total)` counts bytes.

    All threads together use `max_memory` for their buffers; torch and Python take some 250 MB
    besides. With `executor`, its workers write the shards, each in one thread: any
    `concurrent.futures.Executor` whose workers see the same paths, such as
    `distributed.Client(...).get_executor()` of Dask.

    With `push_to_hub`, it is then published there. With `low_disk` too, each shard is sent and
    removed before the next is written, `out` never appears, and one commit makes all of it visible
    at the end: an interrupted run leaves the repository as it was, and another sends what is
    missing.

    Raises `ConversionError`; its `faults` are all that was wrong at the stage that failed.
    """
    from xtuner2llava import conversion

    return conversion.convert(checkpoint, out, options)


@_Takes(Options)
def plan(checkpoint: PathOrText, options: Options) -> Plan:
    """What `convert` would do with the same options; reads headers only and writes nothing.

    What is on the Hub is downloaded first, as for `convert`.

    Raises `ConversionError`; its `faults` are all that keep the conversion from being exact.
    """
    from xtuner2llava import conversion

    return conversion.plan(checkpoint, options)


@_Takes(InspectOptions)
def inspect(checkpoint: PathOrText, options: InspectOptions) -> Inspection:
    """What `checkpoint` is, and what it can become; reads headers only.

    Weights of base models are not downloaded; a checkpoint on the Hub is, whole.

    `checkpoint` may also be an XTuner config `.py`, before training: then what will come of it. It
    is never run. Raises `ConversionError` for what is neither; what else keeps it from becoming a
    format stands in the inspection's targets.
    """
    from xtuner2llava import conversion

    found = conversion.inspect(checkpoint, options)
    targets = [
        replace(
            target,
            faults=tuple(map(_in_python, target.faults)),
            needs=None if target.needs is None else _FLAG.sub(_name, target.needs),
        )
        for target in found.targets
    ]
    return replace(found, targets=tuple(targets))


@_Takes(VerifyOptions)
def verify(out: str | PathLike[str], options: VerifyOptions) -> Verification:
    """Checks the folder `out` that `convert` wrote; each check of the result is right or wrong.

    By itself: weight files against their index, their headers and the transformers class; config,
    tokenizer, names, checksums. With the checkpoint `against`: the plan is made again, and every
    tensor compared with it bit for bit, and the small files; the further options are then those
    that were given to `convert`. With `logits` also: both models at work, layer by layer, in the
    memory of one layer. `trust_remote_code` lets the base model's own Python run for that, and
    nothing else does. `reference` is a file of logits that the real model's own code made, for a
    mapping of your own or a class that transformers does not have: `docs/mappings.md` has the
    lines that make one. Where they agree too, the verdict says exact.

    `out` may also be the Hub repo id, `owner/name`, of a published model: its small files, headers
    and sizes are checked as they are there, and checksums where the Hub states the same kind.

    With dtype "auto", the dtype is what `conversion.json` says; give one to hold the folder to it.
    The folder says its format, model type and vision tower itself. Damage to `out` makes checks
    that failed. Raises `ConversionError` for a call that makes no sense, and for a checkpoint that
    cannot be read or converted.
    """
    from xtuner2llava.verification.run import verify_folder

    return verify_folder(out, options)


@_Takes(PushOptions)
def push(out: str | PathLike[str], repo_id: str, options: PushOptions) -> Pushed:
    """Publishes `out`, a folder that `convert` wrote, as the model repository `repo_id`.

    It is checked first. The repository and the branch `revision` are made if need be; one commit
    makes everything visible. What the Hub has already is not sent again, so a call that failed can
    be repeated. Raises `ConversionError`: `VerificationError` before anything is sent, or
    `HubError`.
    """
    from xtuner2llava import conversion

    return conversion.push(out, repo_id, options)


_FIELDS = {flag(each.name)[2:]: each
           for kind in (ConvertOptions, VerifyOptions) for each in fields(kind)}  # fmt: skip
# A flag, and what may be its value.
_FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z]+(?:-[a-z]+)*)(?: (\w+))?")


def _in_python(fault: Fault) -> Fault:
    """`fault` with options named as arguments rather than as flags."""
    what, advice = (_FLAG.sub(_assignment, text) for text in (fault.what, fault.advice))
    return Fault(_FLAG.sub(_name, fault.where), what, advice)


def _name(found: re.Match[str]) -> str:
    field = _FIELDS.get(found[2])
    return found[0] if field is None or found[3] else field.name


def _assignment(found: re.Match[str]) -> str:
    """`overwrite=True` for `--overwrite`, `dtype="keep"` for `--dtype keep`, else the name."""
    field, word = _FIELDS.get(found[2]), found[3]
    if field is None:
        return found[0]
    rest = "" if word is None else f" {word}"
    if field.type is bool:
        return f"{field.name}={not found[1]}{rest}"
    is_size = word and field.metadata["size"] and word[0].isdecimal()
    if is_size or word in choices(field.type):
        return f'{field.name}="{word}"'
    return (
        f"{field.name}={word}" if word and word == field.metadata["metavar"] else field.name + rest
    )
