"""`make_plan`: the parts of a plan, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.hf.vocabulary import rows_for, vocabulary_tensors, with_rows
from xtuner2llava.llava.generation import TokenIds, generation_config
from xtuner2llava.llava.projector import depth_of
from xtuner2llava.llava.vision_tower_name import KEY as VISION_TOWER_KEY
from xtuner2llava.llava.vision_tower_name import vision_tower_name
from xtuner2llava.llm_config import trained_llm_config
from xtuner2llava.mapping import Catalogue, Limit, PlainClass
from xtuner2llava.options import Options, parse_size
from xtuner2llava.planning.chat import with_trained_bos, with_trained_chat
from xtuner2llava.planning.configuration import config_json
from xtuner2llava.planning.findings import Findings
from xtuner2llava.planning.language_model import (
    LanguageModel,
    choose_family,
    plain_config,
    plain_language_model,
)
from xtuner2llava.planning.placement import in_dtype, place
from xtuner2llava.planning.plan import MappingInUse, Plan
from xtuner2llava.planning.precision import config_dtype, dtype_to_write
from xtuner2llava.planning.processor import (
    PREPROCESSOR,
    padding_note,
    processor_files,
)
from xtuner2llava.planning.tokens import (
    generation_tokens,
    tokenizer_to_write,
    vocabulary_faults,
    with_format_tokens,
)
from xtuner2llava.planning.training_files import ImageProcessor, image_processor_of
from xtuner2llava.planning.vision_tower import (
    TOWER_CLASS,
    check_projector_of,
    check_tower,
    tower_values,
    writes_tower,
)
from xtuner2llava.published import cached_id
from xtuner2llava.sources import Checkpoint
from xtuner2llava.sources.contents import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.sources.json_file import Json, read_json
from xtuner2llava.tensors import LazyTensor
from xtuner2llava.tokenizers import FAST, MadeFile, Tokenizer, read_tokenizer, with_config
from xtuner2llava.verdict import Verdict
from xtuner2llava.writing.shards import plan_shards


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """The plan for `checkpoint`. Raises `PlanError` with all that keeps it from being exact."""
    planner = _Planner(checkpoint, options)
    return planner.plan(planner.parts())


@dataclass(frozen=True, slots=True)
class _Parts:
    """What was found without faults; everything else follows from it."""

    llm: LanguageModel
    llm_config: Mapping[str, Json]
    limits: tuple[Limit, ...]
    tokenizer: Tokenizer
    tower: Mapping[str, object]
    tower_name: str | None
    images: ImageProcessor
    writes_tower: bool


class _Planner:
    """The stages of `make_plan`, with what they share."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._recipe = checkpoint.recipe
        self._catalogue = Catalogue.shipped()
        self._format = self._catalogue.formats[options.format]
        self._found = Findings(checkpoint.faults, checkpoint.notes)

    def parts(self) -> _Parts:
        """Reads and checks each part, whether or not another is at fault."""
        checkpoint, options, found = self._checkpoint, self._options, self._found
        llm, attempt = checkpoint.llm, self._found.attempt
        config = attempt(
            lambda: trained_llm_config(llm.config, self._recipe) if llm.config else None
        )
        names = llm.tensors.keys()
        family = (
            attempt(lambda: choose_family(self._catalogue, options.mapping, config or {}, names))
            if llm.tensors and llm.config
            else None
        )
        tokenizer = attempt(
            lambda: (
                tokenizer_to_write(
                    read_tokenizer(llm.folder), family, self._recipe, options.bos_token, found
                )
                if llm.folder and family
                else None
            )
        )
        images = attempt(lambda: image_processor_of(checkpoint, found))
        tower_name = attempt(lambda: self._tower_name(images))
        translated = attempt(
            lambda: plain_config(family, config, self._format, found) if family and config else None
        )
        values, limits = translated or (None, ())
        model = attempt(
            lambda: (
                plain_language_model(family, config, values, llm.tensors, found)
                if family and config and values
                else None
            )
        )
        tower = attempt(lambda: check_tower(checkpoint, self._tower_class))
        attempt(lambda: check_projector_of(checkpoint, values))
        writes = attempt(lambda: writes_tower(checkpoint, options))
        if model is not None and tokenizer is not None:
            found.faults.extend(vocabulary_faults(tokenizer, model.rows))
        found.stop()
        # Without faults, all of these are there; mypy is told so.
        assert config and tokenizer and model and tower  # noqa: S101
        assert images is not None and writes is not None  # noqa: S101
        return _Parts(model, config, tuple(limits), tokenizer, tower, tower_name, images, writes)

    def plan(self, parts: _Parts) -> Plan:
        """The whole plan."""
        checkpoint, format_, found = self._checkpoint, self._format, self._found
        model, becomes = parts.llm, parts.llm.family.becomes
        base_generation = self._base_generation()
        ids, chat = generation_tokens(
            self._catalogue,
            model.family,
            parts.tokenizer,
            self._recipe,
            self._options.bos_token,
            base_generation,
            parts.llm_config,
            found,
        )
        tokenizer, tokens = with_format_tokens(parts.tokenizer, format_.tokens)
        if "pad" in tokens:
            ids = TokenIds(ids.bos, ids.eos, tokens["pad"])
        values, llm_tensors = self._grown(model, tokenizer, tokens)
        dtype = dtype_to_write(self._options.dtype, parts.llm_config, model.tensors.values(), found)
        depth = depth_of(checkpoint.projector.tensors)
        environment = {
            **values,
            "vision": {**tower_values(checkpoint), "name": parts.tower_name},
            "xtuner": self._recipe_values(),
            "projector": {"depth": depth},
            "projector_type": f"mlp{depth}x_gelu",
            "tokens": tokens,
            "writes": {"visual_encoder": parts.writes_tower},
        }
        components = {LLM: llm_tensors}
        if parts.writes_tower:
            components[VISUAL_ENCODER] = checkpoint.visual_encoder.tensors
        else:
            found.note(
                "The vision tower is not written: LLaVA takes it from mm_vision_tower; "
                "LLaVA-NeXT computes NaN unless it is told to delay loading it."
            )
        components[PROJECTOR] = dict(sorted(checkpoint.projector.tensors.items()))
        format_keys = found.attempt(lambda: format_.config(environment)) or {}
        found.stop()
        placed, dropped = place(components, {LLM: model.origins}, format_, environment, found)
        found.stop()
        tensors = in_dtype(placed, dtype)
        generation, notes = generation_config(base_generation, ids)
        found.note(*notes)
        config = config_json(
            format_,
            becomes,
            values,
            format_keys,
            self._tower_class,
            parts.tower,
            model_type=None if self._options.model_type == "official" else self._options.model_type,
            dtype=config_dtype(dtype, model.tensors.values()),
            ids=ids,
        )
        if format_.processor is None:
            tokenizer = with_trained_bos(tokenizer, self._recipe, found)
        # Official LLaVA reads no chat template; servers of the plain model type `llava` do.
        if format_.processor is not None or self._options.model_type == "llava":
            tokenizer = with_trained_chat(
                tokenizer,
                chat.prompt,
                self._recipe,
                found,
                with_processor=format_.processor is not None,
            )
        tokenizer, made = self._files(parts, tokenizer, tokens, format_keys)
        copied = [tokenizer.folder / name for name in tokenizer.copied]
        if PREPROCESSOR not in made and parts.images.path is not None:
            copied.append(parts.images.path)
        return Plan(
            checkpoint=checkpoint,
            mapping=MappingInUse(
                model.family.name,
                becomes.name,
                format_.name,
                (*model.family.files, *format_.files),
            ),
            dtype=dtype,
            tensors=tensors,
            ties=model.ties,
            dropped=(*((LLM, d) for d in model.dropped), *dropped),
            config=config,
            generation_config=generation,
            token_ids=ids,
            chat=chat,
            files=tuple(copied),
            made_files=made,
            processor=format_.processor,
            shards=plan_shards(
                {p.name: p.tensor for p in tensors}, parse_size(self._options.max_shard_size)
            ),
            folder_name=format_.classes[becomes.name].folder_name,
            verdict=Verdict.of(parts.limits, inexact=checkpoint.inexact),
            notes=found.notes,
        )

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

    def _recipe_values(self) -> dict[str, object]:
        """What the format reads as `xtuner.*`."""
        recipe = self._recipe
        if recipe is None:
            self._found.note(
                "No XTuner config is recorded: mm_vision_select_layer is LLaVAModel's default -2, "
                "and images are padded, as XTuner's export assumes. Give --xtuner-config if not."
            )
            return {"visual_select_layer": -2, "image_aspect_ratio": "pad"}
        self._found.note(*recipe.notes)
        return {
            "visual_select_layer": recipe.visual_select_layer,
            # What LLaVA calls the plain resize and crop.
            "image_aspect_ratio": recipe.image_aspect_ratio or "square",
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
        names = vocabulary_tensors(model.family.becomes, model.values)
        added = ", ".join(f"{use} {index}" for use, index in tokens.items() if index >= model.rows)
        self._found.note(
            f"The vocabulary has {rows} rows in place of {model.rows}, for the tokens that are "
            f"added ({added}); each new row is the mean of the others."
        )
        return {**model.values, "vocab_size": rows}, with_rows(model.tensors, names, rows)

    def _files(
        self,
        parts: _Parts,
        tokenizer: Tokenizer,
        tokens: Mapping[str, int],
        format_keys: Mapping[str, object],
    ) -> tuple[Tokenizer, dict[str, MadeFile]]:
        """The tokenizer as it is written, and all files that are made."""
        processor, image = self._format.processor, tokens.get("image")
        if processor is None or image is None:
            return tokenizer, {**tokenizer.made, **parts.images.made}
        # The processor pads prompts of a batch, and an answer follows on a prompt's last token.
        tokenizer = with_config(tokenizer, {"processor_class": processor, "padding_side": "left"})
        if FAST not in tokenizer.files:
            self._found.note(
                f"The base's tokenizer has no {FAST}, and transformers 5 loads LLaVA's from that, "
                "or from tokenizer.model with sentencepiece installed. AutoTokenizer's "
                "from_pretrained and save_pretrained make one for the base."
            )
        recipe = self._recipe
        ratio = recipe.image_aspect_ratio if recipe is not None else "pad"
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


def _integer(value: object) -> int:
    """A size of a config that its class has checked."""
    assert isinstance(value, int)  # noqa: S101
    return value
