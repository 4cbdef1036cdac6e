"""The LLM of a plan: its family, its plain config, and its tensors under plain names."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from xtuner2llava.errors import PlanError, UnsupportedError
from xtuner2llava.mapping.apply import Dropped, Origin
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.caveats import Limit
from xtuner2llava.mapping.detect import texts
from xtuner2llava.mapping.expressions import visible
from xtuner2llava.mapping.family import Family, TranslatedConfig
from xtuner2llava.mapping.format import Format
from xtuner2llava.mapping.plain_class import PlainClass, check_against_class
from xtuner2llava.options import PathOrText
from xtuner2llava.planning.plan import Findings
from xtuner2llava.sources.model_config import ModelConfig, in_437_vocabulary
from xtuner2llava.storage.json_file import Json, integer, table
from xtuner2llava.tensors.files import cut, read_ranges
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.mean import Mean
from xtuner2llava.tensors.rows import concat
from xtuner2llava.training_config.config import TrainingConfig
from xtuner2llava.training_config.values import Reference, Table, Unknown, Value

_BLOCK_BYTES = 8 << 20
# What XTuner's export and the models of llava-hf pad vocabularies to: matrix products like it.
_MULTIPLE = 64
# What it scales to is a number for every factor above.
_LEAST_FACTOR = 1e-9
_SHOWN_CHARACTERS = 80
# The last one that was loaded, or the embedding (transformers 4.48 `modeling_utils.py`,
# _load_pretrained_model and tie_weights).
_ONE_OF_BOTH = (
    " Where training loaded this base, it had one of them in both places, which depends on the "
    "version of transformers: then give --llm a folder that has that one only."
)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The LLM as its plain class: config, tensors in the class's order, and what was left out.

    It has no tensors where their files are not here yet.
    """

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

    def with_rows_for(self, tokens: int) -> LanguageModel:
        """The LLM with rows for ids below `tokens`, where it has fewer.

        An LLM often has more rows than tokens (Qwen 2: 151,936 and 151,646); new tokens take those
        that are free, as they are. Where there are too few, each tensor over the vocabulary grows
        by rows that are the mean of its others. A mean has two advantages over zeros: in the head
        its logit is the mean of all others, so a token without training is never the likeliest; and
        transformers before 4.45 takes text positions whose embedding is zero for places of images
        (`modeling_llava.py`, `_merge_input_ids_with_image_features`).
        """
        rows = -(-tokens // _MULTIPLE) * _MULTIPLE
        if tokens <= self.rows:
            return self
        names = vocabulary_tensors(self.family.target_class, self.values)
        grown = {
            name: concat([tensor, Mean(tensor, rows - tensor.rows)]) if name in names else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, values={**self.values, "vocab_size": rows}, tensors=grown)


def trained_llm_config(
    config: ModelConfig, training_config: TrainingConfig | None
) -> dict[str, Json]:
    """The LLM's config in 4.37 vocabulary, as training used it.

    XTuner passes further arguments of `model.llm` on to `from_pretrained`, where they override the
    config, and turns LLaVAModel's `max_position_embeddings` into a linear `rope_scaling`
    (InternLM/xtuner `xtuner/model/llava.py`, `_prepare_for_long_context_training`).
    """
    values: dict[str, Json] = dict(config.values)
    if training_config is None:
        return values
    for key, value in training_config.overrides("llm").items():
        if not key.startswith("_"):
            values[key] = _json(value, f"{training_config.where}, model.llm.{key}")
    values = in_437_vocabulary(values)
    before = table(values, "rope_scaling").get("factor")
    factor = linear_rope_factor(
        training_config.max_position_embeddings,
        integer(values, "max_position_embeddings"),
        before if isinstance(before, (int, float)) else 1,
    )
    if factor is not None:
        values["rope_scaling"] = {"type": "linear", "factor": factor}
    return values


def linear_rope_factor(
    max_position_embeddings: int | None,
    original_max_position_embeddings: int | None,
    original_rope_factor: float = 1,
) -> float | None:
    """The factor of the `{"type": "linear"}` that XTuner trained with; None: RoPE is the base's.

    `max_position_embeddings` is the argument of LLaVAModel, the others are the base LLM's: 1 where
    its `rope_scaling` is None or has no `factor`. A factor replaces the base's `rope_scaling`
    whole; `max_position_embeddings` of the config stays (xtuner/model/llava.py,
    `_prepare_for_long_context_training`, the same from v0.1.23 to today). Raises
    `UnsupportedError` for a factor that is not a positive number.
    """
    if max_position_embeddings is None or not original_max_position_embeddings:
        return None
    if not _LEAST_FACTOR < original_rope_factor < math.inf:
        raise UnsupportedError(
            f"the base LLM's rope_scaling has the factor {original_rope_factor}, "
            "a positive number was expected"
        )
    original = original_max_position_embeddings * original_rope_factor
    if max_position_embeddings <= original:
        return None
    return float(math.ceil(max_position_embeddings / original))


def _json(value: Value, where: str) -> Json:
    """A value of an XTuner config, where it can stand in a model's config."""
    match value:
        case Table():
            return {str(key): _json(entry, where) for key, entry in value.items()}
        case list() | tuple():
            return [_json(entry, where) for entry in value]
        case None | bool() | int() | float() | str():
            return value
        case Reference():
            return value.path.rpartition(".")[2]
    what = value.reason if isinstance(value, Unknown) else "it is not a value of a config"
    raise PlanError(f"cannot be read as data: {what}", where=where)


def choose_family(
    catalogue: Catalogue,
    mapping: PathOrText | None,
    config: Mapping[str, Json],
    names: Collection[str] | None,
) -> Family:
    """The family that the user names, or gives as a file; else the one that the LLM is of."""
    if mapping is None:
        return catalogue.detect(config, names)
    name, path = str(mapping), Path(mapping)
    # A folder may be called as its family is.
    if path.suffix in (".yaml", ".yml") or (path.exists() and name not in catalogue.families):
        return catalogue.with_family_file(path)
    return catalogue.families[name].chosen_for(config, names)


def translate(
    family: Family, config: Mapping[str, Json], format_: Format
) -> tuple[TranslatedConfig, list[Limit]]:
    """The plain class's config in a format, and what the family and the format say of it.

    Raises `MappingError` where the format does not support it.
    """
    translated = family.translate_config(config, format_)
    of_class = format_.class_limits(family.target_class.name, translated.values)
    of_code = _own_code(family, config)
    return translated, [*family.limits(config), *translated.doubts, *of_class, *of_code]


def _own_code(family: Family, config: Mapping[str, Json]) -> Iterator[Limit]:
    """Code that the base of an LLM brings along, which may compute something else.

    `from_pretrained` takes that with trust_remote_code, which XTuner's configs set. Families of
    other classes, and Phi-3's, are written after such code.
    """
    remote, target = config.get("auto_map"), family.target_class.architecture
    code = remote.get("AutoModelForCausalLM") if isinstance(remote, dict) else None
    known = target == "Phi3ForCausalLM" or target not in texts(config.get("architectures"))
    if code is not None and not known:
        code = visible(str(code)[:_SHOWN_CHARACTERS])
        yield Limit.unproven(f"{target} in place of {code}, code of the base,")


def plain_language_model(
    family: Family,
    config: Mapping[str, Json],
    values: Mapping[str, object],
    tensors: Mapping[str, LazyTensor],
    findings: Findings,
    *,
    of_base: bool = False,
) -> LanguageModel:
    """The LLM with the tensors of its plain class, no more and no less.

    Where the config ties tensors that differ, both are kept and the config is corrected; a note
    says what that means for those `of_base`. Raises `MappingError` for rules that do not fit; what
    the class expects otherwise becomes faults.
    """
    if not tensors:
        return LanguageModel(family, values, {}, {}, ())
    made = family.apply(config, tensors)
    values, outputs, dropped = dict(values), dict(made.outputs), list(made.dropped)
    for name, same_as in family.target_class.tied_names(values).items():
        if name not in outputs or same_as not in outputs:
            continue
        if not are_equal(outputs[name], outputs[same_as]):
            values["tie_word_embeddings"] = False
            findings.note(
                f"The config ties {name} to {same_as}, but they differ; both are written, "
                "with tie_word_embeddings: false." + (_ONE_OF_BOTH if of_base else "")
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


def vocabulary_tensors(plain: PlainClass, values: Mapping[str, object]) -> list[str]:
    """The tensors of a class that have a row for each token, such as `lm_head.weight`."""
    return [
        name
        for name, expected in plain.tensors(values).items()
        if expected.formulas and expected.formulas[0].strip() == "vocab_size"
    ]


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
