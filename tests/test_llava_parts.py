"""The small parts of an official-LLaVA folder: the tower's name, the projector, token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import UsageError
from xtuner2llava.llava.config import json_bytes, output_config
from xtuner2llava.llava.generation import TokenIds, TokenTexts, generation_config, token_ids
from xtuner2llava.llava.projector import check_projector, depth_of
from xtuner2llava.llava.vision_tower_name import vision_tower_name, well_known
from xtuner2llava.tokenizers import Tokenizer

LARGE_336 = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336}
TINY = {"hidden_size": 48, "num_hidden_layers": 4, "patch_size": 14, "image_size": 56}


# The tower's name


@pytest.mark.parametrize(
    ("given", "recorded", "tower", "expected"),
    [
        ("me/my-clip", "openai/clip-vit-large-patch14", TINY, "me/my-clip"),
        ("/mnt/clip", None, TINY, "/mnt/clip"),  # the user's word is taken as it is
        (None, "openai/clip-vit-large-patch14-336", TINY, "openai/clip-vit-large-patch14-336"),
        (None, "/home/me/clip", LARGE_336, "openai/clip-vit-large-patch14-336"),
        (None, "C:\\clip", {**LARGE_336, "image_size": 224}, "openai/clip-vit-large-patch14"),
        (None, None, LARGE_336, "openai/clip-vit-large-patch14-336"),
        (None, "bases/sub/clip", TINY, "bases/sub/clip"),
    ],
)
def test_the_name_that_is_written(
    given: str | None, recorded: str | None, tower: dict[str, Any], expected: str
) -> None:
    assert vision_tower_name(given, recorded, tower).name == expected


@pytest.mark.parametrize("recorded", ["/home/me/clip", "~/clip", "C:\\models\\clip", None])
def test_a_path_of_this_machine_is_never_published(recorded: str | None) -> None:
    with pytest.raises(UsageError) as error:
        vision_tower_name(None, recorded, TINY)
    assert "Give --vision-tower-name ID" in str(error.value)
    assert recorded is None or recorded not in str(error.value)


def test_what_was_put_in_its_place_is_said() -> None:
    note = vision_tower_name(None, "/home/me/clip", LARGE_336).note
    assert note is not None and "which has this tower's shape; a local path is recorded" in note
    assert "/home/me" not in note
    assert vision_tower_name(None, "openai/clip", TINY).note is None
    relative = vision_tower_name(None, "bases/sub/clip", TINY).note
    assert relative is not None and "only where that path exists" in relative


def test_a_folder_here_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bases/clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert vision_tower_name(None, "bases/clip", TINY).note is not None
    assert vision_tower_name(None, "bases/other", TINY).note is None


def test_a_shape_that_is_almost_known_is_not() -> None:
    assert well_known(LARGE_336) == "openai/clip-vit-large-patch14-336"
    assert well_known({**LARGE_336, "patch_size": 16}) is None
    assert well_known({**LARGE_336, "image_size": "336"}) is None
    assert well_known({}) is None


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
    assert check_projector(projector(depth), 3, 4, "x") == []


def test_a_projector_of_other_sizes() -> None:
    (fault,) = check_projector(projector(2), 5, 4, "iter_2.pth")
    assert fault.where == "iter_2.pth, projector.model.0.weight"
    assert fault.what.startswith("has shape [4, 3], expected [4, 5]")


def test_a_projector_with_something_else_in_it() -> None:
    shapes = {**projector(2), "model.1.weight": (4,), "norm.weight": (4,)}
    wheres = {fault.where for fault in check_projector(shapes, 3, 4, "x")}
    assert wheres == {"x, projector.model.1.weight", "x, projector.norm.weight"}


def test_a_projector_with_a_hole() -> None:
    shapes = {n: s for n, s in projector(3).items() if not n.startswith("model.2.")}
    faults = check_projector(shapes, 3, 4, "x")
    assert [(f.where, f.what) for f in faults] == [
        ("x, projector.model.2.weight", "is missing"),
        ("x, projector.model.2.bias", "is missing"),
    ]


def test_a_projector_without_bias_is_one_fault() -> None:
    shapes = {n: s for n, s in projector(2).items() if not n.endswith("bias")}
    (fault,) = check_projector(shapes, 3, 4, "x")
    assert fault.what == "a projector without bias"


# Token ids

IDS = {"<s>": 1, "</s>": 2, "<|end|>": 7, "<|im_end|>": 8}


def ids(
    named: TokenTexts | None = None,
    stop_words: tuple[str, ...] = (),
    generation: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> TokenIds:
    tokenizer = Tokenizer(Path(), (), {}, IDS, {})
    return token_ids(tokenizer, named or TokenTexts(), stop_words, generation or {}, config or {})


def test_the_family_s_tokens_come_first() -> None:
    named = TokenTexts("<s>", ("<|im_end|>", "</s>"), "</s>")
    assert ids(named, (), {"bos_token_id": 9, "eos_token_id": 9}) == TokenIds(1, (8, 2), 2)


def test_tokens_that_the_tokenizer_lacks_do_not_count() -> None:
    named = TokenTexts("<bos>", ("<eos>",), "<pad>")
    base = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}
    assert ids(named, (), base) == TokenIds(1, (2, 7), 0)


def test_generation_config_counts_before_config() -> None:
    assert ids(generation={"eos_token_id": 7}, config={"eos_token_id": 2, "bos_token_id": 1}) == (
        TokenIds(1, (7,), None)
    )


def test_stop_words_stand_before_the_base_s_eos() -> None:
    assert ids(stop_words=("<|end|>", "no token"), generation={"eos_token_id": 2}).eos == (7, 2)
    assert ids(stop_words=("<|end|>",), generation={"eos_token_id": [2, 7]}).eos == (7, 2)


@pytest.mark.parametrize("strange", [True, "2", 2.0, None, [], ["x"], {"a": 1}])
def test_what_is_no_id_is_none(strange: Any) -> None:
    assert ids(config={"eos_token_id": strange, "bos_token_id": strange}) == TokenIds(
        None, (), None
    )


def test_generation_settings_are_the_base_s() -> None:
    base = {
        "_from_model_config": True,
        "transformers_version": "4.41.2",
        "top_p": 0.8,
        "eos_token_id": 5,
    }
    assert generation_config(base, TokenIds(1, (8, 2), None)) == {
        "bos_token_id": 1,
        "eos_token_id": [8, 2],
        "top_p": 0.8,
    }
    assert generation_config({}, TokenIds(None, (2,), 0)) == {"eos_token_id": 2, "pad_token_id": 0}


# config.json


def test_the_config_has_one_eos_id_and_the_vocabulary_of_4_37() -> None:
    made = output_config(
        {"hidden_size": 4, "rope_theta": 1e4},
        {"mm_hidden_size": 3},
        architecture="LlavaQwenForCausalLM",
        model_type="llava_qwen",
        dtype="bfloat16",
        ids=TokenIds(1, (8, 2), None),
    )
    assert made == {
        "architectures": ["LlavaQwenForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 8,
        "hidden_size": 4,
        "mm_hidden_size": 3,
        "model_type": "llava_qwen",
        "rope_theta": 1e4,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
    }
    assert list(made) == sorted(made)
    assert json_bytes({"b": "é", "a": None}) == b'{\n  "a": null,\n  "b": "\xc3\xa9"\n}\n'
