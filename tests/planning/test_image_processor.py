"""Image processors as each transformers saved them, made one that all versions load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reference.cases import Converted
from xtuner2llava import ConversionError, plan, verify
from xtuner2llava.planning.image_processor import image_processor_faults, processor_faults
from xtuner2llava.planning.plan import Plan

COUNTS = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def written(made: Plan, name: str = "preprocessor_config.json") -> Any:
    return json.loads(made.files[name])


@pytest.mark.parametrize("format_name", ["llava", "hf"])
@pytest.mark.parametrize("saved", ["Fast", "Pil", "unnamed", "nested", "nested Fast", "of 4.31"])
def test_what_each_version_saves_becomes_one_that_all_load(
    checkpoints: Path, tmp_path: Path, saved: str, format_name: str
) -> None:
    tower = tmp_path / "tower"
    tower.mkdir()
    for path in (checkpoints / "bases/vision_clip").iterdir():
        (tower / path.name).write_bytes(path.read_bytes())
    path = tower / "preprocessor_config.json"
    before = json.loads(path.read_text())
    values = {key: value for key, value in before.items() if key != "image_processor_type"}
    if saved == "of 4.31":
        values |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56}
    elif "unnamed" not in saved:
        values["image_processor_type"] = "CLIPImageProcessor" + saved.removeprefix("nested").strip()
    path.write_text(json.dumps(values))
    if saved.startswith("nested"):
        path.unlink()
        nested = {"image_processor": values, "processor_class": "CLIPProcessor"}
        (tower / "processor_config.json").write_text(json.dumps(nested))
    made = plan(
        checkpoints / "qwen2_b_full_frozenvis/iter_2.pth",
        llm=checkpoints / "bases/llm_qwen2",
        vision=tower,
        vision_tower_name="openai/x",
        format=format_name,
    )
    found = written(made)
    assert tuple(image_processor_faults(found)) == ()
    assert found["image_mean"] == before["image_mean"]
    assert found["crop_size"] in (before["crop_size"], 56)
    said = [note for note in made.notes if "preprocessor_config.json is" in note]
    assert bool(said) == (saved != "of 4.31")
    if format_name == "hf":
        assert tuple(processor_faults(written(made, "processor_config.json"), 14)) == ()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image_processor_type": "CLIPImageProcessorPil"}, "names CLIPImageProcessorPil"),
        ({"image_processor_type": "SiglipImageProcessor"}, "names SiglipImageProcessor"),
        ({}, "names no class"),
        ({"image_processor_type": "LlavaImageProcessor"}, "without do_pad true"),
    ],
)
def test_classes_that_not_every_version_makes(values: dict[str, Any], says: str) -> None:
    (fault,) = image_processor_faults(values)
    assert says in fault


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({**COUNTS, "patch_size": 16}, "has patch_size 16, the tower 14"),
        ({**COUNTS, "patch_size": None}, "lacks patch_size"),
        ({}, "lacks patch_size, vision_feature_select_strategy, num_additional_image_tokens"),
        ({**COUNTS, "image_processor": {}}, "holds an image processor"),
    ],
)
def test_a_processor_that_counts_otherwise(values: dict[str, Any], says: str) -> None:
    (fault,) = processor_faults(values, 14)
    assert says in fault


def test_verify_reads_the_processor(converted: Converted, tmp_path: Path) -> None:
    folder = converted("qwen2_e_full_fullvis", format="hf")
    copy = tmp_path / "llava-qwen"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())

    def details() -> str:
        checks = verify(copy).checks
        return next(check.detail for check in checks if check.name == "image processor")

    assert "crops to 56 pixels" in details()
    path = copy / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 28}))
    assert "has patch_size 28, the tower 14" in details()


@pytest.mark.parametrize("recorded", ["openai/clip-vit-large-patch14-336", "org/clip", None])
def test_a_tower_without_image_processor(
    checkpoints: Path, tmp_path: Path, recorded: str | None
) -> None:
    """One of OpenAI's is known; else the error says what to give."""
    tower = Path(shutil.copytree(checkpoints / "bases/vision_clip", tmp_path / "tower"))
    (tower / "preprocessor_config.json").unlink()
    config = (checkpoints / "qwen2_a_pretrain/config.py").read_text()
    path = tmp_path / "config.py"
    path.write_text(config.replace("bases/vision_clip", recorded or "bases/vision_clip"))
    given = {
        "llm": checkpoints / "bases/llm_qwen2",
        "vision": tower,
        "vision_tower_name": "openai/x",
        "xtuner_config": path,
    }
    checkpoint = checkpoints / "qwen2_a_pretrain/iter_2.pth"
    with pytest.raises(ConversionError) as caught:
        plan(checkpoint, **given)
    (fault,) = caught.value.faults
    if recorded is not None and recorded.startswith("openai"):
        assert "prepares images of 336 pixels, the vision tower takes 56" in fault.what
        return
    assert fault.where == str(tower)
    assert "has no preprocessor_config.json" in fault.what
    assert "a folder with the vision tower and its preprocessor_config.json" in fault.advice
