"""Base models: where the part that was not trained, or was trained as LoRA, comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CheckpointError, ConversionError, Fault, UnsupportedError
from xtuner2llava.hub.download import fetch_model, is_reference, local_path
from xtuner2llava.sources.artifact import LLM, VISUAL_ENCODER
from xtuner2llava.sources.model_config import ModelConfig, read_model_config, vision_tower_config
from xtuner2llava.storage.weights import Weights, find_weights, open_weights, quantised
from xtuner2llava.tensors.lazy import LazyTensor

_COMPARED, _ROWS_COMPARED = 4, 32


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base model of a part: what the user gave for it, and what the training recorded.

    `given` counts before `name`, which `record` has: "the XTuner config". Either may be a folder
    (relative to the working directory, as XTuner takes it) or a Hub repo id. Where no folder is at
    `name`, `beside` is one of that name near the checkpoint.
    """

    part: str
    checkpoint: Path
    given: str | None
    name: str | None = None
    record: str = "the XTuner config"
    beside: Path | None = None

    @property
    def title(self) -> str:
        return {LLM: "LLM", VISUAL_ENCODER: "vision tower"}[self.part]

    @property
    def flag(self) -> str:
        return {LLM: "--llm", VISUAL_ENCODER: "--vision"}[self.part]

    @property
    def recorded_place(self) -> str | None:
        """The folder or Hub repo id that was recorded."""
        return self.name if self.beside is None else str(self.beside)

    @property
    def reference(self) -> str | None:
        """The folder or Hub repo id to use."""
        return self.given if self.given is not None else self.recorded_place

    @property
    def has_another_name(self) -> bool:
        """Whether the user gave a model of another name than the recorded one."""
        given, name = model_name(self.given), model_name(self.name)
        return None not in (given, name) and str(given).lower() != str(name).lower()

    @property
    def is_remote(self) -> bool:
        """Whether `find` downloads it."""
        reference = self.reference
        return (
            reference is not None and not local_path(reference).is_dir() and is_reference(reference)
        )

    def find(self, *, weights: bool) -> Path:
        """Its folder, downloaded if need be; `weights` says whether these are needed too.

        Raises `ConversionError` if there is none; the message says what names it, and where it was
        looked for.
        """
        reference = self.reference
        if reference is None:
            raise UnsupportedError(
                f"nothing names the base {self.title}, whose config and small files are needed",
                where=str(self.checkpoint),
                advice=f"Give its folder or Hub repo id with {self.flag}, or the config of the "
                "training with --xtuner-config.",
            )
        folder = local_path(reference)
        if folder.is_dir():
            return folder
        looked = f"looked for {'there' if folder.is_absolute() else f'in {Path.cwd()}'}"
        if self.given is not None:
            where, named = self.flag, f"the base {self.title} '{reference}'"
        else:
            where = str(self.checkpoint)
            named = f"the base {self.title} '{reference}', as {self.record} names it,"
            looked += " and beside the checkpoint"
        what = f"{named} is not a folder here ({looked})"
        advice = f"Give the base model's folder or Hub repo id with {self.flag}."
        if folder.is_file():
            what = f"{named} is a file, expected a folder"
        elif is_reference(reference):
            try:
                return fetch_model(reference, weights=weights)
            except CheckpointError as error:
                faults = [
                    Fault(where, f"{what}; {f.where} {f.what}", f"{f.advice} {advice}".strip())
                    for f in error.faults
                ]
                raise type(error).from_faults(faults) from error
        raise UnsupportedError(what, where=where, advice=advice)

    def read_config(self, folder: Path) -> ModelConfig:
        """The config in its `folder`. Raises `CheckpointError` if it cannot be used."""
        if not (folder / "config.json").exists():
            adapter = (folder / "adapter_config.json").is_file()
            raise UnsupportedError(
                "a LoRA adapter, not a base model"
                if adapter
                else "has no config.json, as models do",
                where=str(folder),
                advice=f"Give the base model's folder or Hub repo id with {self.flag}.",
            )
        config = read_model_config(folder)
        if self.part == LLM:
            if config.values.get("quantization_config"):
                raise UnsupportedError(
                    "a quantised model, whose weights are not those that become the merged model",
                    where=str(config.path),
                    advice="Give the unquantised base model with --llm.",
                )
            return config
        kind = config.model_type
        if kind not in ("clip", "clip_vision_model"):
            reason = "XTuner's LLaVA trains CLIP towers"
            if kind is not None and "siglip" in kind:
                tokenless = "a tower without class token"
                reason = f"XTuner drops the first patch of {tokenless}, and LLaVA does not"
            raise UnsupportedError(
                f"model_type is {kind!r}, expected a CLIP model: {reason}", where=str(config.path)
            )
        return vision_tower_config(config)

    def open(self, folder: Path, *, stream: bool = False) -> Weights:
        """Its weights in `folder`; with `stream`, those on the Hub, read there as they are needed.

        Headers only are read. Raises `CheckpointError` if there are none, or quantised ones.
        """
        found = find_weights(folder)
        if stream:
            from xtuner2llava.hub.stream import open_remote

            opened = open_remote(str(self.reference), folder)
        elif found is not None:
            opened = open_weights(found)
        else:
            raise UnsupportedError(
                f"has no weights, and the {self.title}'s are needed: it was not trained in full",
                where=str(folder),
                advice="Expected model.safetensors or pytorch_model.bin, or their index.",
            )
        tensors = opened.tensors
        if self.part == VISUAL_ENCODER:
            # A base may be a whole CLIPModel, of which XTuner loads the vision tower.
            tensors = {n: t for n, t in tensors.items() if n.startswith("vision_model.")}
        codes = quantised(tensors)
        if codes is not None:
            advice = f"Give the unquantised base model with {self.flag}."
            raise UnsupportedError(codes, where=str(folder), advice=advice)
        if not tensors:
            raise UnsupportedError(f"has no {self.title} in it", where=str(found or folder))
        return Weights(tensors, opened.files)


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


def model_name(name: str | None) -> str | None:
    """The last component of a model's path or repo id, also where that is a folder of a cache.

    ModelScope's has three underscores for a dot.
    """
    parts = Path((name or "").partition("@")[0]).parts
    cached = [part for part in parts if part.startswith("models--")]
    last = (cached[-1].rpartition("--")[2] if cached else parts[-1]) if parts else None
    return last and last.replace("___", ".")


def resemble(one: Mapping[str, LazyTensor], other: Mapping[str, LazyTensor]) -> bool:
    """Whether both hold the same numbers, but for rounding to 16 bits.

    Reads a few rows of a few matrices of `other`.
    """
    import torch

    names = [name for name, tensor in other.items() if len(tensor.shape) > 1] or list(other)
    for name in names[:: len(names) // _COMPARED + 1]:
        if name not in one or one[name].shape != other[name].shape:
            return False
        stop = min(other[name].rows, _ROWS_COMPARED)
        ours, theirs = (tensors[name].read(0, stop).to(torch.float64) for tensors in (one, other))
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-6):
            return False
    return True
