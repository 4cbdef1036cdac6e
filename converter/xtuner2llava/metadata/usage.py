"""How the output is loaded, by each program that can."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner2llava.metadata.prompt import QUESTION, Prompt
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.programs import PROGRAMS

_LLAVA = "[LLaVA](https://github.com/haotian-liu/LLaVA)"
_NEXT = "[LLaVA-NeXT](https://github.com/LLaVA-VL/LLaVA-NeXT)"


def usage(plan: Plan, prompt: Prompt | None) -> Iterator[str]:
    """Lines of Markdown."""
    text = prompt.text if prompt is not None else f"<image>\n{QUESTION}"
    if plan.mapping.format == "hf":
        yield from _transformers(plan, text)
    else:
        yield from _official(plan, text)
        yield from _sglang(plan)


def _official(plan: Plan, text: str) -> Iterator[str]:
    name = plan.suggested_name
    is_next = not PROGRAMS["llava"].takes(plan.mapping.target_class)
    yield f"With {_NEXT if is_next else f'{_LLAVA} or {_NEXT}'}:"
    yield from ("", "```python", "import torch", "from PIL import Image")
    yield "from llava.constants import IMAGE_TOKEN_INDEX"
    yield "from llava.mm_utils import process_images, tokenizer_image_token"
    yield "from llava.model.builder import load_pretrained_model"
    yield ""
    yield f'folder = "{name}"  # or the repository\'s id'
    extra = ', attn_implementation="sdpa"' if is_next else ""
    yield "tokenizer, model, image_processor, _ = load_pretrained_model("
    yield f'    folder, None, "{name}"{extra}'
    yield ")"
    yield 'image = Image.open("picture.jpg").convert("RGB")'
    yield "images = process_images([image], image_processor, model.config)"
    yield f"prompt = {text!r}"
    yield ('ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")')
    yield "answer = model.generate("
    yield "    ids.unsqueeze(0).to(model.device),"
    yield "    images=images.to(model.device, torch.float16),"
    yield "    image_sizes=[image.size],"
    yield "    do_sample=False,"
    yield "    max_new_tokens=256,"
    yield ")"
    yield "print(tokenizer.decode(answer[0], skip_special_tokens=True))"
    yield from ("```", "")
    yield _name_rule(plan)
    tower = plan.config.get("mm_vision_tower")
    yield (
        f"The tower's config and image processor come from `mm_vision_tower`, `{tower}`"
        + ("; its weights from here." if plan.config.get("unfreeze_mm_vision_tower") else ".")
    )
    yield ""


def _name_rule(plan: Plan) -> str:
    needs = " and ".join(f"`{word}`" for word in plan.folder_name.needs)
    avoid = ", ".join(f"`{word}`" for word in plan.folder_name.avoid)
    return (
        "The third argument decides the class that is loaded"
        + (f": it must contain {needs}" if needs else "")
        + (f", and none of {avoid}" if avoid else "")
        + "."
    )


def _sglang(plan: Plan) -> Iterator[str]:
    tower = str(plan.config.get("mm_vision_tower")).lower()
    fits = (
        PROGRAMS["sglang"].takes(plan.mapping.target_class)
        and plan.config.get("mm_projector_type") == "mlp2x_gelu"
        and ("clip" in tower or "siglip" in tower)
    )
    if not fits:
        return
    if plan.config.get("model_type") != "llava":
        yield "SGLang needs the same converted with `--model-type llava`."
        yield ""
        return
    yield from ("With [SGLang](https://github.com/sgl-project/sglang):", "", "```console")
    yield f"$ python -m sglang.launch_server --model-path {plan.suggested_name}"
    yield from ("```", "")
    yield "Send it the prompt below as text; its chat endpoint needs a `--chat-template` like it."
    yield ""


def _transformers(plan: Plan, text: str) -> Iterator[str]:
    yield "With [transformers](https://github.com/huggingface/transformers):"
    yield from ("", "```python", "from PIL import Image")
    yield "from transformers import AutoProcessor, LlavaForConditionalGeneration"
    yield ""
    yield f'folder = "{plan.suggested_name}"  # or the repository\'s id'
    yield "processor = AutoProcessor.from_pretrained(folder)"
    yield 'model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")'
    yield 'image = Image.open("picture.jpg").convert("RGB")'
    if plan.chat.prompt is not None:
        yield f'question = [{{"type": "image"}}, {{"type": "text", "text": {QUESTION!r}}}]'
        yield 'conversation = [{"role": "user", "content": question}]'
        yield "prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)"
    else:
        yield f"prompt = {text!r}"
    yield 'inputs = processor(images=image, text=prompt, return_tensors="pt")'
    yield "inputs = inputs.to(model.device, model.dtype)"
    yield "answer = model.generate(**inputs, do_sample=False, max_new_tokens=256)"
    yield 'new = answer[0, inputs["input_ids"].shape[1] :]'
    yield "print(processor.decode(new, skip_special_tokens=True))"
    yield from ("```", "")
    yield (
        "The processor adds no bos token: the chat template has it, as each turn of the training "
        "had. Write it at the start of a prompt of your own, where this model has one."
    )
    yield ""
    if plan.mapping.family in PROGRAMS["vllm"].seen:
        yield "vLLM answers as transformers does, in its chat too."
        yield ""
