"""Base models: where the part that was not trained, or was trained as LoRA, comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CheckpointError, ConversionError, Fault, UnsupportedError
from xtuner2llava.hub.download import fetch_model, is_reference, local_path
from xtuner2llava.sources.artifact import LLM, VISUAL_ENCODER
from xtuner2llava.sources.model_config import ModelConfig, read_model_config, vision_tower_config
from xtuner2llava.storage.weights import (
    Weights,
    find_weights,
    open_weights,
    quantised,
)

FLAGS = {LLM: "--llm", VISUAL_ENCODER: "--vision"}
TITLES = {LLM: "LLM", VISUAL_ENCODER: "vision tower"}


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """The name of a base model, and the record that names it: "the XTuner config".

    `folder` has that name and lies beside the checkpoint, where no folder is at `name` itself.
    """

    name: str | None
    record: str = "the XTuner config"
    folder: Path | None = None

    @property
    def place(self) -> str | None:
        """Where it is: a folder or a Hub repo id."""
        return self.name if self.folder is None else str(self.folder)


def find_beside(name: str, checkpoint: Path) -> Path | None:
    """The folder of a model, near `checkpoint`, that has the last component of `name` as its name.

    Next to the checkpoint, else next to the folder that holds it; `name` may be a path of the
    machine that trained, or a Hub repo id. None if it is in neither, or if there is a folder at
    `name` itself.
    """
    try:
        own = local_path(name)
        last = own.name if own.is_absolute() else Path(name.partition("@")[0]).name
        if own.is_dir() or last in ("", ".."):
            return None
        path = checkpoint.absolute()
        near = [above / last for above in path.parents[:2]]
        return next((f for f in near if f != path and (f / "config.json").is_file()), None)
    except (ConversionError, OSError, ValueError):
        return None


def find_base(
    part: str, given: str | None, recorded: RecordedBase, checkpoint: Path, *, weights: bool
) -> Path:
    """The folder of the base model of `part`.

    `given` by the user counts before `recorded`; either may be a folder (relative to the working
    directory, as XTuner takes it) or a Hub repo id. A recorded one may also lie beside the
    checkpoint. `weights` says whether they are needed too. Raises `ConversionError` if there is no
    such folder; the message says what names it, and where it was looked for.
    """
    reference = given if given is not None else recorded.place
    flag, title = FLAGS[part], TITLES[part]
    if reference is None:
        raise UnsupportedError(
            f"nothing names the base {title}, whose config and small files are needed",
            where=str(checkpoint),
            advice=f"Give its folder or Hub repo id with {flag}, or the config of the training "
            "with --xtuner-config.",
        )
    named = f"the base {title} '{reference}'"
    where = flag
    if given is None:
        named, where = f"{named}, as {recorded.record} names it,", str(checkpoint)
    advice = f"Give the base model's folder or Hub repo id with {flag}."
    folder = local_path(reference)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UnsupportedError(f"{named} is a file, expected a folder", where=where, advice=advice)
    looked = f"looked for in {Path.cwd()}" if not folder.is_absolute() else "looked for there"
    if given is None:
        looked += " and beside the checkpoint"
    if not is_reference(reference):
        raise UnsupportedError(
            f"{named} is not a folder here ({looked})", where=where, advice=advice
        )
    try:
        return fetch_model(reference, weights=weights)
    except CheckpointError as error:
        what = f"{named} is not a folder here ({looked});"
        faults = [
            Fault(where, f"{what} {fault.where} {fault.what}", f"{fault.advice} {advice}".strip())
            for fault in error.faults
        ]
        raise type(error).from_faults(faults) from error


def is_remote(reference: str | None) -> bool:
    """Whether `find_base` would download the base model `reference`."""
    return reference is not None and not local_path(reference).is_dir() and is_reference(reference)


def open_streamed(part: str, reference: str, folder: Path) -> Weights:
    """The weights of a base model on the Hub, read there as they are needed.

    `folder` is where `find_base` put its small files.
    """
    from xtuner2llava.hub.stream import open_remote

    return _usable(part, open_remote(reference, folder), folder, str(folder))


def read_config(part: str, folder: Path) -> ModelConfig:
    """The config of the base model in `folder`. Raises `CheckpointError` if it cannot be used."""
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").is_file()
        raise UnsupportedError(
            "a LoRA adapter, not a base model" if adapter else "has no config.json, as models do",
            where=str(folder),
            advice=f"Give the base model's folder or Hub repo id with {FLAGS[part]}.",
        )
    config = read_model_config(folder)
    if part == LLM:
        if config.values.get("quantization_config"):
            raise UnsupportedError(
                "a quantised model, whose weights are not those that become the merged model",
                where=str(config.path),
                advice="Give the unquantised base model with --llm.",
            )
        return config
    kind = config.model_type
    if kind not in ("clip", "clip_vision_model"):
        reason = (
            "XTuner drops the first patch of a tower without class token, and LLaVA does not"
            if kind is not None and "siglip" in kind
            else "XTuner's LLaVA trains CLIP towers"
        )
        raise UnsupportedError(
            f"model_type is {kind!r}, expected a CLIP model: {reason}", where=str(config.path)
        )
    return vision_tower_config(config)


def open_base(part: str, folder: Path) -> Weights:
    """The weights of the base model in `folder`; headers only are read."""
    found = find_weights(folder)
    if found is None:
        raise UnsupportedError(
            f"has no weights, and the {TITLES[part]}'s are needed: it was not trained in full",
            where=str(folder),
            advice="Expected model.safetensors or pytorch_model.bin, or their index.",
        )
    return _usable(part, open_weights(found), folder, str(found))


def _usable(part: str, opened: Weights, folder: Path, where: str) -> Weights:
    """The tensors of the part. Raises `UnsupportedError` if there are none, or quantised ones."""
    tensors = opened.tensors
    if part == VISUAL_ENCODER:
        # A base may be a whole CLIPModel, of which XTuner loads the vision tower.
        tensors = {n: t for n, t in tensors.items() if n.startswith("vision_model.")}
    codes = quantised(tensors)
    if codes is not None:
        advice = f"Give the unquantised base model with {FLAGS[part]}."
        raise UnsupportedError(codes, where=str(folder), advice=advice)
    if not tensors:
        raise UnsupportedError(f"has no {TITLES[part]} in it", where=where)
    return Weights(tensors, opened.files)
