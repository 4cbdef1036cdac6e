"""`make_plan`: the parts of a plan, put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from xtuner2llava.errors import ConversionError, Fault, PlanError, UnsupportedError, raise_faults
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.caveats import Limit
from xtuner2llava.mapping.expressions import visible
from xtuner2llava.mapping.family import Family
from xtuner2llava.mapping.format import FormatClass
from xtuner2llava.options import PROGRAMS, Options, decided, flag, parse_size
from xtuner2llava.planning import image_processor, language_model, placement, vision_tower
from xtuner2llava.planning.chat import (
    generation_tokens,
    trained_bos,
    with_trained_bos,
    with_trained_chat,
)
from xtuner2llava.planning.config import (
    TokenIds,
    generation_config,
    ids_with_rows,
    json_bytes,
    output_config,
)
from xtuner2llava.planning.plan import Chat, Fidelity, Findings, MappingInUse, Plan
from xtuner2llava.planning.redaction import cached_id, redact_json
from xtuner2llava.planning.tokenizer import (
    check_vocabulary,
    tokenizer_to_write,
    training_tokenizer,
    with_format_tokens,
)
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.sources.checkpoint import Checkpoint
from xtuner2llava.sources.model_config import ModelConfig, read_model_config, vision_tower_config
from xtuner2llava.storage.json_file import Json, read_json
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.tokenizers.compatibility import readable_tokenizer
from xtuner2llava.tokenizers.conversion import prepare_tokenizer
from xtuner2llava.tokenizers.tokenizer import FAST, Prepared, Tokenizer
from xtuner2llava.writing.shards import INDEX_NAME, plan_shards

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_STAGES = (
    # Each part is judged, whether or not another is at fault.
    ("llm_config", "family", "base_tokenizer", "tokenizer", "program", "images", "tower_name",
     "plain_config", "llm", "tower", "projector", "writes_tower", "vocabulary", "layer", "depth"),
    # These follow from them.
    ("generation", "dtype", "format_keys", "generation_config", "files_of_bases"),
)  # fmt: skip
_NO_CONFIG = (
    "No XTuner config is recorded: mm_vision_select_layer is LLaVAModel's default -2, and images "
    "are padded, as XTuner's export assumes. Give --xtuner-config if not."
)
# Of a tokenizer's or processor's file; the largest vocabularies have a tenth of it.
_MAX_COPIED_BYTES = 256 << 20
_MAX_KEYS, _MAX_LISTED = 40, 8


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """The plan for `checkpoint`. Raises `PlanError` with all that keeps it from being exact."""
    found = Assessment(checkpoint, options)
    raise_faults(PlanError, [*found.faults, *checkpoint.pending])
    for file in found.plan.mapping.files:
        _log.debug("mapping: %s, SHA-256 %s", file.name, file.sha256)
    if vision_tower.KEY not in found.plan.config:
        for name in ("vision_tower_name", "model_type"):
            if flag(name) in decided(options):
                what = "the format has no mm_vision_tower, and one model_type"
                found.found.note(f"{flag(name)} has no effect: {what}.")
    for path in found.plan.copied_files:
        _log.debug("%s: copied from %s", path.name, path.parent)
    for name in found.plan.made_files:
        _log.debug("%s: made", name)
    return replace(found.plan, notes=tuple(found.found.notes))


class _NotKnown(ConversionError):
    """A part follows from something that is not here, of which the checkpoint has the fault."""

    def __init__(self) -> None:
        super().__init__("is not known")
        self.faults = ()


class _part(Generic[_T]):
    """A part of an assessment: made when it is first asked for, and kept, as is its error.

    So each part is written as if the others were right: one that needs another that is at fault
    ends in the same error, and all others are still judged.
    """

    def __init__(self, make: Callable[[Assessment], _T]) -> None:
        self._make, self._name = make, make.__name__

    def __get__(self, found: Assessment, owner: type) -> _T:
        if self._name not in found.made and self._name not in found.errors:
            try:
                found.made[self._name] = self._make(found)
            except ConversionError as error:
                found.errors[self._name] = error
        if self._name in found.errors:
            raise found.errors[self._name]
        made: _T = found.made[self._name]
        return made


class Assessment:
    """What becomes of a checkpoint with some options: the one judgement that all commands go by.

    `faults` keep it from being converted. Each of its parts is there even if another is at fault.
    Without faults there is a plan, unless tensors are not known yet: weights that were not
    downloaded, or a training that has not begun. `other` judges the same with the same family and
    tokenizer, in another format or under another name.
    """

    def __init__(
        self, checkpoint: Checkpoint, options: Options, other: Assessment | None = None
    ) -> None:
        self.checkpoint, self.options, self._other = checkpoint, options, other
        self.catalogue = Catalogue.shipped()
        self.format = self.catalogue.formats[options.format]
        faults = [fault for fault in checkpoint.faults if fault not in checkpoint.pending]
        self.found = Findings(faults, checkpoint.notes)
        self.made: dict[str, Any] = {}
        self.errors: dict[str, ConversionError] = {}
        is_whole = not checkpoint.pending and not checkpoint.before_training
        for stage in (*_STAGES, ("plan",) if is_whole else ()):
            for name in stage:
                try:
                    getattr(self, name)
                except ConversionError as error:
                    self.found.faults.extend(error.faults)
            if self.found.faults:
                break

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(dict.fromkeys(self.found.faults))

    @property
    def fidelity(self) -> Fidelity:
        if self.found.faults:
            return Fidelity("not_possible")
        return Fidelity.of(self.plain_config[1], inexact=self.checkpoint.inexact)

    def known(self, get: Callable[[], _T]) -> _T | None:
        """What `get` takes from the parts; None where they are at fault."""
        with suppress(ConversionError):
            return get()
        return None

    @property
    def described(self) -> FormatClass:
        """What the LLM's plain class is called in the format."""
        return self.format.classes[self.family.target_class.name]

    def note_own_config(
        self, name: str, complete: Callable[[ModelConfig], Mapping[str, object]]
    ) -> None:
        """Notes where the config that the user gave for a part is not the artifact's own.

        The latter is as trained. `complete` makes the config of the part's class.
        """
        own, given = self.checkpoint.artifact.folders.get(name), self.checkpoint.parts[name].config
        if own is None or given is None or given.path.parent == own:
            return
        trained = self.known(lambda: complete(read_model_config(own)))
        used = self.known(lambda: complete(given))
        if trained is None or used is None:
            return
        differ = [
            f"{key} is {used.get(key)} here and {trained[key]} there"
            for key in trained
            if key != "vocab_size" and used.get(key) != trained[key]  # Tensors say that.
        ]
        if differ:
            self.found.note(
                f"{given.path} is used, and the checkpoint's own {own.name}/config.json is that of "
                f"the training: {', '.join(differ)}. Without --llm and --vision, its own counts."
            )

    # What was trained

    @_part
    def llm_config(self) -> Mapping[str, Json]:
        config = _known(self.checkpoint.llm.config)
        return language_model.trained_llm_config(config, self.checkpoint.training_config)

    @_part
    def family(self) -> Family:
        names = self.checkpoint.llm.tensors.keys() or None
        return language_model.choose_family(
            self.catalogue, self.options.mapping, self.llm_config, names
        )

    @_part
    def base_tokenizer(self) -> tuple[Tokenizer, bool]:
        """The tokenizer of the training, and whether it is only known as the base LLM's."""
        return _known(training_tokenizer(self.checkpoint, self.options.tokenizer, self.found))

    @_part
    def converted_tokenizer(self) -> Prepared:
        """The tokenizer of the training as its family converts it, which can take seconds."""
        if self._other is not None:
            return self._other.converted_tokenizer
        generation, rules = self.family.generation, self.family.tokenizer
        return prepare_tokenizer(
            self.base_tokenizer[0],
            rules.convert,
            rules.special_tokens,
            eos=next(iter(generation.eos), None),
            pad=generation.pad,
        )

    @_part
    def tokenizer(self) -> Tokenizer:
        """The tokenizer to write, as the programs that the format is for load it."""
        (base, _), data = self.base_tokenizer, self.checkpoint.training_data
        made = tokenizer_to_write(
            base,
            self.converted_tokenizer,
            self.family.generation.bos,
            data,
            self.options.bos_token,
            self.found,
        )
        prepared = readable_tokenizer(made, self.options.format)
        self.found.note(*prepared.notes)
        return prepared.tokenizer

    @_part
    def program(self) -> None:
        """Raises `UnsupportedError` where it does not have the class that the LLM becomes."""
        name, becomes = self.options.for_, self.family.target_class
        if name is None or PROGRAMS[name].takes(becomes.name):
            return
        others = [other for other, program in PROGRAMS.items() if program.takes(becomes.name)]
        raise UnsupportedError(
            f"{PROGRAMS[name].title} has no class for {becomes.architecture}, which this LLM "
            "becomes",
            where=flag("for_"),
            advice=f"Programs that have one: {', '.join(others)}.",
        )

    @_part
    def images(self) -> image_processor.ImageProcessor:
        folder = _known(self.checkpoint.visual_encoder.folder)
        return image_processor.trained_processor(self.checkpoint, folder, self.found)

    @_part
    def tower_name(self) -> str | None:
        """What to write as `mm_vision_tower`; None where the format has no such key."""
        tower, options = self.checkpoint.visual_encoder, self.options
        if vision_tower.KEY not in self.format.config_rules.keys:
            return None
        name, note = vision_tower.vision_tower_name(
            options.vision_tower_name,
            cached_id(tower.folder) or tower.name,
            _known(tower.config).values,
            self.images.values,
            writes_tower=options.include_vision_tower,
        )
        self.found.note(note)
        return name

    @_part
    def plain_config(self) -> tuple[Mapping[str, object], list[Limit]]:
        """The config of the LLM's plain class, every key explicit, and the caveats."""
        family, format_ = self.family, self.format
        translated, limits = language_model.translate(family, self.llm_config, format_)

        def complete(config: ModelConfig) -> Mapping[str, object]:
            trained = language_model.trained_llm_config(config, self.checkpoint.training_config)
            return family.translate_config(trained, format_).values

        self.note_own_config(LLM, complete)
        self.found.note(*(limit.text for limit in limits))
        if translated.not_carried:
            keys = [visible(key) for key in translated.not_carried[:_MAX_KEYS]]
            if (more := len(translated.not_carried) - len(keys)) > 0:
                keys.append(f"and {more:,} more")
            self.found.note(f"Config keys that the mapping does not read: {', '.join(keys)}.")
        return translated.values, limits

    @_part
    def llm(self) -> language_model.LanguageModel:
        values, llm = self.plain_config[0], self.checkpoint.llm
        of_base = LLM not in self.checkpoint.artifact.weights and llm.adapter is None
        return language_model.plain_language_model(
            self.family, self.llm_config, values, llm.tensors, self.found, of_base=of_base
        )

    @_part
    def tower(self) -> Mapping[str, object]:
        """The complete config of the vision tower."""
        tower = self.checkpoint.visual_encoder
        plain = self.catalogue.classes[vision_tower.TOWER_CLASS]
        self.note_own_config(
            VISUAL_ENCODER,
            lambda one: vision_tower.check_tower(vision_tower_config(one).values, {}, plain),
        )
        return vision_tower.check_tower(_known(tower.config).values, tower.tensors, plain)

    @_part
    def projector(self) -> None:
        if not self.checkpoint.before_training:
            vision_tower.check_projector(self.checkpoint, self.plain_config[0].get("hidden_size"))

    @_part
    def writes_tower(self) -> bool:
        if not self.options.include_vision_tower and self.checkpoint.visual_encoder.trained:
            raise PlanError(
                "the vision tower was trained, so it must be written",
                where="--no-include-vision-tower",
                advice="Leave the option out.",
            )
        return self.options.include_vision_tower

    @_part
    def vocabulary(self) -> None:
        """Raises `PlanError` where it does not have the rows that the tokenizer needs."""
        before, rows = self.plain_config[0].get("vocab_size"), self.llm.rows
        base, is_base = self.base_tokenizer
        if is_base and before == rows <= base.highest_id == self.tokenizer.highest_id:
            # As Llama 2's <pad> at first. Training cannot have used them.
            without = [text for text, index in base.ids.items() if index >= rows]
            listed = ", ".join(f"'{visible(text)}'" for text in without[:_MAX_LISTED])
            self.found.note(
                f"The base's vocabulary has {rows} rows, and tokens without one: {listed}."
            )
            return
        check_vocabulary(self.tokenizer, rows, before, is_base=is_base)
        if rows != before:
            self.found.note(
                f"The vocabulary has {rows} rows, as trained; the base's config says {before}."
            )

    @_part
    def layer(self) -> int:
        """Whose hidden states the projector gets, counted as `hidden_states` of transformers."""
        config, layers = self.checkpoint.training_config, self.tower["num_hidden_layers"]
        layer = -2 if config is None else config.visual_select_layer
        if isinstance(layers, int) and not -layers - 1 <= layer <= layers:
            raise PlanError(
                f"visual_select_layer is {layer}, and the vision tower has {layers} layers",
                where=config.where if config is not None else "",
                advice="Do the XTuner config and the base vision tower belong to this checkpoint?",
            )
        return layer

    @_part
    def depth(self) -> int:
        """The number of the projector's layers; before training, what the config says."""
        config = self.checkpoint.training_config
        if self.checkpoint.before_training and config is not None:
            return config.projector_depth
        return vision_tower.depth_of(self.checkpoint.projector.tensors)

    # What is written

    @_part
    def base_generation(self) -> Mapping[str, Json]:
        path = _known(self.checkpoint.llm.folder) / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @_part
    def format_tokens(self) -> tuple[Tokenizer, dict[str, int]]:
        return with_format_tokens(self.tokenizer, self.format.tokens)

    @_part
    def generation(self) -> tuple[TokenIds, Chat]:
        rows = self.llm.rows
        generation, generation_notes = ids_with_rows(self.base_generation, rows)
        config, config_notes = ids_with_rows(self.llm_config, rows)
        self.found.note(*generation_notes, *config_notes)
        ids, chat = generation_tokens(
            self.catalogue,
            self.family,
            self.tokenizer,
            self.checkpoint.training_data,
            self.options.bos_token,
            (generation, config),
            self.found,
        )
        _, tokens = self.format_tokens
        return (replace(ids, pad=tokens["pad"]) if "pad" in tokens else ids), chat

    @_part
    def written_llm(self) -> language_model.LanguageModel:
        """The LLM, with rows for the tokens that the format adds."""
        before, (tokenizer, tokens) = self.llm, self.format_tokens
        grown = before.with_rows_for(tokenizer.highest_id + 1)
        if grown is not before:
            added = ", ".join(f"{use} {n}" for use, n in tokens.items() if n >= before.rows)
            why = f"the tokens that are added ({added})" if added else "tokens without one"
            self.found.note(
                f"The vocabulary has {grown.rows} rows in place of {before.rows}, for {why}; each "
                "new row is the mean of the others."
            )
        return grown

    @_part
    def dtype(self) -> str:
        tensors = self.written_llm.tensors.values()
        return placement.dtype_to_write(self.options.dtype, self.llm_config, tensors, self.found)

    @_part
    def environment(self) -> Mapping[str, object]:
        """What the expressions of a format know, see `Format.config`."""
        config, data = self.checkpoint.training_config, self.checkpoint.training_data
        self.found.note(*(config.notes if config is not None else [_NO_CONFIG]))
        if not self.writes_tower:
            self.found.note(
                "The vision tower is not written: LLaVA takes it from mm_vision_tower; "
                "LLaVA-NeXT computes NaN unless loading it is delayed."
            )
        tower = _known(self.checkpoint.visual_encoder.config)
        return {
            **self.written_llm.values,
            "vision": {**tower.values, "name": self.tower_name},
            "xtuner": {
                "visual_select_layer": self.layer,
                # What LLaVA calls the plain resize and crop.
                "image_aspect_ratio": data.image_aspect_ratio or "square",
            },
            "projector": {"depth": self.depth},
            "projector_type": f"mlp{self.depth}x_gelu",
            "tokens": self.format_tokens[1],
            "writes": {VISUAL_ENCODER: self.writes_tower},
        }

    @_part
    def format_keys(self) -> Mapping[str, object]:
        return self.format.config(self.environment)

    @_part
    def generation_config(self) -> Mapping[str, Json]:
        values, notes = generation_config(self.base_generation, self.generation[0])
        self.found.note(*notes)
        return values

    @_part
    def files_of_bases(self) -> tuple[tuple[Path, ...], Tokenizer, dict[str, bytes]]:
        """The base models' own files that are copied; the tokenizer's and others that are made."""
        tokenizer, processor = self._tokenizer_as_trained(), self.format.processor
        images, pads = self.images, self.checkpoint.training_data.image_aspect_ratio == "pad"
        made = {}
        if images.path is None:
            made = {image_processor.PREPROCESSOR: json_bytes(images.values)}
        if processor is not None:
            # It pads prompts of a batch, and an answer follows on a prompt's last token.
            changes: dict[str, Json] = {"processor_class": processor, "padding_side": "left"}
            tokenizer = tokenizer.with_config(changes)
            if FAST not in tokenizer.files:
                self.found.note(
                    f"The base's tokenizer has no {FAST}, and transformers 5 loads LLaVA's from "
                    "that, or from tokenizer.model with sentencepiece and protobuf installed. "
                    "AutoTokenizer's from_pretrained and save_pretrained make one for the base."
                )
            self.found.note(image_processor.PADDING_NOTE if pads else None)
            made = image_processor.processor_files(
                processor,
                images.values,
                image_token=self.format.tokens["image"],
                patch_size=self.tower["patch_size"],
                select_strategy=self.format_keys.get("vision_feature_select_strategy", "default"),
                pads=pads,
            )
        copied = [tokenizer.folder / name for name in tokenizer.copied]
        if image_processor.PREPROCESSOR not in made and images.path is not None:
            copied.append(images.path)
        return tuple(copied), tokenizer, made

    def _tokenizer_as_trained(self) -> Tokenizer:
        """The tokenizer with the bos and the chat template of the training, where they are read."""
        (tokenizer, _), (_, chat) = self.format_tokens, self.generation
        with_processor = self.format.processor is not None
        data, bos = self.checkpoint.training_data, trained_bos(tokenizer, self.base_tokenizer[0])
        if not with_processor:
            tokenizer = with_trained_bos(tokenizer, bos, self.found, slow=data.tokenizer.is_slow)
        # Official LLaVA reads no chat template; servers of the plain model type `llava` do.
        if with_processor or self.options.model_type == "llava":
            tokenizer = with_trained_chat(
                tokenizer, chat.prompt, data, self.found, bos=bos, with_processor=with_processor
            )
        return tokenizer

    @_part
    def plan(self) -> Plan:
        checkpoint, format_, options, llm = self.checkpoint, self.format, self.options, self.llm
        components = {LLM: self.written_llm.tensors}
        if self.writes_tower:
            components[VISUAL_ENCODER] = checkpoint.visual_encoder.tensors
        components[PROJECTOR] = dict(sorted(checkpoint.projector.tensors.items()))
        tensors, dropped = placement.place(
            components, {LLM: llm.origins}, format_, self.environment, self.dtype
        )
        self.found.note(placement.unchecked_note(tensors))
        becomes, (ids, chat) = llm.family.target_class, self.generation
        config = output_config(
            format_,
            (becomes, self.written_llm.values),
            (self.catalogue.classes[vision_tower.TOWER_CLASS], self.tower),
            self.format_keys,
            model_type=None if options.model_type == "official" else options.model_type,
            dtype=placement.config_dtype(self.dtype, llm.tensors.values()),
            ids=ids,
        )
        shards = plan_shards(
            {p.name: p.tensor for p in tensors}, parse_size(options.max_shard_size)
        )
        copied, tokenizer, made = self.files_of_bases
        files = {path.name: read_small(path, _MAX_COPIED_BYTES) for path in copied}
        files |= {name: make() for name, make in tokenizer.made.items()} | made
        return Plan(
            checkpoint=checkpoint,
            mapping=MappingInUse(
                llm.family.name, becomes.name, format_.name, (*llm.family.files, format_.file)
            ),
            dtype=self.dtype,
            tensors=tuple(tensors),
            dropped=(*((LLM, each) for each in llm.dropped), *dropped),
            config=config,
            generation_config=self.generation_config,
            token_ids=ids,
            chat=chat,
            files={
                "config.json": json_bytes(config),
                "generation_config.json": json_bytes(self.generation_config),
                **({} if shards.index is None else {INDEX_NAME: shards.index}),
                # Those of the base models name no path of a machine.
                **{
                    name: redact_json(data) if name.endswith("_config.json") else data
                    for name, data in sorted(files.items())
                },
            },
            copied_files=copied,
            made_files=(*tokenizer.made, *made),
            processor=format_.processor,
            shards=shards,
            folder_name=self.described.folder_name,
            fidelity=self.fidelity,
            notes=tuple(self.found.notes),
        )


def _known(value: _T | None) -> _T:
    if value is None:
        raise _NotKnown
    return value
