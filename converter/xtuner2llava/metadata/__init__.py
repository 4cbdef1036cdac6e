"""What the output says of itself: model card, `conversion.json`, and the report on a conversion."""

from xtuner2llava.metadata.card import CARD_NAME, MARK, is_generated, model_card
from xtuner2llava.metadata.card_template import CardTemplate
from xtuner2llava.metadata.front_matter import with_extra_keys, with_front_matter_of

__all__ = [
    "CARD_NAME",
    "MARK",
    "CardTemplate",
    "is_generated",
    "model_card",
    "with_extra_keys",
    "with_front_matter_of",
]
