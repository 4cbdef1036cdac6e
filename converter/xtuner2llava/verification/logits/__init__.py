"""Whether the folder computes what the trained model computes.

Both models run in float32 on a fixed picture and prompt, layer by layer, in the classes of the
installed transformers: the trained one in its own architecture, under its own names; the folder as
its config says. What no comparison of tensors can see shows here: a wrong rule whose shapes fit,
another rope_theta, another epsilon.
"""

from xtuner2llava.verification.logits.compare import LOGITS, folder_side, logits_checks
from xtuner2llava.verification.logits.reference import read_reference, reference_checks

__all__ = ["LOGITS", "folder_side", "logits_checks", "read_reference", "reference_checks"]
