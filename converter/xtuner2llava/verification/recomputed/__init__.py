"""What the folder must hold, recomputed from the checkpoint by a path of its own.

Not shared with the conversion: opening files, reading pickles, DeepSpeed and LoRA, what each verb
of a mapping means, the names of the output, every computation. Shared: the families' YAML files,
`recipe/` for what the XTuner config says (bases, LoRA alpha, selected layer), and `sources/hub.py`
for where a Hub repo id lies on disk. A wrong rule in a family's YAML passes here, and not the
logits.
"""

from xtuner2llava.verification.recomputed.against import (
    Expected,
    against_checks,
    expect,
    out_tensors,
)
from xtuner2llava.verification.recomputed.comparison import Comparison

__all__ = ["Comparison", "Expected", "against_checks", "expect", "out_tensors"]
