"""What tests measured of logits and saw refused, one JSON line each, for `scripts/matrix.py`.

    {"family": …, "format": …, "layout": …, "llm": …, "tower": …, "real": …, "difference": …}
    {"refused": "refusals.yaml:LINE"}

`llm` and `tower` are "frozen", "LoRA" or "full"; `real` says that XTuner wrote the checkpoint;
`difference` is the largest of logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Measured:
    """Appends to `file`, and does nothing without one. To be called when all assertions held."""

    file: Path | None

    def exact(self, folder: Path, difference: float, *, real: bool = False) -> None:
        """The logits of the float32 `folder` are those of what it was made from."""
        said = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        assert said["dtype"] == "float32"
        self._write(
            family=said["mapping"]["family"],
            format=said["mapping"]["format"],
            layout=said["checkpoint"]["layout"],
            llm=_training(said["parts"]["llm"]),
            tower=_training(said["parts"]["visual_encoder"]),
            real=real,
            difference=difference,
        )

    def refused(self, where: str) -> None:
        """A refusal of the mappings, by its file and line, was met."""
        self._write(refused=where)

    def _write(self, **values: Any) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def _training(part: dict[str, Any]) -> str:
    if not part["trained"]:
        return "frozen"
    return "LoRA" if part["weights"].startswith("LoRA") else "full"
