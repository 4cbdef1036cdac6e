"""The LLM of a plan: its family, its plain config, and its tensors under plain names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import PlanError
from xtuner2llava.mapping import (
    Catalogue,
    Dropped,
    Family,
    Format,
    Limit,
    Origin,
    PlainClass,
    TranslatedConfig,
    apply,
    check_against_class,
)
from xtuner2llava.options import PathOrText
from xtuner2llava.planning.findings import Findings
from xtuner2llava.planning.hf_vocabulary import vocabulary_tensors
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.tensors.files import cut, read_ranges

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The LLM as its plain class: config, tensors in the class's order, and what was left out."""

    family: Family
    values: Mapping[str, object]
    tensors: Mapping[str, LazyTensor]
    origins: Mapping[str, Origin]
    dropped: tuple[Dropped, ...]

    @property
    def rows(self) -> int:
        """Of its vocabulary; its class has checked that this is a number."""
        rows = self.values["vocab_size"]
        assert isinstance(rows, int)  # noqa: S101
        return rows


def choose_family(
    catalogue: Catalogue,
    mapping: PathOrText | None,
    config: Mapping[str, Json],
    names: Collection[str] | None,
) -> Family:
    """The family that the user names, or gives as a file; else the one that the LLM is of."""
    if mapping is None:
        return catalogue.detect(config, names)
    path = Path(mapping)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return catalogue.with_family_file(path)
    return catalogue.families[str(mapping)].chosen_for(config, names)


def plain_config(
    family: Family, config: Mapping[str, Json], format_: Format, findings: Findings
) -> tuple[dict[str, object], list[Limit]]:
    """The plain class's config, every key explicit, and the caveats. Raises `MappingError`."""
    translated, limits = translate(family, config, format_)
    findings.note(*(limit.text for limit in limits))
    if translated.not_carried:
        keys = ", ".join(translated.not_carried)
        findings.note(f"Config keys that {family.target_class.name} does not have: {keys}.")
    return dict(translated.values), limits


def translate(
    family: Family, config: Mapping[str, Json], format_: Format
) -> tuple[TranslatedConfig, list[Limit]]:
    """The plain class's config in a format, and what the family and the format say of it.

    Raises `MappingError` where the format does not support it.
    """
    translated = family.translate_config(config, format_)
    of_class = format_.class_limits(family.target_class.name, translated.values)
    return translated, [*family.limits(config), *translated.doubts, *of_class]


def plain_language_model(
    family: Family,
    config: Mapping[str, Json],
    values: Mapping[str, object],
    tensors: Mapping[str, LazyTensor],
    findings: Findings,
) -> LanguageModel:
    """The LLM with the tensors of its plain class, no more and no less.

    Where the config ties tensors that differ, both are kept and the config is corrected. Raises
    `MappingError` for rules that do not fit; what the class expects otherwise becomes faults.
    """
    made = apply(family.expand(config, tensors.keys()), tensors, where=family.file.name)
    values, outputs, dropped = dict(values), dict(made.outputs), list(made.dropped)
    for name, same_as in family.target_class.tied_names(values).items():
        if name not in outputs or same_as not in outputs:
            continue
        if not are_equal(outputs[name], outputs[same_as]):
            values["tie_word_embeddings"] = False
            findings.note(
                f"The config ties {name} to {same_as}, but they differ; both are written, "
                "with tie_word_embeddings: false."
            )
            continue
        del outputs[name]
        dropped.append(Dropped(name, f"the same as {same_as}, to which it is tied", "config"))
    values["vocab_size"] = _trained_rows(family.target_class, values, outputs, made.origins)
    shapes = {name: tensor.shape for name, tensor in outputs.items()}
    findings.faults.extend(check_against_class(family.target_class, values, shapes, made.origins))
    order = {name: place for place, name in enumerate(family.target_class.tensors(values))}
    ordered = dict(sorted(outputs.items(), key=lambda item: order.get(item[0], len(order))))
    return LanguageModel(family, values, ordered, made.origins, tuple(dropped))


def are_equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether both hold the same bytes; computed tensors count as different.

    Tied weights of a `.pth` share their storage, and most folders hold them once: nothing is read
    then. Where a checkpoint holds both, this reads both up to the first difference, which is the
    only tensor data that planning reads: without it, a plan could not say which tensors are
    written. The embedding of the largest LLMs has 1 to 2 GB.
    """
    if one is other:
        return True
    ranges, others = one.ranges(), other.ranges()
    if one.shape != other.shape or one.dtype != other.dtype or ranges is None or others is None:
        return False
    return ranges == others or all(
        read_ranges(cut(ranges, start, size)) == read_ranges(cut(others, start, size))
        for start in range(0, one.nbytes, _BLOCK_BYTES)
        for size in (min(_BLOCK_BYTES, one.nbytes - start),)
    )


def _trained_rows(
    becomes: PlainClass,
    values: Mapping[str, object],
    tensors: Mapping[str, LazyTensor],
    origins: Mapping[str, Origin],
) -> object:
    """`vocab_size` as the tensors have it, which training may have resized.

    Raises `PlanError` where the embedding and the head have different numbers of rows.
    """
    rows = {n: tensors[n].rows for n in vocabulary_tensors(becomes, values) if n in tensors}
    if len(set(rows.values())) > 1:
        listed = " and ".join(f"{n} has {count:,} rows" for n, count in rows.items())
        raise PlanError(
            f"{listed}: a vocabulary has one number of rows",
            where=", ".join(origins[name].sources[0] for name in rows),
            advice="Where training extended the vocabulary, both must have been saved: with LoRA, "
            "modules_to_save names both.",
        )
    return next(iter(rows.values()), values.get("vocab_size"))
