"""A source model as XTuner leaves it after training: `iter_1.pth` and the base that it names."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.families.models import Source


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint with the whole LLM and a projector in it; the tower was frozen."""

    checkpoint: Path
    llm: Path
    vision: Path

    @property
    def bases(self) -> dict[str, Any]:
        """What `convert` and `plan` need besides the checkpoint."""
        return {
            "llm": self.llm,
            "vision": self.vision,
            "vision_tower_name": "openai/clip-vit-large-patch14-336",
        }


def write_trained(folder: Path, source: Source, checkpoints: Path) -> Trained:
    """The files of `source`, trained with the tiny CLIP of `tests/checkpoints`."""
    import torch

    llm, vision = folder / "base", checkpoints / "bases/vision_clip"
    llm.mkdir(parents=True)
    (llm / "config.json").write_text(json.dumps(dict(source.config)))
    qwen = "qwen" in source.config["model_type"]
    tokenizer = checkpoints / "bases" / ("llm_qwen2" if qwen else "llm_llama")
    for pattern in ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt"):
        for path in tokenizer.glob(pattern):
            shutil.copy(path, llm)
    generator = torch.Generator().manual_seed(1)
    hidden = source.config.get("hidden_size") or source.config["n_embd"]
    sizes = json.loads((vision / "config.json").read_text())["hidden_size"]
    state = {f"llm.{name}": tensor for name, tensor in source.tensors.items()}
    for place, columns in (("0", sizes), ("2", hidden)):
        weight = torch.randn(hidden, columns, generator=generator) / columns**0.5
        state[f"projector.model.{place}.weight"] = weight
        state[f"projector.model.{place}.bias"] = torch.zeros(hidden)
    checkpoint = folder / "iter_1.pth"
    torch.save({"meta": {"iter": 1}, "state_dict": state}, checkpoint)
    return Trained(checkpoint, llm, vision)
