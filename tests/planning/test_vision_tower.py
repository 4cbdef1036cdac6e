"""The vision tower of the output: its name, and the projector that belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import UsageError
from xtuner2llava.planning.vision_tower import (
    depth_of,
    projector_faults,
    vision_tower_name,
    well_known,
)

LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}
TINY = {"hidden_size": 48, "num_hidden_layers": 4, "patch_size": 14, "image_size": 56}
NAME = "openai/clip-vit-large-patch14-336"
# As openai published it; keys that are missing have CLIPImageProcessor's defaults.
IMAGES = {"size": 336, "crop_size": 336, "resample": 3}


# The tower's name


@pytest.mark.parametrize(
    ("given", "recorded", "tower", "images", "expected"),
    [
        ("openai/my-clip", NAME, TINY, {}, "openai/my-clip"),  # the user's word counts
        (f"{NAME}/", None, LARGE_336, IMAGES, NAME),
        (NAME, None, TINY, {}, NAME),  # LLaVA fails with it, and does not compute something else
        (None, NAME, LARGE_336, IMAGES, NAME),
        (None, "openai/clip-foo", TINY, {}, "openai/clip-foo"),
        (None, "laion/CLIP-ViT-L-14", LARGE_336, IMAGES, "laion/CLIP-ViT-L-14"),
        (None, "Lin-Chen/ShareGPT4V-x", LARGE_336, IMAGES, "Lin-Chen/ShareGPT4V-x"),
        (None, "/home/me/clip", LARGE_336, IMAGES, NAME),
        (None, "AI-ModelScope/clip-vit-large-patch14-336", LARGE_336, IMAGES, NAME),
        (None, "model/clip", LARGE_336, IMAGES, NAME),
        (None, "checkpoints/sub/clip", LARGE_336, IMAGES, NAME),
        (None, "./clip", LARGE_336, IMAGES, NAME),
        (None, "C:\\clip", {**LARGE_336, "image_size": 224}, {}, "openai/clip-vit-large-patch14"),
        (None, None, {"patch_size": 16}, {}, "openai/clip-vit-base-patch16"),
        (None, None, {}, {}, "openai/clip-vit-base-patch32"),
        (None, "bases/sub/clip", TINY, {}, "bases/sub/clip"),
    ],
)
def test_the_name_that_is_written(
    given: str | None,
    recorded: str | None,
    tower: dict[str, Any],
    images: dict[str, Any],
    expected: str,
) -> None:
    assert vision_tower_name(given, recorded, tower, images).name == expected


@pytest.mark.parametrize(
    ("given", "is_known"),
    [
        ("openai/clip-mine", True),
        ("laion/CLIP-mine", True),
        ("Lin-Chen/ShareGPT4V-mine", True),
        ("ann/my-ShareGPT4V", True),
        ("ann/openai-clip", False),
        ("openai/clip/sub", False),
        ("clip", False),
    ],
)
def test_a_given_name_that_loaders_take_for_a_path_is_said(given: str, is_known: bool) -> None:
    found = vision_tower_name(given, None, TINY, {})
    assert found.name == given
    assert ("only where it exists as a path" in (found.note or "")) is not is_known


@pytest.mark.parametrize("recorded", ["/home/me/clip", "~/clip", "C:\\models\\clip", None])
def test_a_path_of_this_machine_is_never_published(recorded: str | None) -> None:
    with pytest.raises(UsageError) as error:
        vision_tower_name(None, recorded, TINY, {})
    assert "Give --vision-tower-name ID" in str(error.value)
    assert recorded is None or recorded not in str(error.value)


@pytest.mark.parametrize("given", ["/mnt/clip", "~/clip", "C:\\models\\clip"])
def test_a_path_of_one_machine_is_no_name_either(given: str) -> None:
    with pytest.raises(UsageError, match="is a path of one machine, which must not be published"):
        vision_tower_name(given, None, TINY, {})


def test_what_was_put_in_its_place_is_said() -> None:
    note = vision_tower_name(None, "/home/me/clip", LARGE_336, IMAGES).note
    assert note is not None and NAME in note and "a path is recorded" in note
    assert "/home/me" not in note
    assert vision_tower_name(None, "openai/clip", TINY, {}).note is None
    assert vision_tower_name(None, NAME, LARGE_336, IMAGES).note is None
    assert vision_tower_name(NAME, "/home/me/clip", LARGE_336, IMAGES).note is None


@pytest.mark.parametrize("name", ["vinid/plip", "bases/sub/clip", "model/clip",
                                  "openclip/x", "openai_weights/clip", "openai/a/b"])  # fmt: skip
def test_a_name_that_llava_does_not_know_is_said(name: str) -> None:
    for given, recorded in ((name, None), (None, name)):
        found = vision_tower_name(given, recorded, TINY, {})
        assert found.name == name
        assert found.note is not None and "only where it exists as a path" in found.note
        assert "--vision-tower-name gives another" in found.note


def test_a_folder_here_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "laion/clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert vision_tower_name(None, "laion/clip", LARGE_336, IMAGES).name == NAME
    assert vision_tower_name(None, "laion/other", LARGE_336, IMAGES).name == "laion/other"


@pytest.mark.parametrize(
    ("tower", "images", "said"),
    [
        ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu' here and 'quick_gelu' there"),
        ({"layer_norm_eps": 1e-6}, {}, "layer_norm_eps is 1e-06 here"),
        ({"num_attention_heads": 8}, {}, "num_attention_heads is 8 here and 16 there"),
        ({}, {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is [0.5, 0.5, 0.5] here"),
        ({}, {"image_std": [0.5, 0.5, 0.5]}, "image_std is"),
        ({}, {"size": {"height": 336, "width": 336}}, "size is"),
        ({}, {"size": 224}, "size is {'shortest_edge': 224} here"),
        ({}, {"crop_size": 224}, "crop_size is"),
        ({}, {"resample": 2}, "resample is 2 here and 3 there"),
        ({}, {"do_center_crop": False}, "do_center_crop is False here and True there"),
        ({}, {"do_rescale": False}, "do_rescale is"),
        ({}, {"rescale_factor": 1 / 127.5}, "rescale_factor is"),
        ({}, {"do_normalize": False}, "do_normalize is"),
    ],
)
def test_one_value_that_differs_is_asked_about(
    tower: dict[str, Any], images: dict[str, Any], said: str
) -> None:
    """LLaVA takes all of them from the name, and would compute other features in silence."""
    other, prepared = {**LARGE_336, **tower}, {**IMAGES, **images}
    assert well_known(LARGE_336, IMAGES) == NAME
    assert well_known(other, prepared) is None
    for given, recorded in ((None, "/data/clip"), (None, NAME), (NAME, None), (None, None)):
        with pytest.raises(UsageError) as error:
            vision_tower_name(given, recorded, other, prepared)
        assert said in str(error.value)
        assert "--vision-tower-name" in str(error.value)
        assert "--format hf" in str(error.value)
    note = vision_tower_name(None, "model/clip", other, prepared).note
    assert note is not None and said in note


def test_values_that_only_look_different_agree() -> None:
    full = {**LARGE_336, "hidden_act": "quick_gelu", "layer_norm_eps": 0.00001, "dropout": 0.0}
    images = {
        "crop_size": {"height": 336, "width": 336},
        "size": {"shortest_edge": 336, "longest_edge": None},
        "image_mean": [0.48145467042922974, 0.45782750844955444, 0.40821072459220886],
        "rescale_factor": 0.00392156862745098,
        "do_convert_rgb": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    assert well_known(full, images) == NAME


def test_a_shape_that_is_almost_known_is_not() -> None:
    assert well_known({**LARGE_336, "patch_size": 16}, IMAGES) is None
    assert well_known({**LARGE_336, "image_size": "336"}, IMAGES) is None


def test_weights_that_are_not_written_need_a_name_that_says_which_they_are() -> None:
    with pytest.raises(UsageError, match="whether its weights are these is not known"):
        vision_tower_name(None, "/data/clip", LARGE_336, IMAGES, writes_tower=False)
    assert vision_tower_name(None, NAME, LARGE_336, IMAGES, writes_tower=False).name == NAME


# The projector


def projector(depth: int, vision: int = 3, llm: int = 4) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(depth):
        shapes[f"model.{2 * layer}.weight"] = (llm, llm if layer else vision)
        shapes[f"model.{2 * layer}.bias"] = (llm,)
    return shapes


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_any_depth_is_right(depth: int) -> None:
    assert depth_of(projector(depth)) == depth
    assert projector_faults(projector(depth), 3, 4, "x") == []


def test_a_projector_of_other_sizes() -> None:
    (fault,) = projector_faults(projector(2), 5, 4, "iter_2.pth")
    assert fault.where == "iter_2.pth, projector.model.0.weight"
    assert fault.what.startswith("has shape [4, 3], expected [4, 5]")


def test_a_projector_with_something_else_in_it() -> None:
    shapes = {**projector(2), "model.1.weight": (4,), "norm.weight": (4,)}
    wheres = {fault.where for fault in projector_faults(shapes, 3, 4, "x")}
    assert wheres == {"x, projector.model.1.weight", "x, projector.norm.weight"}


def test_a_projector_with_a_hole() -> None:
    shapes = {n: s for n, s in projector(3).items() if not n.startswith("model.2.")}
    faults = projector_faults(shapes, 3, 4, "x")
    assert [(f.where, f.what) for f in faults] == [
        ("x, projector.model.2.weight", "is missing"),
        ("x, projector.model.2.bias", "is missing"),
    ]


def test_a_projector_without_bias_is_one_fault() -> None:
    shapes = {n: s for n, s in projector(2).items() if not n.endswith("bias")}
    (fault,) = projector_faults(shapes, 3, 4, "x")
    assert fault.what == "a projector without bias"
