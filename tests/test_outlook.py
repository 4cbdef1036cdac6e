"""`inspect my_config.py`: verdict and advice before a training, for configs like XTuner's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner2llava import ConversionError, Outlook, foresee_training

# Written like the LLaVA configs of XTuner's repository, shortened to what matters here.
CONFIG = """\
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, {tower_class}
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.model import LLaVAModel, SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

llm_name_or_path = {llm!r}
visual_encoder_name_or_path = {vision!r}
{template_line}
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=llm_name_or_path,
    padding_side='right'{tokenizer})
model = dict(
    type={model_class},
    freeze_llm=True,
    freeze_visual_encoder=True,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_name_or_path),
    visual_encoder=dict(
        type={tower_class}.from_pretrained,
        pretrained_model_name_or_path=visual_encoder_name_or_path){model})
llava_dataset = dict(
    type=LLaVADataset,
    tokenizer=tokenizer,
    dataset_map_fn=llava_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template={template}),
    pad_image_to_square=True)
train_dataloader = dict(dataset=llava_dataset)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        evaluation_inputs=['What is this?']{hook})]
"""
QWEN = "PROMPT_TEMPLATE.qwen_chat"


@pytest.fixture
def foresee(checkpoints: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(
        llm: str = "llm_qwen2",
        vision: str = "vision_clip",
        template: str = "prompt_template",
        template_line: str = f"prompt_template = {QWEN}",
        tokenizer: str = "",
        model: str = "",
        hook: str = ", prompt_template=prompt_template",
        model_class: str = "LLaVAModel",
        tower_class: str = "CLIPVisionModel",
    ) -> Outlook:
        path = tmp_path / "my_config.py"
        folders = {
            key: name if "/" in name else str(checkpoints / "bases" / name)
            for key, name in (("llm", llm), ("vision", vision))
        }
        path.write_text(
            CONFIG.format(
                **folders,
                template=template,
                template_line=template_line,
                tokenizer=tokenizer,
                model=model,
                hook=hook,
                model_class=model_class,
                tower_class=tower_class,
            )
        )
        return foresee_training(path)

    return make


def llava(outlook: Outlook):  # type: ignore[no-untyped-def]
    (found,) = [p for p in outlook.prospects if p.format == "llava"]
    return found


def test_qwen_with_everything_set_needs_only_the_bos_id_for_evaluation(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee()
    assert outlook.is_good
    assert llava(outlook).architecture == "LlavaQwenForCausalLM"
    assert outlook.lines == ("generation_kwargs=dict(bos_token_id=361),  # in EvaluateChatHook",)
    assert any("no bos token" in sentence for sentence in outlook.advice)


def test_qwen_with_the_bos_id_needs_nothing(foresee) -> None:  # type: ignore[no-untyped-def]
    hook = ", prompt_template=prompt_template, generation_kwargs=dict(bos_token_id=361)"
    assert foresee(hook=hook).lines == ()


def test_an_evaluation_hook_without_stop_words_is_told_which(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(hook=", generation_kwargs=dict(bos_token_id=361)")
    assert outlook.lines == ("stop_words=['<|im_end|>', '<|endoftext|>'],  # in EvaluateChatHook",)


def test_stop_words_given_by_hand_count(foresee) -> None:  # type: ignore[no-untyped-def]
    hook = ", generation_kwargs=dict(bos_token_id=361), stop_words=['<|im_end|>', '<|endoftext|>']"
    assert foresee(hook=hook).lines == ()


def test_a_missing_prompt_template_is_named(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(template="None", template_line="", hook="")
    assert "prompt_template = PROMPT_TEMPLATE.qwen_chat" in outlook.lines


def test_the_bos_workaround_is_recognised(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(tokenizer=", bos_token='<|im_start|>', eos_token='<|im_end|>'")
    assert any("'<|im_start|>'" in s and "without it" in s for s in outlook.advice)


def test_llama_has_its_bos(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(llm="llm_llama", template_line="prompt_template = PROMPT_TEMPLATE.vicuna")
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
    assert not outlook.is_good
    assert "first patch" in str(outlook.faults[0])


def test_a_text_only_training_is_told(foresee) -> None:  # type: ignore[no-untyped-def]
    outlook = foresee(model_class="SupervisedFinetune")
    assert not outlook.is_good
    assert "SupervisedFinetune" in str(outlook.faults[0])


def test_a_base_that_is_not_there_is_named_with_the_flag(
    foresee,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outlook = foresee(llm="/nowhere/at/all")
    assert not outlook.is_good
    assert "--llm" in str(outlook.faults[0])


def test_something_that_is_no_config_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("print('hello')")
    with pytest.raises(ConversionError, match="model"):
        foresee_training(path)


def test_nothing_in_a_config_is_run(foresee, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    canary = tmp_path / "canary"
    line = f"prompt_template = {QWEN}\n__import__('pathlib').Path({str(canary)!r}).touch()"
    assert foresee(template_line=line).is_good
    assert not canary.exists()


def test_the_command_line_exits_with_the_verdict(checkpoints: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xtuner2llava", "inspect", "qwen2_a_pretrain/config.py", "--json"],
        cwd=checkpoints,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "qwen2"
