"""The image processor's config that every transformers a format is for loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from xtuner2llava.planning.published_towers import PROCESSOR_KEYS
from xtuner2llava.storage.json_file import Json

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
CLASS = "CLIPImageProcessor"
# Pads images to squares with the mean colour; in transformers from 4.49 on.
PADDING_CLASS = "LlavaImageProcessor"
# Without these, LlavaProcessor of 4.45 to 4.57 makes one image token for an image, or fails.
_COUNTS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def loadable_image_processor(values: Mapping[str, Json]) -> tuple[dict[str, Json], str | None]:
    """The settings as CLIPImageProcessor of transformers 4.37.2 to 5 loads them, and a note.

    Without a note, `values` are such already. XTuner trains with `CLIPImageProcessor` whatever
    class a base names, and later versions name one more for each way to compute the same
    (`…Fast`, `…Pil`), which 4.37.2 refuses.
    """
    named = values.get("image_processor_type")
    if named == CLASS or (named is None and values.get("feature_extractor_type") is not None):
        return dict(values), None
    settings = {key: values[key] for key in PROCESSOR_KEYS if values.get(key) is not None}
    why = f"the base names a {named}" if named is not None else "the base names no class"
    return (
        {**settings, "image_processor_type": CLASS},
        f"{PREPROCESSOR} is written for {CLASS}, with which XTuner trains: {why}.",
    )


def image_processor_faults(values: Mapping[str, Json]) -> Iterator[str]:
    """Why not every transformers makes an image processor of a preprocessor_config.json."""
    named = values.get("image_processor_type")
    if named == PADDING_CLASS:
        if values.get("do_pad") is not True:
            yield f"{PREPROCESSOR} names {PADDING_CLASS} without do_pad true, so it does not pad"
    elif loadable_image_processor(values)[1] is not None:
        found = "no class" if named is None else str(named)
        yield f"{PREPROCESSOR} names {found}, expected {CLASS} in image_processor_type"


def processor_faults(values: Mapping[str, Json], patch_size: int | None) -> Iterator[str]:
    """Why the processor_config.json of `hf` does not make as many image tokens as features."""
    lacking = [key for key in _COUNTS if values.get(key) is None]
    if lacking:
        yield f"{PROCESSOR} lacks {', '.join(lacking)}"
    written = values.get("patch_size")
    if written is not None and patch_size is not None and written != patch_size:
        yield f"{PROCESSOR} has patch_size {written}, the tower {patch_size}"
    if "image_processor" in values:
        yield (
            f"{PROCESSOR} holds an image processor, which transformers before 5 takes from "
            f"{PREPROCESSOR}"
        )
