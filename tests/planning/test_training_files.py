"""The image processor of the training, where the XTuner config leaves the class to the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from xtuner2llava import PlanError, plan
from xtuner2llava.planning.plan import Plan

CASE = "qwen2_b_full_frozenvis"


def planned(checkpoints: Path, tmp_path: Path, named: dict[str, str]) -> Plan:
    """The plan where the config says AutoImageProcessor, and the base's file names a class so."""
    tower, config = tmp_path / "tower", tmp_path / "config.py"
    shutil.copytree(checkpoints / "bases/vision_clip", tower)
    path = tower / "preprocessor_config.json"
    values = json.loads(path.read_text())
    del values["image_processor_type"]
    path.write_text(json.dumps(values | named))
    text = (checkpoints / CASE / "config.py").read_text()
    config.write_text(text.replace("CLIPImageProcessor", "AutoImageProcessor"))
    return plan(
        checkpoints / CASE / "iter_2.pth",
        llm=checkpoints / "bases/llm_qwen2",
        vision=tower,
        vision_tower_name="openai/x",
        xtuner_config=config,
    )


@pytest.mark.parametrize(
    "named",
    [
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"image_processor_type": "CLIPImageProcessorPil"},
        {"feature_extractor_type": "CLIPFeatureExtractor"},
        {
            "image_processor_type": "CLIPImageProcessor",
            "feature_extractor_type": "SiglipFeatureExtractor",
        },
    ],
    ids=lambda named: ", ".join(named.values()),
)
def test_the_base_names_the_class(checkpoints: Path, tmp_path: Path, named: dict[str, str]) -> None:
    assert planned(checkpoints, tmp_path, named).shards.shards


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
        ({"feature_extractor_type": "SiglipFeatureExtractor"}, "SiglipFeatureExtractor"),
        (
            {
                "image_processor_type": "SiglipImageProcessor",
                "feature_extractor_type": "CLIPFeatureExtractor",
            },
            "SiglipImageProcessor",
        ),
        ({}, "AutoImageProcessor"),
    ],
)
def test_another_class_is_refused(
    checkpoints: Path, tmp_path: Path, named: dict[str, str], what: str
) -> None:
    with pytest.raises(PlanError, match=f"prepared images with {what}, "):
        planned(checkpoints, tmp_path, named)
