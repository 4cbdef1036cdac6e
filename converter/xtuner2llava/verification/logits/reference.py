"""`verify --reference FILE.npz`: the folder against logits that the real model's own code made.

`docs/mappings.md` has the lines that make such a file. It proves a mapping where transformers has
no class for the LLM: the folder alone is run, on the file's prompt.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner2llava.errors import CheckpointError, ConversionError, Fault, UsageError, raise_faults
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.logits.comparison import (
    FOLDER,
    MOVED_FOLDER,
    NOISE,
    NUDGED_FOLDER,
    REFERENCE,
    Comparison,
)
from xtuner2llava.verification.logits.streamed import Model, ModelInput, Moved
from xtuner2llava.verification.logits.trained import folder_model
from xtuner2llava.verification.outcome import FAILED, OK, Check
from xtuner2llava.verification.outcome import REFERENCE as CHECK_NAME

if TYPE_CHECKING:
    import torch

_OF_WRONG = "logits of a wrong model differ from the reference"
_IMAGE = -200  # XTuner's and LLaVA's IMAGE_TOKEN_INDEX
# The kinds of numpy, the least bytes of an element, and the dimensions of one prompt or image.
_ARRAYS = {
    "input_ids": ("iu", 1, 1, "whole numbers of one prompt, (1, tokens)"),
    "logits": ("f", 4, 2, "finite float32, (positions, vocabulary)"),
    "pixel_values": ("f", 2, 3, "float32 of one image, (1, channels, height, width)"),
    "image_features": ("f", 2, 2, "float32 of one image, (1, patches, hidden size)"),
}
_IMAGES = ("pixel_values", "image_features")
_MAX_BYTES = 1 << 30
_ADVICE = "docs/mappings.md has the lines that make such a file."
# How many times further than one more rounding of every weight the folder may be: the file may come
# from weights before they were rounded, or rounded otherwise.
_ROUNDINGS = 4
# `hf` has up to 64 rows more than the model that was trained, and padding.
_MORE_ROWS = 128


def read_reference(path: Path) -> tuple[ModelInput, torch.Tensor]:
    """A prompt, and the logits of its last positions: (positions, vocabulary), float32.

    Raises `UsageError` with all that is wrong with the file.
    """
    import numpy
    import torch

    arrays = _arrays(path)
    found: dict[str, torch.Tensor] = {}
    faults = []
    for name, (kinds, least, dimensions, expected) in _ARRAYS.items():
        array = arrays.get(name)
        if array is None and name in _IMAGES:
            continue
        if (
            array is None
            or array.dtype.kind not in kinds
            or array.dtype.itemsize < least
            or not array.size
            or array.ndim < dimensions
            or math.prod(array.shape[:-dimensions]) != 1
            or not numpy.isfinite(array).all()
        ):
            shown = "missing" if array is None else f"{array.dtype} {list(array.shape)}"
            faults.append(f"{name} is {shown}, expected {expected}")
        else:
            kind = "float32" if kinds == "f" else "int64"
            found[name] = torch.from_numpy(array.astype(kind).reshape(array.shape[-dimensions:]))
    if not faults:
        ids = found["input_ids"].tolist()
        images = ids.count(_IMAGE)
        if images > 1 or len(ids) < 2:
            faults.append("input_ids is not one prompt with at most one image (-200)")
        if bool(images) is not any(name in found for name in _IMAGES):
            faults.append(
                "-200 in input_ids needs pixel_values or image_features, and they need it"
            )
    raise_faults(UsageError, [Fault(str(path), what, _ADVICE) for what in faults])
    cut = ids.index(_IMAGE) if images else len(ids)
    pixels, features = (found[name][None] if name in found else None for name in _IMAGES)
    return ModelInput(ids[:cut], ids[cut + 1 :], pixels, features), found["logits"]


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays, unless they are too large for the memory that this may take; nothing pickled."""
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
            return {name: numpy.asarray(file[name]) for name in _ARRAYS if name in file}
    except ConversionError:
        raise
    # zipfile, zlib and numpy raise many kinds, MemoryError among them, of a file that is damaged.
    except Exception as error:
        raise UsageError(
            f"is not a file of numpy.savez ({error})", where=str(path), advice=_ADVICE
        ) from error


def reference_checks(
    out: ConvertedFolder,
    checkpoint: Checkpoint | None,
    reference: tuple[ModelInput, torch.Tensor],
    figures: dict[str, Json],
    advance: Callable[[int], None],
) -> Iterator[Check]:
    """Runs the folder on the prompt of `reference` and compares its logits with those."""
    given, logits = reference
    folder = folder_model(out, checkpoint)
    _require_fit(folder, given, logits.shape[1])
    moved = folder_model(out, checkpoint, lambda weights: {n: Moved(weights[n]) for n in weights})
    comparison = Comparison(given, advance)
    comparison.add(FOLDER, folder, NUDGED_FOLDER)
    if len(logits) > comparison.positions:
        what = f"logits have {len(logits)} positions, the prompt has {comparison.positions}"
        raise CheckpointError(what, where="--reference", advice=_ADVICE)
    comparison.add(MOVED_FOLDER, moved)
    comparison.compare(
        [(REFERENCE, FOLDER), (FOLDER, NUDGED_FOLDER), (FOLDER, MOVED_FOLDER)], logits
    )
    figures["reference"] = comparison.to_dict()
    # The file's weights may not be rounded as the folder's are.
    allowed, why = max(
        (
            _ROUNDINGS * comparison.distances[FOLDER, MOVED_FOLDER].largest,
            f"{_ROUNDINGS} times what one more rounding of the weights changes",
        ),
        (
            NOISE * comparison.distances[FOLDER, NUDGED_FOLDER].largest,
            f"{NOISE} times the noise of float32",
        ),
        key=lambda bound: bound[0],
    )
    found = comparison.distances[REFERENCE, FOLDER]
    shape = " x ".join(str(n) for n in logits.shape)
    detail = f"{found} over {shape} logits; {allowed:.2g} is allowed: {why}"
    yield Check(CHECK_NAME, OK if found.largest <= allowed else FAILED, detail)
    yield comparison.wrong_check(REFERENCE, allowed, _OF_WRONG)


def _require_fit(folder: Model, given: ModelInput, columns: int) -> None:
    """Raises `CheckpointError` where the prompt and the logits are not those of such a model."""
    rows, hidden = folder.language.embedding.shape
    beyond = [n for n in sorted({*given.before, *given.after}) if not 0 <= n < rows]
    faults = [f"input_ids has {n}, the folder has {rows} rows" for n in beyond]
    if given.pixels is not None and not folder.vision:
        faults.append(
            "pixel_values need the tower's config, which this format leaves to mm_vision_tower: "
            "give --against CHECKPOINT, or save image_features instead"
        )
    if given.features is not None and given.features.shape[2] != hidden:
        faults.append(f"image_features are {given.features.shape[2]} wide, not {hidden}")
    head = folder.language.head.rows
    if not head - _MORE_ROWS <= columns <= head:
        faults.append(f"logits have {columns} columns, the head has {head} rows")
    raise_faults(CheckpointError, [Fault("--reference", what, _ADVICE) for what in faults])
