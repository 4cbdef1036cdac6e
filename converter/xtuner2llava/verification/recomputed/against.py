"""The folder against the checkpoint: every tensor recomputed, one at a time, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import MappingError
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.json_file import text
from xtuner2llava.verification.layout import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.verification.out_folder import OutFolder
from xtuner2llava.verification.outcome import SKIPPED, Check
from xtuner2llava.verification.plain_model import in_older_words
from xtuner2llava.verification.recomputed.comparison import (
    Comparison,
    names_fault,
    unit_in_the_last_place,
)
from xtuner2llava.verification.recomputed.copies import copies_checks
from xtuner2llava.verification.recomputed.files import FileTensor, open_safetensors
from xtuner2llava.verification.recomputed.opening import open_trained
from xtuner2llava.verification.recomputed.rules import detect_family, read_family
from xtuner2llava.verification.recomputed.trained import Trained
from xtuner2llava.verification.recomputed.weight import Block, Weight

if TYPE_CHECKING:
    import torch

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Expected:
    """The trained model, and what each tensor of the folder must be, by component and plain name.

    `dtype` is what every float tensor is rounded to; None keeps each as stored.
    """

    trained: Trained
    weights: Mapping[tuple[str, str], Weight]
    dtype: str | None
    family: str
    converts_tokenizer: bool

    def dtype_of(self, weight: Weight) -> torch.dtype:
        import torch

        if self.dtype is None or not weight.dtype.is_floating_point:
            return weight.dtype
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def expect(checkpoint: str, options: SourceOptions, out: OutFolder) -> Expected:
    """What the checkpoint makes; reads headers only. Raises `ConversionError`."""
    trained = open_trained(checkpoint, options)
    folder = _mappings()
    config = in_older_words(trained.llm_config())
    llm = trained.weights[LLM]
    mapping = out.record.get("mapping")
    recorded = text(mapping, "family") if isinstance(mapping, dict) else None
    if options.mapping is not None:
        choice = str(options.mapping)
    else:
        try:
            choice = detect_family(folder, config, [*llm])
        except MappingError:
            if recorded is None or not (folder / "families" / f"{recorded}.yaml").is_file():
                raise
            choice = recorded
    family = read_family(folder, choice)
    weights = {(LLM, name): weight for name, weight in family.apply(llm, config).items()}
    for name, weight in trained.weights[PROJECTOR].items():
        weights[PROJECTOR, name.removeprefix("model.")] = weight
    if options.include_vision_tower or VISUAL_ENCODER in trained.was_trained:
        for name, weight in trained.weights[VISUAL_ENCODER].items():
            weights[VISUAL_ENCODER, name] = weight
    dtype = _dtype(options, out, config)
    converts = bool(family.table("tokenizer").get("convert"))
    return Expected(trained, weights, dtype, family.name, converts)


def _mappings() -> Path:
    """The folder of the shipped YAML files, of the package or of the checkout."""
    from importlib.resources import files

    installed = Path(str(files("xtuner2llava"))) / "mappings"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[4] / "mappings"


def _dtype(options: SourceOptions, out: OutFolder, config: Mapping[str, object]) -> str | None:
    """The dtype to expect: as asked for, else as recorded, else the base's."""
    recorded = text(out.record, "dtype")
    named = str(config.get("torch_dtype", config.get("dtype"))).removeprefix("torch.")
    known = ("float16", "bfloat16", "float32")
    wanted: str = options.dtype
    if wanted == "auto" and recorded in (*known, "keep"):
        wanted = recorded
    elif wanted == "auto":
        wanted = named if named in known else "float16"
    return None if wanted == "keep" else wanted


def out_tensors(out: OutFolder) -> dict[tuple[str, str], FileTensor]:
    """The tensors of the folder by component and plain name, read by the safetensors package."""
    found: dict[tuple[str, str], FileTensor] = {}
    for file in out.shards:
        for name, tensor in open_safetensors(out.path / file).items():
            place = out.layout.place(name)
            if place is not None:
                found[place] = tensor
    return found


def against_checks(
    out: OutFolder, expected: Expected, result: Comparison, advance: Callable[[int], None]
) -> Iterator[Check]:
    """Compares all tensors, one at a time; `result` collects the figures."""
    tensors = out_tensors(out)
    names = {place: n for n in out.tensors if (place := out.layout.place(n)) is not None}
    wanted = dict(expected.weights)
    # A tied head is left out, and is the same as the embedding.
    tied = None
    if (LLM, _HEAD) not in tensors and (LLM, _EMBEDDING) in tensors:
        tied = wanted.pop((LLM, _HEAD), None)
    strange = names_fault(names, wanted)
    fine = f"{len(wanted)} tensors, by family {expected.family}"
    yield Check.of("tensors against the checkpoint", strange, fine)
    rows = Comparison()
    for place, weight in wanted.items():
        if place not in tensors:
            continue
        tensor, dtype = tensors[place], expected.dtype_of(weight)
        if out.layout.format == "hf" and place in ((LLM, _EMBEDDING), (LLM, _HEAD)):
            tensor, added = _without_added_rows(tensor, weight)
            if added is not None:
                means = _mean_rows(weight, added.count)
                rows.add(f"{names[place]}, added rows", added, means, dtype, advance)
        result.add(names[place], tensor, weight, dtype, advance)
    if tied is not None:
        title = f"{_HEAD}, tied to {_EMBEDDING},"
        embedding = tensors[LLM, _EMBEDDING]
        result.add(title, embedding, tied, expected.dtype_of(tied), lambda count: None)
    fine = f"{result.equal} copied, {result.rounded} rounded once"
    yield Check.of("copied and rounded, bit for bit", result.faults, fine)
    name = "merged and computed, against float64"
    if not result.computed and not result.computed_faults:
        yield Check(name, SKIPPED, "there are none")
    else:
        off = f"{result.off:,} of {result.computed_elements:,} elements are not the nearest"
        fine = f"{result.computed} tensors, largest error {result.max_ulp:.4f} ulp, {off}"
        yield Check.of(name, result.computed_faults, fine)
    if rows.computed_elements or rows.computed_faults:
        result.computed_faults += rows.computed_faults
        fine = "each is the mean of the trained rows"
        yield Check.of("rows added for the format's tokens", rows.computed_faults, fine)
    folders = expected.trained.folders
    yield from copies_checks(out, folders, converts_tokenizer=expected.converts_tokenizer)


def _without_added_rows(tensor: FileTensor, weight: Weight) -> tuple[FileTensor, FileTensor | None]:
    """The rows that the trained model has, and those that the format added for its tokens."""
    more = tensor.count - weight.count
    if more <= 0 or tensor.shape[1:] != weight.shape[1:]:
        return tensor, None
    first = weight.count
    return FileTensor(weight.shape, tensor.dtype, tensor.rows), FileTensor(
        (more, *tensor.shape[1:]),
        tensor.dtype,
        lambda start, stop: tensor.rows(first + start, first + stop),
    )


def _mean_rows(weight: Weight, count: int) -> Weight:
    """Rows that are the mean of all trained ones: nobody trained them, so they mean nothing."""
    import torch

    def read(start: int, stop: int) -> Block:
        total = sum(weight.read(a, b).value.double().sum(0) for a, b in weight.blocks())
        assert isinstance(total, torch.Tensor)  # noqa: S101 - a vocabulary has rows
        mean = (total / weight.count).expand(stop - start, *weight.shape[1:]).clone()
        # It may be rounded to the stored dtype first.
        return Block(mean, 0.5 * unit_in_the_last_place(mean, weight.dtype))

    return Weight((count, *weight.shape[1:]), weight.dtype, True, read)
