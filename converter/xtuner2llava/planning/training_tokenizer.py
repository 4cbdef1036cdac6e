"""The tokenizer that was trained with, which is not always the base LLM's."""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, PlanError, raise_faults
from xtuner2llava.planning.findings import Findings
from xtuner2llava.planning.training_files import find_folder
from xtuner2llava.sources import Checkpoint
from xtuner2llava.sources.artifact import LLM
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers import Tokenizer, read_tokenizer
from xtuner2llava.training_config import WITHOUT_IDS, Table, TrainingConfig, Value, shown

FLAG = "--tokenizer"
_SAVED = (
    f"Give {FLAG} the folder of the tokenizer that was trained with, as its save_pretrained writes "
    "it."
)
# What these add, or where they look, depends on the version of transformers or on other files.
_NOT_FOLLOWED = frozenset(
    "added_tokens_decoder extra_special_tokens tokenizer_type config tokenizer_file vocab_file "
    "merges_file tokenizer_object from_slow revision subfolder".split()
)


@dataclass(frozen=True, slots=True)
class TrainingTokenizer:
    """A tokenizer, and whether it is only known as the base LLM's."""

    tokenizer: Tokenizer
    is_base: bool


def training_tokenizer(
    checkpoint: Checkpoint, given: str | PathLike[str] | None, findings: Findings
) -> TrainingTokenizer | None:
    """The tokenizer that was trained with, as files; None where no LLM is known.

    It is the one that the user gives; else the one in an XTuner folder, which is saved from the
    config (InternLM/xtuner `xtuner/model/llava.py`, `to_xtuner_llava`); else the one that the
    config names; else the base LLM's. Raises `PlanError` where the config says another than the
    base's and it cannot be read, or where parts of the config disagree.
    """
    llm, training_config = checkpoint.llm, checkpoint.training_config
    if given is not None:
        if training_config is not None:
            _note_arguments(training_config, findings)
        return TrainingTokenizer(read_tokenizer(find_folder(os.fspath(given))), is_base=False)
    if llm.folder is None:
        return None
    own = _own(checkpoint)
    if own is not None and own.folder == llm.folder:
        return TrainingTokenizer(own, is_base=False)
    if own is None and training_config is not None:
        _check_arguments(training_config)
    named = _named(training_config) if own is None and training_config is not None else own
    if named is None:
        return TrainingTokenizer(read_tokenizer(llm.folder), is_base=True)
    try:
        base = read_tokenizer(llm.folder)
    except ConversionError:
        return TrainingTokenizer(named, is_base=False)
    if named.ids == base.ids and own is not None:
        return TrainingTokenizer(base, is_base=True)
    if named.ids != base.ids:
        place = "in the checkpoint's folder" if own is not None else "that the XTuner config names"
        findings.note(
            f"The tokenizer is the one {place}, with {named.length:,} tokens; the base LLM's has "
            f"{base.length:,}."
        )
    return TrainingTokenizer(named, is_base=False)


def plain_arguments(training_config: TrainingConfig) -> dict[str, Json]:
    """The arguments of the config's tokenizer that decide ids, those that can be followed."""
    found = {}
    for key, value in training_config.data.tokenizer.arguments.items():
        if key not in WITHOUT_IDS | _NOT_FOLLOWED and _is_plain(key, value):
            found[key] = list(value) if isinstance(value, (list, tuple)) else value
    return found  # type: ignore[return-value]


def _is_plain(key: str, value: Value) -> bool:
    if key == "additional_special_tokens":
        return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
    if key.endswith("_token") and not key.startswith("add_"):
        return isinstance(value, str)
    return isinstance(value, (bool, int, float, str))


def _not_followed(training_config: TrainingConfig) -> list[str]:
    """The arguments that decide ids in a way that is not followed here."""
    return [
        key if key in _NOT_FOLLOWED else f"{key} = {shown(value)}"
        for key, value in training_config.data.tokenizer.arguments.items()
        if key not in WITHOUT_IDS
        and not (value is None or (isinstance(value, (Table, list, tuple)) and not value))
        and (key in _NOT_FOLLOWED or not _is_plain(key, value))
    ]


def _note_arguments(training_config: TrainingConfig, findings: Findings) -> None:
    left = _not_followed(training_config)
    if left:
        findings.note(
            f"Arguments of the XTuner config's tokenizer that {FLAG} must hold already: "
            f"{', '.join(left)}."
        )


def _check_arguments(training_config: TrainingConfig) -> None:
    """Raises `PlanError` where the config alone does not say which tokens there are."""
    faults = [
        Fault(f"{training_config.where}, tokenizer", f"'{text}' cannot be followed exactly", _SAVED)
        for text in _not_followed(training_config)
    ]
    if training_config.data.other_tokenizers:
        listed = ", ".join(training_config.data.other_tokenizers)
        faults.append(
            Fault(
                training_config.where,
                f"has tokenizers that differ from the first: {listed}",
                _SAVED,
            )
        )
    raise_faults(PlanError, faults)


def _own(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer in the artifact; None where it holds none."""
    folder = checkpoint.artifact.folders.get(LLM)
    try:
        return read_tokenizer(folder) if folder is not None and any(_files(folder)) else None
    except ConversionError:
        if checkpoint.llm.folder == folder:
            raise
        return None


def _files(folder: Path) -> list[Path]:
    return [*folder.glob("tokenizer*"), *folder.glob("vocab.*"), *folder.glob("*.tiktoken")]


def _named(training_config: TrainingConfig) -> Tokenizer | None:
    """The tokenizer of another folder than the LLM's that the config names; None if it does not."""
    path = training_config.data.tokenizer.path
    try:
        of_llm = training_config.llm_path
    except ConversionError:  # --llm gives it.
        of_llm = None
    if path is None or (of_llm is not None and os.path.normpath(path) == os.path.normpath(of_llm)):
        return None
    try:
        return read_tokenizer(find_folder(path))
    except ConversionError as error:
        fault = error.faults[0]
        raise PlanError(
            f"the tokenizer of the training is '{path}', not the base LLM's, and it cannot be read "
            f"here ({fault.where}: {fault.what})",
            where=f"{training_config.where}, tokenizer",
            advice=f"Give its folder or Hub repo id with {FLAG}.",
        ) from error
