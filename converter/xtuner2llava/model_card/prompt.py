"""How the model was spoken to in training, as text that can be sent to it."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner2llava.planning.plan import Plan
from xtuner2llava.recipe import Table

QUESTION = "What is in this picture?"
_LONGEST = 2000

_CHATML = "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
# INSTRUCTION of XTuner's templates, by name (InternLM/xtuner xtuner/utils/templates.py). A turn is
# that; the system text before it is left out, as llava_map_fn.py gives none.
_INSTRUCTIONS = {
    "baichuan2_chat": "<reserved_106>{input}<reserved_107>",
    "baichuan_chat": "<reserved_102>{input}<reserved_103>",
    "code_llama_chat": "[INST] {input} [/INST]",
    "cohere_chat": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{input}<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "deepseek_coder": "### Instruction:\n{input}\n### Response:\n",
    "deepseek_moe": "[INST] {input} [/INST]",
    "deepseek_v2": "User: {input}\n\nAssistant: ",
    "deepseekcoder": "### Instruction:\n{input}\n### Response:\n",
    "default": "<|User|>:{input}\n<|Bot|>:",
    "gemma": "<start_of_turn>user\n{input}<end_of_turn>\n<start_of_turn>model\n",
    "internlm2_chat": _CHATML,
    "internlm_chat": "<|User|>:{input}<eoh>\n<|Bot|>:",
    "llama2_chat": "[INST] {input} [/INST]",
    "llama3_chat": "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "minicpm3": _CHATML,
    "mistral": "[INST] {input} [/INST]",
    "mixtral": "[INST] {input} [/INST]",
    "moss_sft": "<|Human|>: {input}<eoh>\n",
    "phi3_chat": "<|user|>\n{input}<|end|>\n<|assistant|>\n",
    "qwen_chat": _CHATML,
    "vicuna": "USER: {input} ASSISTANT:",
    "wizardcoder": "### Instruction:\n{input}\n\n### Response:",
    "wizardlm": "USER: {input} ASSISTANT:",
    "zephyr": "<|user|>\n{input}\n<|assistant|>\n",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with an image and `QUESTION`; `template` is XTuner's name for it, if it has one."""

    template: str | None
    text: str


def prompt_of(plan: Plan) -> Prompt | None:
    """The prompt that the training used, else the one that the LLM's family is known for.

    The image comes first and a line feed after it, as `llava_map_fn` puts it
    (InternLM/xtuner xtuner/dataset/map_fns/dataset_map_fns/llava_map_fn.py). None where the
    template is not known.
    """
    recipe = plan.checkpoint.recipe
    template = recipe.prompt_template if recipe is not None else None
    if isinstance(template, Table):
        instruction = template.get("INSTRUCTION")
        name = None
    else:
        name = template or plan.chat.template
        instruction = _INSTRUCTIONS.get(name or "")
    if not isinstance(instruction, str) or not 0 < len(instruction) <= _LONGEST:
        return None
    if instruction.count("{input}") != 1:
        return None
    text = instruction.replace("{round}", "1").replace("{input}", f"<image>\n{QUESTION}")
    return Prompt(name, text)
