"""What the output says of itself: model card, `conversion.json`, and the report on a conversion."""
