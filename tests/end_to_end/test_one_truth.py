"""What `inspect` says, `plan` and `convert` do, and `verify` agrees: for every kind of input.

Each situation is a checkpoint with options. Wrong variants of the product are what the situations
were made of: a tower known only by an absolute path, ids past the rows, a base that is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from reference.cases import CASES
from xtuner2llava import ConversionError, convert, inspect, plan, verify

Situation = tuple[Path, dict[str, Any]]
FORMATS = ("hf", "llava")
NAME = {"vision_tower_name": "openai/clip"}


class Field:
    """Copies of real files, for a situation to change."""

    def __init__(self, checkpoints: Path, folder: Path) -> None:
        self.checkpoints, self.folder = checkpoints, folder
        self.pretrained = checkpoints / "qwen2_a_pretrain/iter_2.pth"
        self.llm, self.vision = self._copy("llm_qwen2"), self._copy("vision_clip")
        self.bases = {"llm": self.llm, "vision": self.vision}

    def _copy(self, name: str) -> Path:
        copy = self.folder / name
        shutil.copytree(self.checkpoints / "bases" / name, copy)
        return copy

    def base(self, name: str) -> Path:
        return self.checkpoints / "bases" / name

    def projector(self, depth: int = 2) -> Path:
        """A checkpoint of nothing but a projector, without a config."""
        import torch

        state = {}
        for layer in range(depth):
            weight = torch.ones(64, 48 if layer == 0 else 64)
            state[f"projector.model.{2 * layer}.weight"] = weight
            state[f"projector.model.{2 * layer}.bias"] = torch.zeros(64)
        path = self.folder / f"iter_{depth}.pth"
        torch.save({"state_dict": state, "meta": {}}, path)
        return path

    def change(self, path: Path, **values: Any) -> None:
        """Changes values of a JSON file; None takes a key away."""
        old = json.loads(path.read_text()) if path.exists() else {}
        merged = {**old, **values}
        path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))

    def config(self, old: str = "", new: str = "") -> Path:
        """The config of the pretraining, with a text replaced."""
        text = (self.checkpoints / "qwen2_a_pretrain/config.py").read_text()
        assert old in text
        path = self.folder / "changed.py"
        path.write_text(text.replace(old, new, 1))
        return path


def plain(field: Field) -> Situation:
    return field.pretrained, {**field.bases, **NAME}


def tower_by_absolute_path(field: Field) -> Situation:
    return field.pretrained, {**field.bases, "xtuner_config": field.config(
        "visual_encoder_name_or_path = 'bases/vision_clip'",
        f"visual_encoder_name_or_path = {str(field.vision)!r}")}  # fmt: skip


def tower_without_a_record(field: Field) -> Situation:
    return field.projector(), field.bases


def tower_of_a_published_shape_named_by_the_user(field: Field) -> Situation:
    name = "openai/clip-vit-large-patch14-336"
    return field.pretrained, {**field.bases, "vision_tower_name": name}


def ids_past_the_rows(field: Field) -> Situation:
    field.change(field.llm / "added_tokens.json", **{"<new>": 5000})
    return field.pretrained, {**field.bases, **NAME}


def base_that_is_missing(field: Field) -> Situation:
    return field.pretrained, {"llm": field.folder / "nowhere", "vision": field.vision, **NAME}


def base_without_weights(field: Field) -> Situation:
    (field.llm / "model.safetensors").unlink()
    return field.pretrained, {**field.bases, **NAME}


def another_base_than_was_trained(field: Field) -> Situation:
    return field.pretrained, {**field.bases, "llm": field.base("llm_llama_gqa"), **NAME}


def another_tower_than_was_trained(field: Field) -> Situation:
    field.change(field.vision / "config.json", hidden_size=64)
    return field.pretrained, {**field.bases, **NAME}


def mapping_of_another_family(field: Field) -> Situation:
    return field.pretrained, {**field.bases, "mapping": "internlm2", **NAME}


def mapping_of_ones_own(field: Field) -> Situation:
    path = field.folder / "mine.yaml"
    path.write_text("schema: 1\nfamily: mine\nextends: qwen2\n")
    return field.pretrained, {**field.bases, "mapping": path, **NAME}


def tokenizer_that_cannot_be_read(field: Field) -> Situation:
    (field.llm / "tokenizer.json").write_text("{")
    return field.pretrained, {**field.bases, **NAME}


def no_tokenizer(field: Field) -> Situation:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (field.llm / name).unlink(missing_ok=True)
    return field.pretrained, {**field.bases, **NAME}


def generation_config_that_cannot_be_read(field: Field) -> Situation:
    (field.llm / "generation_config.json").write_text("[]")
    return field.pretrained, {**field.bases, **NAME}


def image_processor_of_another_size(field: Field) -> Situation:
    field.change(field.vision / "preprocessor_config.json", crop_size={"height": 9, "width": 9})
    return field.pretrained, {**field.bases, **NAME}


def bos_token_that_is_not_a_token(field: Field) -> Situation:
    return field.pretrained, {**field.bases, "bos_token": "<nothing>", **NAME}


def projector_of_three_layers(field: Field) -> Situation:
    return field.projector(depth=3), {**field.bases, **NAME}


def frozen_tower_left_out(field: Field) -> Situation:
    return field.pretrained, {**field.bases, "include_vision_tower": False, **NAME}


def scaled_rotary_embedding(field: Field) -> Situation:
    field.change(field.llm / "config.json", rope_scaling={"type": "yarn", "factor": 2.0})
    return field.pretrained, {**field.bases, **NAME}


def sliding_window(field: Field) -> Situation:
    field.change(field.llm / "config.json", use_sliding_window=True, sliding_window=50)
    return field.pretrained, {**field.bases, **NAME}


def unknown_activation(field: Field) -> Situation:
    field.change(field.vision / "config.json", hidden_act="relu6")
    return field.pretrained, {**field.bases, **NAME}


def select_layer_from_code(field: Field) -> Situation:
    config = field.config("type=LLaVAModel,", "type=LLaVAModel, visual_select_layer=layer(),")
    return field.pretrained, {**field.bases, "xtuner_config": config, **NAME}


def tower_with_other_arguments(field: Field) -> Situation:
    config = field.config("visual_encoder=dict(", "visual_encoder=dict(hidden_act='gelu',")
    return field.pretrained, {**field.bases, "xtuner_config": config, **NAME}


def tower_as_a_text(field: Field) -> Situation:
    config = field.config("    visual_encoder=dict(", "    visual_encoder='clip', x=dict(")
    text = config.read_text()
    start = text.index(", x=dict(")
    config.write_text(text[:start] + ")\n" + text[text.index("llava_dataset = dict(") :])
    return field.pretrained, {**field.bases, "xtuner_config": config, **NAME}


def class_of_the_record_hidden_by_another_config(field: Field) -> Situation:
    import torch

    path = field.projector()
    saved = torch.load(path)
    saved["meta"] = {"cfg": "model = dict(type='xtuner.model.AnyResLLaVAModel')"}
    torch.save(saved, path)
    return path, {**field.bases, "xtuner_config": field.config(), **NAME}


def another_class(field: Field) -> Situation:
    config = field.config("import LLaVAModel", "import AnyResLLaVAModel as LLaVAModel")
    return field.pretrained, {**field.bases, "xtuner_config": config, **NAME}


def quantised_in_training(field: Field) -> Situation:
    config = field.config(
        "llm=dict(\n        type=AutoModelForCausalLM.from_pretrained,",
        "llm=dict(\n        type=AutoModelForCausalLM.from_pretrained,"
        " quantization_config=dict(load_in_4bit=True),",
    )
    return field.pretrained, {**field.bases, "xtuner_config": config, **NAME}


def paths_from_the_environment(field: Field) -> Situation:
    config = field.config("llm_name_or_path = 'bases/llm_qwen2'", "llm_name_or_path = env['LLM']")
    return field.pretrained, {**field.bases, "xtuner_config": config, **NAME}


def paths_from_the_environment_and_none_given(field: Field) -> Situation:
    config = field.config("llm_name_or_path = 'bases/llm_qwen2'", "llm_name_or_path = env['LLM']")
    return field.pretrained, {"vision": field.vision, "xtuner_config": config, **NAME}


SITUATIONS = [
    value
    for value in list(globals().values())
    if callable(value) and getattr(value, "__annotations__", {}).get("return") == "Situation"
]


@pytest.fixture
def field(checkpoints: Path, tmp_path: Path) -> Field:
    return Field(checkpoints, tmp_path)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda made: made.__name__)
def test_what_inspect_says_plan_and_convert_do_and_verify_agrees(
    field: Field, situation: Callable[[Field], Situation]
) -> None:
    checkpoint, options = situation(field)
    compare(checkpoint, options, field.folder)


@pytest.mark.parametrize("case", CASES)
def test_the_same_for_every_case(checkpoints: Path, tmp_path: Path, case: str) -> None:
    for source in sorted((checkpoints / case).glob("iter_2*")):
        if source.name != "iter_2_official":
            compare(source, CASES[case].options(checkpoints), tmp_path, convert_too=False)


@pytest.mark.parametrize("kind", ["llama_3_1", "gemma", "qwen3", "phi3", "baichuan2"])
def test_the_same_for_families(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    import transformers

    if KINDS[kind].shapes is None and not hasattr(transformers, KINDS[kind].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    made = write_trained(tmp_path / "trained", KINDS[kind].make(tmp_path / "source"), checkpoints)
    compare(made.checkpoint, made.bases, tmp_path, convert_too=False)


def compare(
    checkpoint: Path, options: dict[str, Any], folder: Path, *, convert_too: bool = True
) -> None:
    """Asserts that the commands agree on every format."""
    targets = {target.format: target for target in inspect(checkpoint, **options).targets}
    assert sorted(targets) == list(FORMATS)
    for name, target in targets.items():
        said = {str(fault) for fault in target.faults}
        try:
            planned = plan(checkpoint, format=name, **options)
        except ConversionError as error:
            assert not target.is_possible, error
            assert said == {str(fault) for fault in error.faults}
            if convert_too:
                with pytest.raises(ConversionError):
                    convert(checkpoint, folder / name, format=name, **options)
            continue
        assert target.is_possible and not said
        assert (target.fidelity, target.architecture) == (planned.fidelity, planned.architecture)
        if convert_too:
            out = folder / f"out-{name}"  # a name by which LLaVA loads nothing
            report = convert(checkpoint, out, format=name, **options)
            assert report.plan.fidelity == target.fidelity
            checked = verify(out)
            assert checked.passed, checked.to_dict()


def no_change(field: Field) -> Path:
    return field.config()


def tower_by_absolute_path_in_the_config(field: Field) -> Path:
    return field.config("'bases/vision_clip'", repr(str(field.vision)))


def longer_context(field: Field) -> Path:
    return field.config("type=LLaVAModel,", "type=LLaVAModel, max_position_embeddings=1024,")


def deeper_projector(field: Field) -> Path:
    return field.config("type=LLaVAModel,", "type=LLaVAModel, projector_depth=3,")


def rope_in_the_config(field: Field) -> Path:
    return field.config(
        "llm=dict(", "llm=dict(rope_scaling=dict(type='linear', factor=4.0), cache_dir=env['X'],"
    )


def layer_that_only_code_knows(field: Field) -> Path:
    return field.config("type=LLaVAModel,", "type=LLaVAModel, visual_select_layer=layer(),")


def model_from_a_fork(field: Field) -> Path:
    return field.config("type=LLaVAModel,", "type=LLaVAModel, projector_type='qformer',")


def four_bits(field: Field) -> Path:
    return field.config("llm=dict(", "llm=dict(quantization_config=dict(load_in_4bit=True),")


def code_that_is_not_needed(field: Field) -> Path:
    return field.config(
        "# Data\n",
        "import argparse, os\nfrom pathlib import Path\n"
        "args = argparse.ArgumentParser().parse_args()\n"
        "root = Path(os.environ['ROOT']) / 'x'\nname = '{}/y'.format(root)\n"
        "workers = [os.cpu_count() for _ in range(3)]\n",
    )


def ids_past_the_rows_of_the_base(field: Field) -> Path:
    field.change(field.llm / "added_tokens.json", **{"<new>": 5000})
    return field.config()


def broken_tokenizer_of_the_base(field: Field) -> Path:
    (field.llm / "tokenizer.json").write_text("{")
    return field.config()


CONFIGS = [
    value
    for value in list(globals().values())
    if callable(value)
    and getattr(value, "__annotations__", {}) == {"field": "Field", "return": "Path"}
]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("change", CONFIGS, ids=lambda made: made.__name__)
def test_of_a_config_it_says_what_holds_for_the_checkpoint(
    field: Field, change: Callable[[Field], Path], named: bool
) -> None:
    config = change(field)
    depth = 3 if change is deeper_projector else 2
    options = {**field.bases, **(NAME if named else {})}
    before = inspect(config, **options)
    after = inspect(field.projector(depth), xtuner_config=config, **options)
    assert [one.to_dict() | {"caveats": []} for one in before.targets] == [
        one.to_dict() | {"caveats": []} for one in after.targets
    ]
    compare(field.projector(depth), {**options, "xtuner_config": config}, field.folder,
            convert_too=False)  # fmt: skip


def test_a_tower_without_a_name_is_a_condition_that_is_named(field: Field) -> None:
    (hf, llava) = inspect(field.projector(), **field.bases).targets
    assert hf.is_possible and hf.needs is None
    assert not llava.is_possible and llava.fidelity.kind == "not_possible"
    assert llava.needs == "vision_tower_name"
    assert llava.otherwise is not None and llava.otherwise.kind == "exact"
    assert str(llava).startswith("exact once vision_tower_name is given, as LlavaQwen")


def test_an_option_that_changes_the_plan_changes_what_inspect_says(field: Field) -> None:
    said = inspect(field.pretrained, dtype="keep", model_type="llava", **field.bases, **NAME)
    planned = plan(field.pretrained, dtype="keep", model_type="llava", **field.bases, **NAME)
    (llava,) = [target for target in said.targets if target.format == "llava"]
    notes = [note for note in planned.notes if note not in said.notes]
    assert list(llava.caveats) == notes


@pytest.mark.parametrize(
    ("situation", "found"),
    [
        (another_class, "xtuner.model.AnyResLLaVAModel, which is another class"),
        (class_of_the_record_hidden_by_another_config, "xtuner.model.AnyResLLaVAModel, which"),
        (tower_with_other_arguments, "is 'gelu' in training, and 'quick_gelu' in"),
        (paths_from_the_environment_and_none_given, "Name the base LLM with llm."),
        (select_layer_from_code, "model.visual_select_layer is not known without running code"),
    ],
)
def test_what_is_refused_says_why(
    field: Field, situation: Callable[[Field], Situation], found: str
) -> None:
    checkpoint, options = situation(field)
    for target in inspect(checkpoint, **options).targets:
        assert found in "\n".join(map(str, target.faults))


@pytest.mark.parametrize("situation", [plain, paths_from_the_environment, tower_as_a_text])
def test_the_users_word_makes_the_recorded_path_needless(
    field: Field, situation: Callable[[Field], Situation]
) -> None:
    checkpoint, options = situation(field)
    assert {t.fidelity.kind for t in inspect(checkpoint, **options).targets} == {"exact"}
