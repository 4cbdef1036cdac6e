"""What the output says of itself: model card, `conversion.json`, and the report on a conversion."""

from xtuner2llava.metadata.front_matter import CARD_NAME, MARK, merged_card

__all__ = ["CARD_NAME", "MARK", "merged_card"]
