"""Folder names under which both loaders choose the right class.

`llava` and `next_` are the dispatch of haotian-liu/LLaVA and of LLaVA-VL/LLaVA-NeXT
(`llava/model/builder.py` of each), written down here by their order.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.format import FolderName, model_name

CLASSES = Catalogue.shipped().formats["llava"].classes
WORDS = ("llava", "llama", "qwen", "quyen", "mistral", "mixtral", "zephyr", "mpt", "moe", "gemma")
WORDS += ("yi", "nous-hermes", "v1.5", "v1.6-34b", "xtuner", "7b")


def llava(name: str) -> str:
    name = name.lower()
    if "llava" not in name:
        return "no multimodal model"
    if "mpt" in name:
        return "LlavaMptForCausalLM"
    return "LlavaMistralForCausalLM" if "mistral" in name else "LlavaLlamaForCausalLM"


def next_(name: str) -> str:
    name = name.lower()

    def has(*words: str) -> bool:
        return any(word in name for word in words)

    if not has("llava"):
        return "no multimodal model"
    if has("mixtral"):
        return "LlavaMixtralForCausalLM"
    if has("mistral", "zephyr"):
        return "LlavaMistralForCausalLM"
    if has("llama", "yi", "nous-hermes", "llava-v1.6-34b", "llava-v1.5"):
        return "LlavaLlamaForCausalLM"
    if has("qwen", "quyen"):
        return "LlavaQwenMoeForCausalLM" if has("moe") else "LlavaQwenForCausalLM"
    if has("gemma"):
        return "LlavaGemmaForCausalLM"
    return "LlavaLlamaForCausalLM"


NAMES = ["-".join(parts) for n in (1, 2, 3) for parts in itertools.permutations(WORDS, n)]


@pytest.mark.parametrize("becomes", CLASSES)
def test_a_name_that_fits_is_loaded_right(becomes: str) -> None:
    described = CLASSES[becomes]
    fitting = [name for name in NAMES if not described.folder_name.reasons(name)]
    assert len(fitting) > 30
    assert {next_(name) for name in fitting} == {described.architecture}
    if becomes in ("llama", "mistral"):  # LLaVA has no other classes
        assert {llava(name) for name in fitting} == {described.architecture}


@pytest.mark.parametrize("becomes", CLASSES)
def test_few_names_that_would_work_are_called_wrong(becomes: str) -> None:
    described = CLASSES[becomes]
    loaders = (llava, next_) if becomes in ("llama", "mistral") else (next_,)
    right = [name for name in NAMES if {load(name) for load in loaders} == {described.architecture}]
    refused = [name for name in right if described.folder_name.reasons(name)]
    # Such as "llama-qwen-llava", which is loaded as a Llama although it says Qwen.
    assert len(refused) < len(right) / 2
    plain = f"llava-{becomes}-7b-xtuner".replace("qwen2", "qwen2.5")
    assert described.folder_name.reasons(plain) == ""


def test_what_is_wrong_with_a_name() -> None:
    name = CLASSES["qwen2"].folder_name
    assert name.reasons("my-model") == "lacks 'llava' and lacks 'qwen'"
    assert name.reasons("LLaVA-Llama-Qwen") == "contains 'llama'"
    assert name.reasons("LLaVA-Qwen2.5-7B") == ""


def test_a_checkpoint_is_called_after_the_folder_above() -> None:
    assert model_name(Path("runs/llava-qwen/checkpoint-5")) == "llava-qwen_checkpoint-5"
    assert model_name(Path("runs/llava-qwen/checkpoints")) == "checkpoints"
    assert model_name(Path("llava-qwen")) == "llava-qwen"
    assert model_name(Path("checkpoint-5")) == f"{Path.cwd().name}_checkpoint-5"
    name = model_name(Path("llava-qwen/checkpoint-5"))
    assert CLASSES["qwen2"].folder_name.reasons(name) == ""


def test_the_suggestion_is_one_that_works() -> None:
    name = FolderName(needs=("llava", "qwen"), avoid=("yi",))
    assert name.suggest("llava-qwen-7b") == "llava-qwen-7b"
    for wrong in ("llava-x", "llava-yi-qwen", "nothing", ""):
        assert name.suggest(wrong) == "llava-qwen"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/cache/models--ann--llava-qwen/snapshots/0123abc", "llava-qwen"),
        ("/cache/models--llava/snapshots/0123abc", "llava"),
        ("/cache/ann--llava-qwen/snapshots/0123abc", "0123abc"),
    ],
)
def test_a_snapshot_in_the_cache_is_called_as_its_repository(path: str, name: str) -> None:
    assert model_name(Path(path)) == name
