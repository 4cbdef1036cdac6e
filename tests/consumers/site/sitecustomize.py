"""Lets torchvision be imported where torch has no CUDA; on the path of vLLM's processes.

The package index has torchvision for Linux built for CUDA alone. Its operators do not load without,
which it allows, but for two that its import registers (`torchvision/_meta_registrations.py`).
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass
