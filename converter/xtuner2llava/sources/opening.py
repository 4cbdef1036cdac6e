"""`open_checkpoint`: finds out what it was given, and opens it."""

from __future__ import annotations

from os import fspath
from pathlib import Path

from xtuner2llava.errors import CheckpointError, ConversionError, UnsupportedError, UsageError
from xtuner2llava.options import PathOrText, SourceOptions
from xtuner2llava.recipe import Recipe
from xtuner2llava.sources.checkpoint import Checkpoint, gather
from xtuner2llava.sources.contents import Contents
from xtuner2llava.sources.hub import fetch_checkpoint, is_reference, local_path
from xtuner2llava.sources.json_file import read_json, text
from xtuner2llava.sources.pth_file import open_pth_file
from xtuner2llava.sources.xtuner_folder import is_xtuner_folder, open_xtuner_folder
from xtuner2llava.sources.zero_directory import MASTER, open_zero_directory, zero_directory

# Multimodal models of XTuner's v1 trainer, which saves them whole (xtuner/v1/model/compose).
_V1_MODELS = ("internvl", "intern_s1", "interns1", "qwen3_vl", "qwen3_5", "qwen2_5_vl")


def open_checkpoint(
    checkpoint: PathOrText,
    options: SourceOptions | None = None,
    *,
    stream_base: bool = False,
    base_weights: bool = True,
) -> Checkpoint:
    """The trained model at the path or Hub repo id `checkpoint`; reads headers only.

    With `stream_base`, the base LLM's weights are read from the Hub as they are needed, and not
    stored; without `base_weights`, those of base models are not downloaded. Raises
    `CheckpointError` for what cannot be opened, and says what it is. What is missing beside it
    stands in `faults`.
    """
    options = options or SourceOptions()
    reference = fspath(checkpoint)
    try:
        contents = open_contents(reference, options.weights)
    except OSError as error:
        what = f"cannot be looked at ({error.strerror or error})"
        raise CheckpointError(what, where=reference[:200]) from error
    recipe = None
    if options.xtuner_config is not None:
        recipe = Recipe.from_file(Path(options.xtuner_config))
    elif contents.config is not None:
        recipe = Recipe.from_text(*contents.config)
    return gather(
        contents,
        recipe,
        options,
        _open_pretrained,
        stream_base=stream_base,
        base_weights=base_weights,
    )


def open_contents(reference: str, weights: str = MASTER) -> Contents:
    """What lies at `reference`, by what is in it rather than by its name."""
    path = local_path(reference)
    directory = zero_directory(path)
    if directory is not None:
        return open_zero_directory(directory, weights)
    if path.is_file():
        return open_pth_file(path)
    if not path.exists() and is_reference(reference):
        path = fetch_checkpoint(reference)
    if not path.is_dir():
        raise UsageError(
            "no such file or folder",
            where=reference,
            advice="Expected an iter_N.pth file or directory, an iter_N_xtuner folder, or a Hub "
            "repo id.",
        )
    if is_xtuner_folder(path):
        return open_xtuner_folder(path)
    raise _unknown_folder(path)


def _open_pretrained(reference: str) -> Contents | None:
    """The checkpoint that a run started from, if it lies here."""
    try:
        path = local_path(reference)
        if not path.exists():
            return None
        return open_contents(str(path))
    except (ConversionError, OSError):
        return None


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _unknown_folder(path: Path) -> UnsupportedError:
    names = _names(path)
    if any(name.endswith(".distcp") for name in {*names, *_names(path / "weights")}):
        what = "a distributed checkpoint (DCP), which XTuner's v1 trainer writes, and not for LLaVA"
        advice = "LLaVA is trained by XTuner 0.1 and 0.2: expected iter_N.pth or iter_N_xtuner."
    elif "adapter_config.json" in names:
        what = "a LoRA adapter alone, without the projector that belongs to it"
        advice = "Give the iter_N_xtuner folder that it lies in, or XTuner's iter_N.pth."
    elif "config.json" in names:
        kind = text(read_json(path / "config.json"), "model_type") or "unknown"
        what = f"a Hugging Face model folder (model_type {kind[:40]!r}) without XTuner's projector/"
        advice = "Give it as --llm or --vision, and XTuner's checkpoint as CHECKPOINT."
        if "llava" in kind.lower():
            advice = "It is LLaVA already: give what XTuner wrote."
        elif kind.lower().startswith(_V1_MODELS):
            advice = "XTuner's v1 trainer writes such folders; a model of its own kind, not LLaVA."
    else:
        what = "an empty folder" if not names else "no checkpoint that XTuner writes"
        inner = sorted(name for name in names if name.startswith(("iter_", "epoch_")))
        advice = (
            f"It holds {', '.join(inner[:4])}: give one of these."
            if inner
            else "Expected iter_N.pth, a DeepSpeed directory, or an iter_N_xtuner folder."
        )
    return UnsupportedError(what, where=str(path), advice=advice)
