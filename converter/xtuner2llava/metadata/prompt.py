"""How the model was spoken to in training, as text that can be sent to it."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner2llava.planning.chat_template import prompt_text
from xtuner2llava.planning.plan import Plan

QUESTION = "What is in this picture?"
_LONGEST = 2000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with an image and `QUESTION`; `template` is XTuner's name for it, if it has one."""

    template: str | None
    text: str


def prompt_of(plan: Plan) -> Prompt | None:
    """The prompt that the training used, else the one that the LLM's family is known for.

    None where the template is not known.
    """
    template = plan.chat.prompt
    text = prompt_text(template, QUESTION) if template is not None else None
    if template is None or text is None or len(text) > _LONGEST:
        return None
    return Prompt(template.name, text)
