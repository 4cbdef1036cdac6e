"""`make_plan`: the parts of a plan, put together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, PlanError, UnsupportedError, raise_faults
from xtuner2llava.mapping import Catalogue, Family, FormatClass, Limit, PlainClass
from xtuner2llava.options import Options, flag, parse_size
from xtuner2llava.options.programs import PROGRAMS
from xtuner2llava.planning.chat import with_trained_bos, with_trained_chat
from xtuner2llava.planning.config import json_bytes, output_config
from xtuner2llava.planning.fidelity import Fidelity
from xtuner2llava.planning.findings import Findings
from xtuner2llava.planning.generation import TokenIds, generation_config
from xtuner2llava.planning.hf_vocabulary import rows_for, vocabulary_tensors, with_rows
from xtuner2llava.planning.image_processor import PREPROCESSOR, padding_note, processor_files
from xtuner2llava.planning.language_model import (
    LanguageModel,
    choose_family,
    plain_config,
    plain_language_model,
)
from xtuner2llava.planning.llm_config import trained_llm_config
from xtuner2llava.planning.placement import (
    config_dtype,
    dtype_to_write,
    in_dtype,
    place,
    unchecked_note,
)
from xtuner2llava.planning.plan import Chat, MappingInUse, Plan
from xtuner2llava.planning.redaction import cached_id, redact_json
from xtuner2llava.planning.tokens import (
    generation_tokens,
    tokenizer_to_write,
    vocabulary_faults,
    with_format_tokens,
)
from xtuner2llava.planning.training_files import ImageProcessor, image_processor_of
from xtuner2llava.planning.training_tokenizer import training_tokenizer
from xtuner2llava.planning.vision_tower import (
    TOWER_CLASS,
    check_projector_of,
    check_tower,
    depth_of,
    writes_tower,
)
from xtuner2llava.planning.vision_tower_name import KEY as VISION_TOWER_KEY
from xtuner2llava.planning.vision_tower_name import vision_tower_name
from xtuner2llava.sources import Checkpoint
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.tokenizers import (
    FAST,
    MadeFile,
    Tokenizer,
    readable_tokenizer,
    with_config,
)
from xtuner2llava.writing.shards import INDEX_NAME, plan_shards

_log = logging.getLogger(__name__)
# Of a tokenizer's or processor's file; the largest vocabularies have a tenth of it.
_MAX_COPIED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Assessment:
    """What becomes of a checkpoint with some options, as far as it can be known.

    `faults` keep it from being converted. Without faults there is a plan, unless tensors are not
    known yet: weights that were not downloaded, or a training that has not begun; `pending` says
    which. What was found on the way is there even if something else is at fault.
    """

    format: str
    architecture: str | None
    fidelity: Fidelity
    faults: tuple[Fault, ...]
    pending: tuple[Fault, ...]
    notes: tuple[str, ...]
    family: Family | None
    llm_config: Mapping[str, Json] | None
    base_tokenizer: Tokenizer | None
    tokenizer: Tokenizer | None
    plan: Plan | None


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """The plan for `checkpoint`. Raises `PlanError` with all that keeps it from being exact."""
    found = assess(checkpoint, options)
    raise_faults(PlanError, [*found.faults, *found.pending])
    assert found.plan is not None  # noqa: S101
    _log_plan(found.plan)
    return found.plan


def _log_plan(plan: Plan) -> None:
    for file in plan.mapping.files:
        _log.debug("mapping: %s, SHA-256 %s", file.name, file.sha256)
    for path in plan.copied_files:
        _log.debug("%s: copied from %s", path.name, path.parent)
    for name in plan.made_files:
        _log.debug("%s: made", name)


def assess(checkpoint: Checkpoint, options: Options) -> Assessment:
    """What becomes of `checkpoint`: the one judgement that all commands go by."""
    return _Planner(checkpoint, options).assessment()


@dataclass(frozen=True, slots=True)
class _Parts:
    """What was found; everything else follows from it. None where it is at fault or not known."""

    family: Family | None
    llm_config: Mapping[str, Json] | None
    values: Mapping[str, object] | None
    limits: tuple[Limit, ...]
    llm: LanguageModel | None
    base_tokenizer: Tokenizer | None
    tokenizer: Tokenizer | None
    tower: Mapping[str, object] | None
    tower_name: str | None
    images: ImageProcessor | None
    writes_tower: bool | None
    layer: int | None
    depth: int | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a plan has besides the tensors that it writes."""

    values: Mapping[str, object]
    llm_tensors: Mapping[str, LazyTensor]
    dtype: str
    ids: TokenIds
    chat: Chat
    generation_config: Mapping[str, Json]
    environment: Mapping[str, object]
    format_keys: Mapping[str, object]
    copied: tuple[Path, ...]
    made: Mapping[str, MadeFile]


class _Planner:
    """The stages of `assess`, with what they share."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._training_config = checkpoint.training_config
        self._catalogue = Catalogue.shipped()
        self._format = self._catalogue.formats[options.format]
        faults = [fault for fault in checkpoint.faults if fault not in checkpoint.pending]
        self._found = Findings(faults, checkpoint.notes)

    def assessment(self) -> Assessment:
        """The judgement, with the plan where everything is known."""
        checkpoint, found = self._checkpoint, self._found
        plan: Plan | None = None
        parts = self._parts()
        try:
            found.stop()
            prepared = self._prepare(parts)
            found.stop()
            if not checkpoint.pending and not checkpoint.before_training:
                plan = self._plan(parts, prepared)
                found.stop()
        except ConversionError as error:
            found.faults[:] = error.faults
        faults = tuple(dict.fromkeys(found.faults))
        family = parts.family
        return Assessment(
            format=self._format.name,
            architecture=None if faults or family is None else self._class_of(family).architecture,
            fidelity=Fidelity.of(parts.limits, inexact=checkpoint.inexact, faults=faults),
            faults=faults,
            pending=checkpoint.pending,
            notes=found.notes,
            family=family,
            llm_config=parts.llm_config,
            base_tokenizer=parts.base_tokenizer,
            tokenizer=parts.tokenizer,
            plan=None if faults else plan,
        )

    def _parts(self) -> _Parts:
        """Reads and checks each part, whether or not another is at fault."""
        checkpoint, options, found = self._checkpoint, self._options, self._found
        llm, attempt = checkpoint.llm, self._found.attempt
        config = attempt(
            lambda: trained_llm_config(llm.config, self._training_config) if llm.config else None
        )
        names = llm.tensors.keys() or None
        family = attempt(
            lambda: (
                choose_family(self._catalogue, options.mapping, config, names) if config else None
            )
        )
        trained = attempt(lambda: training_tokenizer(checkpoint, options.tokenizer, found))
        base_tokenizer = trained.tokenizer if trained is not None else None
        tokenizer = attempt(lambda: self._tokenizer(base_tokenizer, family))
        attempt(lambda: _check_program(options.for_, family))
        images = attempt(lambda: image_processor_of(checkpoint, found))
        tower_name = attempt(lambda: self._tower_name(images))
        translated = attempt(
            lambda: plain_config(family, config, self._format, found) if family and config else None
        )
        values, limits = translated or (None, ())
        model = attempt(
            lambda: (
                plain_language_model(family, config, values, llm.tensors, found)
                if family and config and values and llm.tensors
                else None
            )
        )
        tower = attempt(lambda: check_tower(checkpoint, self._tower_class))
        if not checkpoint.before_training:
            attempt(lambda: check_projector_of(checkpoint, values))
        writes = attempt(lambda: writes_tower(checkpoint, options))
        self._check_rows(model, values, tokenizer, trained is not None and trained.is_base)
        training_config = self._training_config
        layer = attempt(
            lambda: -2 if training_config is None else training_config.visual_select_layer
        )
        depth = attempt(self._depth)
        return _Parts(
            family=family,
            llm_config=config,
            values=values,
            limits=tuple(limits),
            llm=model,
            base_tokenizer=base_tokenizer,
            tokenizer=tokenizer,
            tower=tower,
            tower_name=tower_name,
            images=images,
            writes_tower=writes,
            layer=layer,
            depth=depth,
        )

    def _tokenizer(self, base: Tokenizer | None, family: Family | None) -> Tokenizer | None:
        """The tokenizer to write, as the programs that the format is for load it."""
        if base is None or family is None:
            return None
        options, found = self._options, self._found
        made = tokenizer_to_write(base, family, self._training_config, options.bos_token, found)
        prepared = readable_tokenizer(made, options.format)
        found.note(*prepared.notes)
        return prepared.tokenizer

    def _check_rows(
        self,
        model: LanguageModel | None,
        values: Mapping[str, object] | None,
        tokenizer: Tokenizer | None,
        is_base: bool,
    ) -> None:
        """Faults where the vocabulary does not have the rows that the tokenizer needs."""
        if tokenizer is None or not values:
            return
        before = values.get("vocab_size")
        known = None if self._checkpoint.llm.tensors else before  # of tensors at fault, nothing is
        rows = model.rows if model is not None else known
        if isinstance(rows, int):
            faults = vocabulary_faults(tokenizer, rows, before, is_base=is_base)
            self._found.faults.extend(faults)
            if rows != before:
                self._found.note(
                    f"The vocabulary has {rows} rows, as trained; the base's config says {before}."
                )

    def _prepare(self, parts: _Parts) -> _Prepared:
        """All that follows from parts without faults, and needs no tensors."""
        format_, found, training_config = self._format, self._found, self._training_config
        # Without faults, all of these are there, which mypy does not know.
        assert parts.family and parts.llm_config and parts.values and parts.tokenizer  # noqa: S101
        assert parts.tower and parts.images and parts.layer is not None  # noqa: S101
        base_generation = self._base_generation()
        ids, chat = generation_tokens(
            self._catalogue,
            parts.family,
            parts.tokenizer,
            training_config,
            self._options.bos_token,
            base_generation,
            parts.llm_config,
            found,
        )
        tokenizer, tokens = with_format_tokens(parts.tokenizer, format_.tokens)
        if "pad" in tokens:
            ids = TokenIds(ids.bos, ids.eos, tokens["pad"])
        model = parts.llm
        values, tensors = dict(parts.values), dict[str, LazyTensor]()
        if model is not None:
            values, grown = self._grown(model, tokenizer, tokens)
            tensors = dict(grown)
        dtype = dtype_to_write(
            self._options.dtype,
            parts.llm_config,
            model.tensors.values() if model is not None else (),
            found,
        )
        environment = self._environment(parts, values, tokens)
        format_keys = format_.config(environment)
        generation, notes = generation_config(base_generation, ids)
        found.note(*notes)
        tokenizer = self._as_trained(tokenizer, chat)
        tokenizer, made = self._files(parts, tokenizer, tokens, format_keys)
        copied = [tokenizer.folder / name for name in tokenizer.copied]
        if PREPROCESSOR not in made and parts.images.path is not None:
            copied.append(parts.images.path)
        return _Prepared(
            values,
            tensors,
            dtype,
            ids,
            chat,
            generation,
            environment,
            format_keys,
            tuple(copied),
            made,
        )

    def _environment(
        self, parts: _Parts, values: Mapping[str, object], tokens: Mapping[str, int]
    ) -> dict[str, object]:
        """What the expressions of a format know, see `Format.config`."""
        assert parts.layer is not None  # noqa: S101
        tower = self._checkpoint.visual_encoder.config
        environment: dict[str, object] = {
            **values,
            "vision": {**(tower.values if tower is not None else {}), "name": parts.tower_name},
            "xtuner": self._training_values(parts.layer),
            "projector": {"depth": parts.depth},
            "projector_type": f"mlp{parts.depth}x_gelu",
            "tokens": tokens,
            "writes": {"visual_encoder": parts.writes_tower},
        }
        if not parts.writes_tower:
            self._found.note(
                "The vision tower is not written: LLaVA takes it from mm_vision_tower; "
                "LLaVA-NeXT computes NaN unless loading it is delayed."
            )
        return environment

    def _plan(self, parts: _Parts, prepared: _Prepared) -> Plan:
        """The whole plan."""
        checkpoint, format_, found = self._checkpoint, self._format, self._found
        model = parts.llm
        assert model is not None and parts.tower is not None  # noqa: S101
        becomes = model.family.target_class
        components: dict[str, Mapping[str, LazyTensor]] = {LLM: prepared.llm_tensors}
        if parts.writes_tower:
            components[VISUAL_ENCODER] = checkpoint.visual_encoder.tensors
        components[PROJECTOR] = dict(sorted(checkpoint.projector.tensors.items()))
        placed, dropped = place(
            components, {LLM: model.origins}, format_, prepared.environment, found
        )
        found.stop()
        tensors = in_dtype(placed, prepared.dtype)
        found.note(unchecked_note(tensors))
        config = output_config(
            format_,
            (becomes, prepared.values),
            (self._tower_class, parts.tower),
            prepared.format_keys,
            model_type=None if self._options.model_type == "official" else self._options.model_type,
            dtype=config_dtype(prepared.dtype, model.tensors.values()),
            ids=prepared.ids,
        )
        shards = plan_shards(
            {p.name: p.tensor for p in tensors}, parse_size(self._options.max_shard_size)
        )
        files = {
            "config.json": json_bytes(config),
            "generation_config.json": json_bytes(prepared.generation_config),
            **({} if shards.index is None else {INDEX_NAME: shards.index}),
            **dict(sorted(_files_of_bases(prepared).items())),
        }
        return Plan(
            checkpoint=checkpoint,
            mapping=MappingInUse(
                model.family.name,
                becomes.name,
                format_.name,
                (*model.family.files, *format_.files),
            ),
            dtype=prepared.dtype,
            tensors=tensors,
            dropped=(*((LLM, d) for d in model.dropped), *dropped),
            config=config,
            generation_config=prepared.generation_config,
            token_ids=prepared.ids,
            chat=prepared.chat,
            files=files,
            copied_files=prepared.copied,
            made_files=tuple(prepared.made),
            processor=format_.processor,
            shards=shards,
            folder_name=self._class_of(model.family).folder_name,
            fidelity=Fidelity.of(parts.limits, inexact=checkpoint.inexact),
            notes=found.notes,
        )

    def _depth(self) -> int:
        """The number of the projector's layers; before training, what the config says."""
        if self._checkpoint.before_training and self._training_config is not None:
            return self._training_config.projector_depth
        return depth_of(self._checkpoint.projector.tensors)

    def _class_of(self, family: Family) -> FormatClass:
        return self._format.classes[family.target_class.name]

    @property
    def _tower_class(self) -> PlainClass:
        return self._catalogue.classes[TOWER_CLASS]

    def _tower_name(self, images: ImageProcessor | None) -> str | None:
        """What to write as `mm_vision_tower`; None where the format has no such key.

        Without the tower or its image processor, there are faults already.
        """
        tower = self._checkpoint.visual_encoder
        if VISION_TOWER_KEY not in self._format.config_rules.keys:
            return None
        if images is None or tower.config is None:
            return None
        named = vision_tower_name(
            self._options.vision_tower_name,
            cached_id(tower.folder) or tower.name,
            tower.config.values,
            images.values,
            writes_tower=self._options.include_vision_tower,
        )
        self._found.note(named.note)
        return named.name

    def _training_values(self, layer: int) -> dict[str, object]:
        """What the format reads as `xtuner.*`."""
        training_config = self._training_config
        if training_config is None:
            self._found.note(
                "No XTuner config is recorded: mm_vision_select_layer is LLaVAModel's default -2, "
                "and images are padded, as XTuner's export assumes. Give --xtuner-config if not."
            )
            return {"visual_select_layer": layer, "image_aspect_ratio": "pad"}
        self._found.note(*training_config.notes)
        return {
            "visual_select_layer": layer,
            # What LLaVA calls the plain resize and crop.
            "image_aspect_ratio": training_config.data.image_aspect_ratio or "square",
        }

    def _base_generation(self) -> Mapping[str, Json]:
        folder = self._checkpoint.llm.folder
        path = folder / "generation_config.json" if folder else None
        return read_json(path) if path is not None and path.is_file() else {}

    def _grown(
        self, model: LanguageModel, tokenizer: Tokenizer, tokens: Mapping[str, int]
    ) -> tuple[dict[str, object], Mapping[str, LazyTensor]]:
        """The LLM's config and tensors, with rows for the tokens that the format adds."""
        rows = rows_for(model.rows, tokenizer.highest_id + 1)
        if rows == model.rows:
            return dict(model.values), model.tensors
        names = vocabulary_tensors(model.family.target_class, model.values)
        added = ", ".join(f"{use} {index}" for use, index in tokens.items() if index >= model.rows)
        self._found.note(
            f"The vocabulary has {rows} rows in place of {model.rows}, for the tokens that are "
            f"added ({added}); each new row is the mean of the others."
        )
        return {**model.values, "vocab_size": rows}, with_rows(model.tensors, names, rows)

    def _as_trained(self, tokenizer: Tokenizer, chat: Chat) -> Tokenizer:
        """The tokenizer with the bos and the chat template of the training, where they are read."""
        with_processor = self._format.processor is not None
        if not with_processor:
            tokenizer = with_trained_bos(tokenizer, self._training_config, self._found)
        # Official LLaVA reads no chat template; servers of the plain model type `llava` do.
        if with_processor or self._options.model_type == "llava":
            tokenizer = with_trained_chat(
                tokenizer,
                chat.prompt,
                self._training_config,
                self._found,
                with_processor=with_processor,
            )
        return tokenizer

    def _files(
        self,
        parts: _Parts,
        tokenizer: Tokenizer,
        tokens: Mapping[str, int],
        format_keys: Mapping[str, object],
    ) -> tuple[Tokenizer, dict[str, MadeFile]]:
        """The tokenizer as it is written, and all files that are made."""
        processor, image = self._format.processor, tokens.get("image")
        assert parts.images and parts.tower  # noqa: S101
        if processor is None or image is None:
            return tokenizer, {**tokenizer.made, **parts.images.made}
        # The processor pads prompts of a batch, and an answer follows on a prompt's last token.
        tokenizer = with_config(tokenizer, {"processor_class": processor, "padding_side": "left"})
        if FAST not in tokenizer.files:
            self._found.note(
                f"The base's tokenizer has no {FAST}, and transformers 5 loads LLaVA's from that, "
                "or from tokenizer.model with sentencepiece and protobuf installed. "
                "AutoTokenizer's from_pretrained and save_pretrained make one for the base."
            )
        training_config = self._training_config
        ratio = training_config.data.image_aspect_ratio if training_config is not None else "pad"
        self._found.note(padding_note(ratio))
        made = processor_files(
            processor,
            parts.images.values,
            image_token=self._format.tokens["image"],
            patch_size=_integer(parts.tower["patch_size"]),
            select_strategy=str(format_keys.get("vision_feature_select_strategy", "default")),
            aspect_ratio=ratio,
        )
        return tokenizer, {**tokenizer.made, **made}


def _check_program(name: str | None, family: Family | None) -> None:
    """Raises `UnsupportedError` where the program does not have the class that the LLM becomes."""
    if name is None or family is None or PROGRAMS[name].takes(family.target_class.name):
        return
    others = [
        other for other, program in PROGRAMS.items() if program.takes(family.target_class.name)
    ]
    raise UnsupportedError(
        f"{PROGRAMS[name].title} has no class for {family.target_class.architecture}, which this "
        "LLM becomes",
        where=flag("for_"),
        advice=f"Programs that have one: {', '.join(others)}.",
    )


def _files_of_bases(prepared: _Prepared) -> dict[str, bytes]:
    """Files of the base models, as they are or edited, without paths of a machine."""
    files = {path.name: read_small(path, _MAX_COPIED_BYTES) for path in prepared.copied}
    files |= {name: make() for name, make in prepared.made.items()}
    return {
        name: redact_json(data) if name.endswith("_config.json") else data
        for name, data in files.items()
    }


def _integer(value: object) -> int:
    """A size of a config that its class has checked."""
    assert isinstance(value, int)  # noqa: S101
    return value
