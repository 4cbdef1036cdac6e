"""The tokenizer of a plan: the one that was trained with, as the output needs it."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping
from functools import partial
from os import fspath
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, PlanError, UsageError, raise_faults
from xtuner2llava.hub.download import find_folder
from xtuner2llava.options import PathOrText
from xtuner2llava.planning.plan import Findings
from xtuner2llava.sources.artifact import LLM
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tokenizers.conversion import with_arguments
from xtuner2llava.tokenizers.tokenizer import Prepared, Tokenizer, read_tokenizer
from xtuner2llava.training_config.config import TrainingConfig
from xtuner2llava.training_config.datasets import WITHOUT_IDS, Loaded, TrainingData
from xtuner2llava.training_config.values import Value, shown

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
_ADDITIONAL = "additional_special_tokens"
_SAVED_FILES = ("tokenizer*", "vocab.*", "*.tiktoken")
_DROPS = (
    "LLaVA drops the first token of each text after an image where a prompt begins with the bos "
    "token (`mm_utils.py`, tokenizer_image_token), and this model's prompts do"
)


def training_tokenizer(
    checkpoint: Checkpoint, given: PathOrText | None, findings: Findings
) -> tuple[Tokenizer, bool] | None:
    """The tokenizer that was trained with, and whether it is only known as the base LLM's.

    It is the one that the user gives; else the one in an XTuner folder, which is saved from the
    config (InternLM/xtuner `xtuner/model/llava.py`, `to_xtuner_llava`); else the one that the
    config names; else the base LLM's. None where no LLM is known. Raises `PlanError` where the
    config says another than the base's and it cannot be read, or where parts of it disagree.
    """
    config, folder = checkpoint.training_config, checkpoint.llm.folder
    slow = checkpoint.training_data.tokenizer.is_slow
    read = partial(read_tokenizer, slow=slow)
    if slow:
        findings.note(
            "Training loaded the slow tokenizer, and the base's tokenizer.json is left out. A fast "
            "one, which transformers makes for the format hf, may split white space otherwise."
        )
    _, not_followed = _arguments(checkpoint.training_data.tokenizer)
    if given is not None:
        if not_followed:
            findings.note(
                f"Arguments of the XTuner config's tokenizer that {FLAG} must hold already: "
                f"{', '.join(not_followed)}."
            )
        return read(find_folder(fspath(given))), False
    if folder is None:
        return None
    named = saved = _saved(checkpoint)
    if saved is not None and saved.folder == folder:
        return saved, False
    if saved is None and config is not None:
        _check_arguments(config, not_followed)
        named = _named(config, read)
    if named is None:
        return read(folder), True
    try:
        base = read(folder)
    except ConversionError:
        return named, False
    if named.ids != base.ids:
        place = "in the checkpoint's folder" if saved else "that the XTuner config names"
        findings.note(
            f"The tokenizer is the one {place}, with {named.length:,} tokens; the base LLM's has "
            f"{base.length:,}."
        )
    elif saved:
        return base, True
    return named, False


def tokenizer_to_write(
    tokenizer: Tokenizer,
    converted: Prepared,
    family_bos: str | None,
    data: TrainingData,
    given_bos: str | None,
    findings: Findings,
) -> Tokenizer:
    """The training's `tokenizer`, `converted` as its family says, with the right bos token.

    `given_bos` is the user's. Without it, a bos token is taken off a tokenizer of Qwen's: XTuner's
    advice for Qwen (issue 292 there) puts `<|im_start|>` on the tokenizer, so that `generate` finds
    a bos id; the configs have that id here, and the token makes LLaVA drop others. Raises
    `ConversionError` for a tokenizer that cannot be used.
    """
    # XTuner trains Qwen's tokenizers without a bos token, and others with the one that they have
    # (InternLM/xtuner `xtuner/dataset/utils.py`, get_bos_eos_token_ids). So the family's is for the
    # configs alone where the class is Qwen's, or not named.
    named = converted.tokenizer.slow_class.lower()
    apart = family_bos if named.startswith(("qwen", "none")) else None
    kept = ("bos_token",) if apart is not None else ()
    result, notes = with_arguments(converted.tokenizer, _arguments(data.tokenizer)[0], kept=kept)
    findings.note(*converted.notes, *notes)
    if given_bos is not None:
        if given_bos not in result.ids:
            raise UsageError(
                f"'{given_bos}' is not a token of the tokenizer in {tokenizer.folder}",
                where="--bos-token",
            )
        if family_bos not in (None, given_bos):
            findings.note(f"The tokenizer's bos token is '{given_bos}', as asked. {_DROPS}.")
        return result.with_special_token("bos_token", given_bos)
    own = apart if apart in result.ids else None
    present = result.special("bos_token") or tokenizer.special("bos_token")
    if own is None or present == own or (present is None and data.bos_token is None):
        return result
    stands = f"bos_token_id {result.ids[own]} in config.json and generation_config.json does what"
    if present is not None:
        findings.note(
            f"The tokenizer had the bos token '{present}', which is XTuner's advice for Qwen, and "
            f"is written without it: {_DROPS}. {stands} the advice was for. --bos-token keeps it."
        )
        return result.with_special_token("bos_token", None)
    why = "LLaVA needs none there" if data.bos_token == own else _DROPS
    findings.note(
        f"The XTuner config gives the tokenizer the bos token '{data.bos_token}'; it is written "
        f"without one: {why}. {stands} that was for. --bos-token puts it there."
    )
    return result


def with_format_tokens(
    tokenizer: Tokenizer, tokens: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, int]]:
    """`tokenizer` with the tokens that a format needs, and the id of each by what it is for.

    For `pad`, a pad token that the tokenizer has already is as good. Raises `CorruptFileError`
    where none can be added.
    """
    present = tokenizer.special("pad_token")
    own_pad = present if present in tokenizer.ids else None
    texts = {use: own_pad if use == "pad" and own_pad else text for use, text in tokens.items()}
    result = tokenizer.with_tokens(texts.values())
    if "pad" in texts and own_pad is None:
        result = result.with_special_token("pad_token", texts["pad"])
    return result, {use: result.ids[text] for use, text in texts.items()}


def check_vocabulary(tokenizer: Tokenizer, rows: int, rows_of_base: object, is_base: bool) -> None:
    """Raises `PlanError` where the LLM's rows and the tokens of its tokenizer do not fit.

    The LLM has `rows`, the base's config says `rows_of_base`. The tokenizer of a base, `is_base`,
    lacks the tokens for which training has added rows; where rows were taken away, they were
    resized to the length of a tokenizer (transformers `resize_token_embeddings`).
    """
    tokens = tokenizer.highest_id + 1
    advice = f"Give {FLAG} the tokenizer that was trained with, which has the added tokens."
    what = ""
    if tokens > rows:
        token = max(tokenizer.ids, key=lambda name: tokenizer.ids[name])
        what = f"token '{token}' has id {tokenizer.highest_id}, the embedding has {rows} rows"
        advice = (
            "LLaVA would add random rows for it. Give --llm the base that was trained, or "
            f"{FLAG} the tokenizer that was."
        )
    elif isinstance(rows_of_base, int) and rows > rows_of_base >= tokens and is_base:
        what = (
            f"the vocabulary was extended by {rows - rows_of_base} rows: it has {rows}, the base's "
            f"config says {rows_of_base}, and the base's tokenizer has ids up to {tokens - 1} only"
        )
    elif isinstance(rows_of_base, int) and tokens < rows < rows_of_base:
        what = (
            f"the vocabulary has {rows} rows, the base's config says {rows_of_base}, and the "
            f"tokenizer has {tokens} tokens"
        )
    if what:
        raise PlanError(what, where=str(tokenizer.folder), advice=advice)


def _arguments(loaded: Loaded) -> tuple[dict[str, Json], list[str]]:
    """Arguments that decide ids: those that can be followed, and others as they are shown."""
    followed: dict[str, Json] = {}
    others = []
    for key, value in loaded.arguments.items():
        if key in WITHOUT_IDS or value is None:
            continue
        plain = None if key in _NOT_FOLLOWED else _plain(key, value)
        if plain is not None:
            followed[key] = plain
        elif value not in ({}, [], ()):
            others.append(key if key in _NOT_FOLLOWED else f"{key} = {shown(value)}")
    return followed, others


def _plain(key: str, value: Value) -> Json:
    """A value of the type that its argument has; None for another one."""
    is_token = key.endswith("_token") and not key.startswith("add_")
    match value:
        case list() | tuple() if key == _ADDITIONAL and all(isinstance(x, str) for x in value):
            return [str(text) for text in value]
        case str() if key != _ADDITIONAL:
            return value
        case bool() | int() | float() if key != _ADDITIONAL and not is_token:
            return value
    return None


def _check_arguments(config: TrainingConfig, not_followed: list[str]) -> None:
    """Raises `PlanError` where the config alone does not say which tokens there are."""
    place = f"{config.where}, tokenizer"
    faults = [Fault(place, f"'{text}' cannot be followed exactly", _SAVED) for text in not_followed]
    if others := ", ".join(config.data.other_tokenizers):
        faults.append(
            Fault(config.where, f"has tokenizers that differ from the first: {others}", _SAVED)
        )
    raise_faults(PlanError, faults)


def _saved(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer in the artifact; None where it holds none."""
    folder = checkpoint.artifact.folders.get(LLM)
    if folder is None or not any(any(folder.glob(pattern)) for pattern in _SAVED_FILES):
        return None
    try:
        return read_tokenizer(folder)
    except ConversionError:
        if checkpoint.llm.folder == folder:
            raise
        return None


def _named(config: TrainingConfig, read: Callable[[Path], Tokenizer]) -> Tokenizer | None:
    """The tokenizer of another folder than the LLM's that the config names; None if it does not."""
    path = config.data.tokenizer.path
    try:
        of_llm = config.base_path(LLM)
    except ConversionError:  # --llm gives it.
        of_llm = None
    if path is None or (of_llm is not None and os.path.normpath(path) == os.path.normpath(of_llm)):
        return None
    try:
        return read(find_folder(path))
    except ConversionError as error:
        fault = error.faults[0]
        raise PlanError(
            f"the tokenizer of the training is '{path}', not the base LLM's, and it cannot be read "
            f"here ({fault.where}: {fault.what})",
            where=f"{config.where}, tokenizer",
            advice=f"Give its folder or Hub repo id with {FLAG}.",
        ) from error
