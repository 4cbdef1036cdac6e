"""How the output is loaded, by each program that can."""

from __future__ import annotations

from xtuner2llava.options.programs import PROGRAMS
from xtuner2llava.planning.chat_template import prompt_text
from xtuner2llava.planning.plan import Plan

_QUESTION = "What is in this picture?"
_LONGEST_PROMPT = 2000
_LLAVA = "[LLaVA](https://github.com/haotian-liu/LLaVA)"
_NEXT = "[LLaVA-NeXT](https://github.com/LLaVA-VL/LLaVA-NeXT)"
_OFFICIAL = """\
With {programs}:

```python
import torch
from PIL import Image
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

folder = "{name}"  # or the repository's id
tokenizer, model, image_processor, _ = load_pretrained_model(
    folder, None, "{name}"{attention}
)
image = Image.open("picture.jpg").convert("RGB")
images = process_images([image], image_processor, model.config)
prompt = {prompt!r}
ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
answer = model.generate(
    ids.unsqueeze(0).to(model.device),
    images=images.to(model.device, torch.float16),
    image_sizes=[image.size],
    do_sample=False,
    max_new_tokens=256,
)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```

The third argument decides the class that is loaded{needs}{avoids}.
The tower's config and image processor come from `mm_vision_tower`, `{tower}`{weights}
"""
_SGLANG = """\
With [SGLang](https://github.com/sgl-project/sglang):

```console
$ python -m sglang.launch_server --model-path {name}
```

Send it the prompt below as text; its chat endpoint needs a `--chat-template` like it.
"""
_TRANSFORMERS = """\
With [transformers](https://github.com/huggingface/transformers):

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "{name}"  # or the repository's id
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")
image = Image.open("picture.jpg").convert("RGB")
{prompt}
inputs = processor(images=image, text=prompt, return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)
answer = model.generate(**inputs, do_sample=False, max_new_tokens=256)
new = answer[0, inputs["input_ids"].shape[1] :]
print(processor.decode(new, skip_special_tokens=True))
```

The processor adds no bos token: the chat template has it, as each turn of the training had. \
Write it at the start of a prompt of your own, where this model has one.
"""
_CHAT = f"""\
question = [{{"type": "image"}}, {{"type": "text", "text": {_QUESTION!r}}}]
conversation = [{{"role": "user", "content": question}}]
prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)"""


def example_prompt(plan: Plan) -> str | None:
    """A prompt with an image and a question, as in training; None where that is not known."""
    template = plan.chat.prompt
    text = prompt_text(template, _QUESTION) if template is not None else None
    return text if text is not None and len(text) <= _LONGEST_PROMPT else None


def usage(plan: Plan) -> str:
    """Markdown."""
    prompt = example_prompt(plan) or f"<image>\n{_QUESTION}"
    if plan.mapping.format == "hf":
        return _transformers(plan, prompt)
    return f"{_official(plan, prompt)}{_sglang(plan)}"


def _official(plan: Plan, prompt: str) -> str:
    is_next = not PROGRAMS["llava"].takes(plan.mapping.target_class)
    needs = " and ".join(f"`{word}`" for word in plan.folder_name.needs)
    avoids = ", ".join(f"`{word}`" for word in plan.folder_name.avoid)
    return _OFFICIAL.format(
        programs=_NEXT if is_next else f"{_LLAVA} or {_NEXT}",
        name=plan.suggested_name,
        attention=', attn_implementation="sdpa"' if is_next else "",
        prompt=prompt,
        needs=f": it must contain {needs}" if needs else "",
        avoids=f", and none of {avoids}" if avoids else "",
        tower=plan.config.get("mm_vision_tower"),
        weights="; its weights from here." if plan.config.get("unfreeze_mm_vision_tower") else ".",
    )


def _sglang(plan: Plan) -> str:
    tower = str(plan.config.get("mm_vision_tower")).lower()
    fits = (
        PROGRAMS["sglang"].takes(plan.mapping.target_class)
        and plan.config.get("mm_projector_type") == "mlp2x_gelu"
        and ("clip" in tower or "siglip" in tower)
    )
    if not fits:
        return ""
    if plan.config.get("model_type") != "llava":
        return "\nSGLang does not load it: it looks for `model_type: llava` in config.json.\n"
    return f"\n{_SGLANG.format(name=plan.suggested_name)}"


def _transformers(plan: Plan, prompt: str) -> str:
    line = _CHAT if plan.chat.prompt is not None else f"prompt = {prompt!r}"
    text = _TRANSFORMERS.format(name=plan.suggested_name, prompt=line)
    if plan.mapping.family in PROGRAMS["vllm"].seen:
        text += "\nvLLM answers as transformers does, in its chat too.\n"
    return text
