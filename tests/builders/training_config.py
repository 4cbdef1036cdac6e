"""Training configs with the parts that XTuner's own LLaVA configs have."""

from __future__ import annotations

from pathlib import Path

_TEXT = """\
from peft import LoraConfig
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig,
                          CLIPImageProcessor, {tower_class})
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.model import LLaVAModel, SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

llm_name_or_path = {llm!r}
visual_encoder_name_or_path = {vision!r}
{template_line}
max_length = int(2048 - (336 / 14)**2)
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=llm_name_or_path,
    trust_remote_code=True,
    padding_side='right'{tokenizer})
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained,
    pretrained_model_name_or_path=visual_encoder_name_or_path,
    trust_remote_code=True)
model = dict(
    type={model_class},
    freeze_llm=True,
    freeze_visual_encoder=True,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_name_or_path,
        trust_remote_code=True{llm_arguments}),
    visual_encoder=dict(
        type={tower_class}.from_pretrained,
        pretrained_model_name_or_path=visual_encoder_name_or_path){model})
llava_dataset = dict(
    type=LLaVADataset,
    tokenizer=tokenizer,
    image_processor=image_processor,
    dataset_map_fn=llava_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template={template}),
    max_length=max_length,
    pad_image_to_square={pad})
train_dataloader = dict(dataset=llava_dataset)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        {hook_tokenizer},
        image_processor=image_processor,
        evaluation_inputs=['What is this?'],
        evaluation_images='a.jpg',
        system=''{hook})]
"""


def write_training_config(
    path: Path,
    llm: Path,
    vision: Path,
    *,
    prompt_template: str | None = "qwen_chat",
    tokenizer: str = "",
    model: str = "",
    llm_arguments: str = "",
    hook_tokenizer: str = "tokenizer=tokenizer",
    hook: str = ", prompt_template=prompt_template",
    model_class: str = "LLaVAModel",
    tower_class: str = "CLIPVisionModel",
    more: str = "",
    pad: bool = True,
) -> Path:
    """A config at `path`. Texts such as `tokenizer` are further arguments; `more` is more lines."""
    line = "" if prompt_template is None else f"prompt_template = PROMPT_TEMPLATE.{prompt_template}"
    path.write_text(
        _TEXT.format(
            llm=str(llm),
            vision=str(vision),
            template_line=f"{line}\n{more}",
            template="None" if prompt_template is None else "prompt_template",
            tokenizer=tokenizer,
            model=model,
            llm_arguments=llm_arguments,
            hook_tokenizer=hook_tokenizer,
            hook="" if prompt_template is None and "prompt_template" in hook else hook,
            model_class=model_class,
            tower_class=tower_class,
            pad=pad,
        )
    )
    return path
