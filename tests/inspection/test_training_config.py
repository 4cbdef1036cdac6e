"""`inspect my_config.py`: verdict and advice before a training, for configs like XTuner's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders.training_config import write_training_config
from command import run
from xtuner2llava import ConversionError, Inspection, inspect


@pytest.fixture
def foresee(checkpoints: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(llm: str = "llm_qwen2", vision: str = "vision_clip", **parts: Any) -> Inspection:
        bases = checkpoints / "bases"
        path = tmp_path / "my_config.py"
        write_training_config(path, bases / llm, bases / vision, **parts)
        return inspect(path, vision_tower_name="openai/clip")

    return make


def llava(outlook: Inspection):  # type: ignore[no-untyped-def]
    (found,) = [p for p in outlook.targets if p.format == "llava"]
    return found


WITH_BOS = "tokenizer=dict(**tokenizer, bos_token='<|endoftext|>')"


def test_qwen_with_everything_set_needs_only_the_bos_token_for_evaluation(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee()
    assert outlook.is_possible
    assert llava(outlook).architecture == "LlavaQwenForCausalLM"
    assert outlook.lines == (f"{WITH_BOS},  # in EvaluateChatHook",)
    assert any("no bos token" in sentence for sentence in outlook.advice)


def test_qwen_with_the_bos_token_for_evaluation_needs_nothing(foresee) -> None:  # type: ignore[no-untyped-def]
    assert foresee(hook_tokenizer=WITH_BOS).lines == ()


def test_the_bos_id_of_generation_kwargs_is_none(foresee) -> None:  # type: ignore[no-untyped-def]
    """EvaluateChatHook gives `generate` that of its tokenizer besides, which counts."""
    hook = ", prompt_template=prompt_template, generation_kwargs=dict(bos_token_id=361)"
    assert foresee(hook=hook).lines == foresee().lines != ()


def test_an_evaluation_hook_without_stop_words_is_told_which(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(hook="", hook_tokenizer=WITH_BOS)
    assert outlook.lines == ("stop_words=['<|im_end|>', '<|endoftext|>'],  # in EvaluateChatHook",)


def test_stop_words_given_by_hand_count(foresee) -> None:  # type: ignore[no-untyped-def]
    hook = ", stop_words=['<|im_end|>', '<|endoftext|>']"
    assert foresee(hook=hook, hook_tokenizer=WITH_BOS).lines == ()


def test_a_missing_prompt_template_is_named(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(prompt_template=None)
    assert "prompt_template = PROMPT_TEMPLATE.qwen_chat" in outlook.lines


def test_the_bos_workaround_is_recognised(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(tokenizer=", bos_token='<|im_start|>', eos_token='<|im_end|>'")
    assert any("'<|im_start|>'; it is written without" in s for s in llava(outlook).caveats)


def test_llama_has_its_bos(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(llm="llm_llama", prompt_template="vicuna")
    assert llava(outlook).architecture == "LlavaLlamaForCausalLM"
    assert outlook.lines == ()
    assert not any("no bos token" in sentence for sentence in outlook.advice)


def test_scaled_rope_is_fine_for_llama_and_not_for_qwen_in_llava(foresee) -> None:  # type: ignore[no-untyped-def]
    longer = ", max_position_embeddings=1024"
    assert not llava(foresee(llm="llm_llama", model=longer)).faults
    outlook = foresee(model=longer)
    assert "rope_scaling" in str(llava(outlook).faults[0])


def test_a_siglip_tower_is_refused_with_the_reason(foresee, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    siglip = tmp_path / "siglip"
    siglip.mkdir()
    (siglip / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    outlook = foresee(vision=str(siglip), tower_class="SiglipVisionModel")
    assert not outlook.is_possible
    assert {target.fidelity.kind for target in outlook.targets} == {"not_possible"}
    assert "first patch" in str(outlook.targets[0].faults[0])


def test_a_text_only_training_is_told(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(model_class="SupervisedFinetune")
    assert not outlook.is_possible
    assert "SupervisedFinetune" in str(outlook.targets[0].faults[0])


def test_a_base_that_is_not_there_is_named_with_the_flag(
    foresee,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outlook = foresee(llm="/nowhere/at/all")
    assert not outlook.is_possible
    assert "Hub repo id with llm" in str(outlook.targets[0].faults[0])


def test_something_that_is_no_config_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("print('hello')")
    with pytest.raises(ConversionError, match="model"):
        inspect(path, vision_tower_name="openai/clip")


def test_nothing_in_a_config_is_run(foresee, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    canary = tmp_path / "canary"
    assert foresee(more=f"__import__('pathlib').Path({str(canary)!r}).touch()").is_possible
    assert not canary.exists()


def test_the_command_line_exits_with_the_verdict(checkpoints: Path) -> None:
    done = run("inspect", "qwen2_a_pretrain/config.py", "--json", cwd=checkpoints)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "qwen2"
    words = ["inspect", "qwen2_a_pretrain/config.py", "--mapping", "phi3"]
    done = run(*words, "--json", cwd=checkpoints)
    assert done.returncode == 1, done.stdout
    verdicts = [target["verdict"] for target in json.loads(done.stdout)["targets"]]
    assert verdicts == ["not_possible", "not_possible"]


def test_what_cannot_be_read_of_the_config_is_said_once(foresee: Any, tmp_path: Path) -> None:
    foresee()
    path = tmp_path / "my_config.py"
    path.write_text(path.read_text() + "\ntrain_dataloader['dataset']['max_length'] = f()\n")
    found = inspect(path, vision_tower_name="openai/clip")
    said = [*found.notes, *found.advice, *(c for one in found.targets for c in one.caveats)]
    assert sum("train_dataloader is not known without running code" in note for note in said) == 1
