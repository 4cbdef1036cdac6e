"""`README.md` of the output: the model card, as the Hub and people read it."""

from xtuner2llava.metadata.card import CARD_NAME, MARK, is_generated, model_card
from xtuner2llava.metadata.front_matter import with_extra_keys, with_front_matter_of
from xtuner2llava.metadata.template import Template

__all__ = [
    "CARD_NAME",
    "MARK",
    "Template",
    "is_generated",
    "model_card",
    "with_extra_keys",
    "with_front_matter_of",
]
