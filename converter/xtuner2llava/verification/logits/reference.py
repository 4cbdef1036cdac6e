"""Logits that the real model's own code made: `verify --reference FILE.npz`.

`docs/mappings.md` has the lines that make such a file. It proves a mapping where transformers has
no class for the LLM: the folder alone is run, on the file's prompt.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CheckpointError, Fault, UsageError, raise_faults
from xtuner2llava.storage.json_file import Json, integer
from xtuner2llava.verification.logits.compare import NOISE, WRONG, wrong_check
from xtuner2llava.verification.logits.streams import (
    FOLDER,
    MOVED_FOLDER,
    NUDGED_FOLDER,
    REFERENCE,
    Figures,
    ModelInput,
    Run,
    Stream,
)
from xtuner2llava.verification.logits.values import Reading
from xtuner2llava.verification.outcome import FAILED, OK, Check
from xtuner2llava.verification.outcome import REFERENCE as CHECK_NAME

if TYPE_CHECKING:
    import torch

_OF_WRONG = "logits of a wrong model differ from the reference"
_IMAGE = -200  # XTuner's and LLaVA's IMAGE_TOKEN_INDEX
# Of one image: (channels, height, width), and (patches, hidden size).
_DIMENSIONS = {"pixel_values": 3, "image_features": 2}
_MAX_BYTES = 1 << 30
_ADVICE = "docs/mappings.md has the lines that make such a file."
# How many times further than one more rounding of every weight the folder may be: the file may come
# from weights before they were rounded, or rounded otherwise.
_ROUNDINGS = 4
# `hf` has up to 64 rows more than the model that was trained, and padding.
_MORE_ROWS = 128


@dataclass(frozen=True, slots=True)
class GivenLogits:
    """A prompt, and the logits of its last positions: (positions, vocabulary), float32."""

    given: ModelInput
    logits: torch.Tensor


def read_reference(path: Path) -> GivenLogits:
    """The arrays of the file. Raises `UsageError` with all that is wrong with them."""
    import torch

    arrays = _arrays(path)
    ids, logits = arrays.get("input_ids"), arrays.get("logits")
    images = {key: arrays[key] for key in _DIMENSIONS if key in arrays}
    faults: list[str] = []
    if ids is None or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size < 2:
        faults.append(f"input_ids is {_shape(ids)}, expected whole numbers, (1, tokens)")
    if logits is None or logits.dtype.kind != "f" or logits.dtype.itemsize < 4:
        faults.append(f"logits is {_shape(logits)}, expected float32, (positions, vocabulary)")
    faults += [
        f"{key} is {_shape(image)}, expected float32 of one image"
        for key, image in images.items()
        if image.dtype.kind != "f"
        or image.ndim < _DIMENSIONS[key]
        or math.prod(image.shape[: -_DIMENSIONS[key]]) != 1
    ]
    _raise(path, faults)
    assert ids is not None and logits is not None  # noqa: S101 - a fault otherwise
    row = [int(n) for n in ids.reshape(-1)]
    places = [n for n, token in enumerate(row) if token == _IMAGE]
    if len(places) > 1 or (ids.ndim == 2 and ids.shape[0] != 1):
        faults.append("input_ids is not one prompt with at most one image (-200)")
    if bool(places) is not bool(images):
        faults.append("-200 in input_ids needs pixel_values or image_features, and they need it")
    found = torch.from_numpy(logits).float()
    if found.ndim == 3 and found.shape[0] == 1:
        found = found[0]
    if found.ndim != 2 or not found.numel() or not bool(found.isfinite().all()):
        faults.append(f"logits is {_shape(logits)}, expected finite (positions, vocabulary)")
    _raise(path, faults)
    cut = places[0] if places else len(row)
    image = {
        key: torch.from_numpy(array).float().reshape(1, *array.shape[-_DIMENSIONS[key] :])
        for key, array in images.items()
    }
    pixels = image.get("pixel_values")
    features = image.get("image_features") if pixels is None else None
    return GivenLogits(ModelInput(row[:cut], row[cut + 1 :], pixels, features), found)


def _arrays(path: Path) -> dict[str, Any]:
    """All arrays, unless they are too large for the memory that this may take; nothing pickled."""
    import numpy

    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MAX_BYTES:
            raise UsageError(
                f"holds {size:,} bytes, expected at most {_MAX_BYTES:,}",
                where=str(path),
                advice="Save the logits of the last positions only: logits[:, -64:].",
            )
        with numpy.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"is not a file of numpy.savez ({error})", where=str(path), advice=_ADVICE
        ) from error


def _raise(path: Path, faults: list[str]) -> None:
    raise_faults(UsageError, [Fault(str(path), what, _ADVICE) for what in faults])


def _shape(array: Any) -> str:
    return "missing" if array is None else f"{array.dtype} {list(array.shape)}"


def reference_checks(
    folder: Stream,
    reference: GivenLogits,
    figures: dict[str, Json],
    advance: Callable[[int], None],
) -> Iterator[Check]:
    """Runs `folder` on the prompt of `reference` and compares the logits."""
    _require_fit(folder, reference)
    streams = [
        folder,
        replace(folder, name=NUDGED_FOLDER, nudged=True),
        replace(folder, name=MOVED_FOLDER, reading=Reading(moved=True)),
    ]
    pairs = [(REFERENCE, FOLDER), (FOLDER, NUDGED_FOLDER), (FOLDER, MOVED_FOLDER)]
    run = Run(streams, reference.given, pairs, advance, reference=reference.logits)
    result = run.figures()
    figures["reference"] = result.to_dict()
    allowed, why = tolerance(result)
    found = result.distance(REFERENCE, FOLDER)
    shape = " x ".join(str(n) for n in reference.logits.shape)
    detail = f"{found} over {shape} logits; {allowed:.2g} is allowed: {why}"
    yield Check(CHECK_NAME, OK if found.largest <= allowed else FAILED, detail)
    yield wrong_check(result, REFERENCE, WRONG * allowed, _OF_WRONG)


def tolerance(result: Figures) -> tuple[float, str]:
    """How far the logits may be from the given ones, and why.

    The file's weights may not be rounded as the folder's are: so far as moving every weight by a
    random part of half a unit in its last place takes the logits, several times.
    """
    noise = NOISE * result.distance(FOLDER, NUDGED_FOLDER).largest
    rounding = _ROUNDINGS * result.distance(FOLDER, MOVED_FOLDER).largest
    if noise > rounding:
        return noise, f"{NOISE} times the noise of float32"
    return rounding, f"{_ROUNDINGS} times what one more rounding of the weights changes"


def _require_fit(folder: Stream, reference: GivenLogits) -> None:
    """Raises `CheckpointError` where the folder cannot be run on the prompt."""
    given, language, tower = reference.given, folder.language, folder.tower.config
    rows, hidden = language.weights[language.embedding].shape
    length = len(given.before) + len(given.after)
    beyond = [n for n in sorted({*given.before, *given.after}) if not 0 <= n < rows]
    faults = [f"input_ids has {n}, the folder has {rows} rows" for n in beyond]
    if given.features is not None:
        length += given.features.shape[1]
        if given.features.shape[2] != hidden:
            faults.append(f"image_features are {given.features.shape[2]} wide, not {hidden}")
    if given.pixels is not None:
        edge, patch = integer(tower, "image_size"), integer(tower, "patch_size")
        if not tower:
            faults.append(
                "pixel_values need the tower's config, which this format leaves to "
                "mm_vision_tower: give --against CHECKPOINT, or save image_features instead"
            )
        elif [*given.pixels.shape] != [1, integer(tower, "num_channels") or 3, edge, edge]:
            faults.append(f"pixel_values are {list(given.pixels.shape)}, the tower takes {edge}")
        length += (edge // patch) ** 2 if edge and patch else 0
    positions, columns = reference.logits.shape
    if positions > length:
        faults.append(f"logits have {positions} positions, the prompt has {length}")
    head = language.weights[language.head].shape[0]
    if not head - _MORE_ROWS <= columns <= head:
        faults.append(f"logits have {columns} columns, the head has {head} rows")
    raise_faults(CheckpointError, [Fault("--reference", what, _ADVICE) for what in faults])
