"""The image processor of the training, and the name that the tower has with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import ConversionError, convert, inspect, plan
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.vision_tower import PUBLISHED, PublishedTower, clip_processor

CASE = "qwen2_b_full_frozenvis/iter_2.pth"  # its tower was frozen
NAME = "openai/clip-tiny"
CONFIG = """
llm = 'model/Some-LLM'
tower = {tower!r}
image_processor = dict(type='transformers.{kind}.from_pretrained',
                       pretrained_model_name_or_path={processor!r}{arguments})
model = dict(
    type='xtuner.model.LLaVAModel',
    llm=dict(type='transformers.AutoModelForCausalLM.from_pretrained',
             pretrained_model_name_or_path=llm),
    visual_encoder=dict(type='transformers.CLIPVisionModel.from_pretrained',
                        pretrained_model_name_or_path=tower))
train_dataloader = dict(dataset=dict(
    type='xtuner.dataset.LLaVADataset', image_folder='data', image_processor=image_processor,
    pad_image_to_square=True))
"""


@pytest.fixture(autouse=True)
def published(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tower, as if openai had published it."""
    folder = checkpoints / "bases/vision_clip"
    config = json.loads((folder / "config.json").read_text())
    keys = PUBLISHED["openai/clip-vit-large-patch14"].config
    values = {key: config[key] for key in keys}
    images = clip_processor(json.loads((folder / "preprocessor_config.json").read_text()))
    monkeypatch.setitem(PUBLISHED, NAME, PublishedTower(values, images))  # type: ignore[arg-type]


def tower(checkpoints: Path, folder: Path, name: str = "tower", **images: Any) -> Path:
    """A copy of the tiny tower, with other values in its preprocessor_config.json."""
    copy = folder / name
    shutil.copytree(checkpoints / "bases/vision_clip", copy)
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | images))
    return copy


def config_file(
    folder: Path,
    *,
    tower: str = "model/clip-tiny",
    processor: str | None = None,
    kind: str = "CLIPImageProcessor",
    arguments: str = "",
) -> Path:
    path = folder / "my_config.py"
    named = tower if processor is None else processor
    path.write_text(CONFIG.format(tower=tower, processor=named, kind=kind, arguments=arguments))
    return path


def bases(checkpoints: Path, vision: Path, config: Path) -> dict[str, Any]:
    return {"llm": checkpoints / "bases/llm_qwen2", "vision": vision, "xtuner_config": config}


def images_of(made: Plan) -> dict[str, Any]:
    """The image processor's config that is written."""
    name = "preprocessor_config.json"
    values = json.loads(made.files[name])
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("recorded", ["model/clip-tiny", "./clip", "checkpoints/clip", "a/b/c"])
def test_a_relative_path_becomes_the_name_of_equal_values_and_is_never_linked(
    checkpoints: Path, tmp_path: Path, recorded: str
) -> None:
    given = bases(checkpoints, tower(checkpoints, tmp_path), config_file(tmp_path, tower=recorded))
    out = tmp_path / "llava-qwen"
    report = convert(checkpoints / CASE, out, **given)
    assert json.loads((out / "config.json").read_text())["mm_vision_tower"] == NAME
    (note,) = [note for note in report.plan.notes if "mm_vision_tower" in note]
    assert f"the tower is known here as '{recorded}'" in note
    card = (out / "README.md").read_text()
    assert "huggingface.co/model" not in card and "base_model:" not in card
    assert f"huggingface.co/{recorded}" not in card


def test_another_activation_is_no_published_tower(checkpoints: Path, tmp_path: Path) -> None:
    vision = tower(checkpoints, tmp_path)
    values = json.loads((vision / "config.json").read_text())
    (vision / "config.json").write_text(json.dumps(values | {"hidden_act": "gelu"}))
    config = config_file(tmp_path, tower="/models/laion")
    given = bases(checkpoints, vision, config)
    with pytest.raises(ConversionError, match="hidden_act is 'gelu' here and 'quick_gelu' there"):
        plan(checkpoints / CASE, **given)
    made = plan(checkpoints / CASE, format="hf", **given)
    assert made.config["vision_config"]["hidden_act"] == "gelu"  # type: ignore[index,call-overload]
    with pytest.raises(ConversionError, match="hidden_act"):
        plan(checkpoints / CASE, vision_tower_name=NAME, **given)
    named = plan(checkpoints / CASE, vision_tower_name="laion/x", **given)
    assert named.config["mm_vision_tower"] == "laion/x"
    said = inspect(checkpoints / CASE, **given).to_dict()
    assert "hidden_act is 'gelu' here" in json.dumps(said)


def test_the_image_processor_of_another_folder(checkpoints: Path, tmp_path: Path) -> None:
    other = tower(checkpoints, tmp_path, "other", image_mean=[0.5, 0.5, 0.5])
    config = config_file(tmp_path, processor=str(other))
    given = bases(checkpoints, tower(checkpoints, tmp_path), config)
    made = plan(checkpoints / CASE, vision_tower_name="laion/x", **given)
    assert images_of(made)["image_mean"] == [0.5, 0.5, 0.5]
    assert images_of(plan(checkpoints / CASE, format="hf", **given))["image_mean"] == [0.5] * 3
    unnamed = plan(checkpoints / CASE, **given)
    assert unnamed.config["mm_vision_tower"] == "model/clip-tiny"
    assert any("image_mean is [0.5, 0.5, 0.5] here" in note for note in unnamed.notes)


def test_one_that_is_not_here_is_said(checkpoints: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, processor="/data/processors/clip")
    given = bases(checkpoints, tower(checkpoints, tmp_path), config)
    made = plan(checkpoints / CASE, **given)
    assert any("takes its image processor from '/data/processors/clip'" in n for n in made.notes)


def test_a_published_one_need_not_be_here(checkpoints: Path, tmp_path: Path) -> None:
    vision = tower(checkpoints, tmp_path, image_mean=[0.5, 0.5, 0.5])
    made = plan(
        checkpoints / CASE, **bases(checkpoints, vision, config_file(tmp_path, processor=NAME))
    )
    assert images_of(made)["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert made.config["mm_vision_tower"] == NAME


@pytest.mark.parametrize("format_name", ["llava", "hf"])
def test_arguments_of_the_config_are_written(
    checkpoints: Path, tmp_path: Path, format_name: str
) -> None:
    config = config_file(
        tmp_path, arguments=", do_center_crop=False, size=dict(height=56, width=56), foo=1"
    )
    given = bases(checkpoints, tower(checkpoints, tmp_path), config)
    made = plan(checkpoints / CASE, format=format_name, **given)
    assert images_of(made)["size"] == {"height": 56, "width": 56}
    assert images_of(made)["do_center_crop"] is False
    assert images_of(made)["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    if format_name == "llava":
        assert made.config["mm_vision_tower"] == "model/clip-tiny"
    assert any("image_processor.foo is set" in note for note in made.notes)


def test_arguments_that_change_nothing_leave_the_file(checkpoints: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, arguments=", crop_size=dict(height=56, width=56), resample=3")
    made = plan(checkpoints / CASE, **bases(checkpoints, tower(checkpoints, tmp_path), config))
    assert "preprocessor_config.json" not in made.made_files
    assert made.config["mm_vision_tower"] == NAME


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "SiglipImageProcessor"}, "prepared images with SiglipImageProcessor"),
        ({"arguments": ", size=build()"}, "image_processor.size is unknown"),
        ({"arguments": ", crop_size=28"}, "prepares images of 28 pixels, the vision tower"),
    ],
)
def test_what_cannot_be_said_is_refused(
    checkpoints: Path, tmp_path: Path, change: dict[str, str], said: str
) -> None:
    given = bases(checkpoints, tower(checkpoints, tmp_path), config_file(tmp_path, **change))
    for format_name in ("llava", "hf"):
        with pytest.raises(ConversionError) as error:
            plan(checkpoints / CASE, format=format_name, **given)
        assert said in str(error.value)
