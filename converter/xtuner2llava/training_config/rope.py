"""The change of RoPE that XTuner makes for `max_position_embeddings`."""

from __future__ import annotations

import math

from xtuner2llava.errors import UnsupportedError


def linear_rope_factor(
    max_position_embeddings: int | None,
    original_max_position_embeddings: int | None,
    original_rope_factor: float = 1,
) -> float | None:
    """The factor of the `{"type": "linear"}` that XTuner trained with; None: RoPE is the base's.

    `max_position_embeddings` is the argument of LLaVAModel, the others are the base LLM's: 1 where
    its `rope_scaling` is None or has no `factor`. A factor replaces the base's `rope_scaling`
    whole; `max_position_embeddings` of the config stays (xtuner/model/llava.py,
    `_prepare_for_long_context_training`, the same from v0.1.23 to today). Raises
    `UnsupportedError` for a factor that is not a positive number.
    """
    if max_position_embeddings is None or not original_max_position_embeddings:
        return None
    if not (math.isfinite(original_rope_factor) and original_rope_factor > 0):
        raise UnsupportedError(
            f"the base LLM's rope_scaling has the factor {original_rope_factor}, "
            "a positive number was expected"
        )
    original = original_max_position_embeddings * original_rope_factor
    if max_position_embeddings <= original:
        return None
    return float(math.ceil(max_position_embeddings / original))
