"""Base models: where the part that was not trained, or was trained as LoRA, comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import Fault, UnsupportedError, raise_faults
from xtuner2llava.sources.contents import LLM, VISUAL_ENCODER
from xtuner2llava.sources.hub import fetch_model, is_reference, local_path
from xtuner2llava.sources.model_config import ModelConfig, read_model_config, vision_tower_config
from xtuner2llava.sources.remote_model import open_remote
from xtuner2llava.sources.weights import Fingerprint, Weights, find_weights, open_weights
from xtuner2llava.tensors import LazyTensor

FLAGS = {LLM: "--llm", VISUAL_ENCODER: "--vision"}
TITLES = {LLM: "LLM", VISUAL_ENCODER: "vision tower"}


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """A base model's lazy tensors, and the files that they lie in."""

    tensors: Mapping[str, LazyTensor]
    files: tuple[Fingerprint, ...]


def find_base(
    part: str, given: str | None, recorded: str | None, checkpoint: Path, *, weights: bool
) -> Path:
    """The folder of the base model of `part`.

    `given` is the user's word, `recorded` what the XTuner config names; either may be a folder
    (relative to the working directory, as XTuner takes it) or a Hub repo id. `weights` says
    whether they are needed too. Raises `ConversionError` if there is no such folder.
    """
    reference = given if given is not None else recorded
    if reference is None:
        raise UnsupportedError(
            f"nothing says which base {TITLES[part]} was trained",
            where=str(checkpoint),
            advice=f"Give its folder or Hub repo id with {FLAGS[part]}.",
        )
    folder = local_path(reference)
    if folder.is_dir():
        return folder
    if is_reference(reference):
        return fetch_model(reference, weights=weights)
    raise UnsupportedError(
        f"'{reference}' is no folder here"
        + ("" if given is not None else f", the XTuner config names it as base {TITLES[part]}"),
        where=FLAGS[part] if given is not None else str(checkpoint),
        advice=f"Give the base model's folder or Hub repo id with {FLAGS[part]}.",
    )


def is_remote(given: str | None, recorded: str | None) -> bool:
    """Whether `find_base` would go to the Hub for a base model that is called so."""
    reference = given if given is not None else recorded
    return reference is not None and not local_path(reference).is_dir() and is_reference(reference)


def open_streamed(part: str, given: str | None, recorded: str | None, folder: Path) -> BaseWeights:
    """The weights of a base model on the Hub, read there as they are needed.

    `folder` is where `find_base` put its small files.
    """
    opened = open_remote(str(given if given is not None else recorded), folder)
    return _checked(part, folder, opened, str(folder))


def read_config(part: str, folder: Path) -> ModelConfig:
    """The config of the base model in `folder`. Raises `CheckpointError` if it cannot be used."""
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


def open_base(part: str, folder: Path) -> BaseWeights:
    """The weights of the base model in `folder`; headers only are read."""
    found = find_weights(folder)
    if found is None:
        raise UnsupportedError(
            f"has no weights, and the {TITLES[part]}'s are needed: it was not trained in full",
            where=str(folder),
            advice="Expected model.safetensors or pytorch_model.bin, or their index.",
        )
    return _checked(part, folder, open_weights(found), str(found))


def _checked(part: str, folder: Path, opened: Weights, where: str) -> BaseWeights:
    """The tensors of the part, if they can be used."""
    tensors = opened.tensors
    if part == VISUAL_ENCODER:
        # A base may be a whole CLIPModel, of which XTuner loads the vision tower.
        tensors = {n: t for n, t in tensors.items() if n.startswith("vision_model.")}
    packed = [name for name in tensors if name.endswith((".absmax", ".quant_map", ".qweight"))]
    if packed:
        raise UnsupportedError(
            f"holds quantised weights such as '{packed[0]}'",
            where=str(folder),
            advice=f"Give the unquantised base model with {FLAGS[part]}.",
        )
    raise_faults(
        UnsupportedError, [] if tensors else [Fault(where, f"has no {TITLES[part]} in it")]
    )
    return BaseWeights(tensors, opened.files)
