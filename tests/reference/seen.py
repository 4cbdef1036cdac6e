"""What programs did with converted folders, one JSON line each, for `scripts/programs.py`.

    {"program": …, "version": …, "format": …, "model_type": …, "becomes": …, "family": …,
     "outcome": "ran" or "loads" or "refuses", "note": …}

    {"template": …, "tokenizer": …, "format": …, "ids": …}

"ran": it computed what the trained model computes; "loads": it took every tensor, and nothing was
computed, or something else; "refuses": `note` says because of what. `becomes` is the LLM's plain
class.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Seen:
    """Appends to `file`, and does nothing without one. To be called when all assertions held."""

    file: Path | None

    def ran(self, program: str, version: str, folder: Path, note: str = "") -> None:
        """The program computes with `folder` what the model computes that it was made from."""
        self._write(program, version, folder, "ran", note)

    def loads(self, program: str, version: str, folder: Path, note: str) -> None:
        """The program takes every tensor of `folder`; `note` says what it does not compute."""
        self._write(program, version, folder, "loads", note)

    def refuses(self, program: str, version: str, folder: Path, because: str) -> None:
        """The program says that it does not take `folder`."""
        self._write(program, version, folder, "refuses", because)

    def compared(self, template: str, tokenizer: str, format: str, ids: int) -> None:
        """So many ids of prompts of this template, in this format, are those of XTuner."""
        self._append({"template": template, "tokenizer": tokenizer, "format": format, "ids": ids})

    def _write(self, program: str, version: str, folder: Path, outcome: str, note: str) -> None:
        if self.file is None:
            return  # before the folder is read
        said = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["mapping"]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        plain = said["format"] == "llava" and config["model_type"] == "llava"
        line = {
            "program": program,
            "version": version,
            "format": said["format"],
            "model_type": "llava" if plain else "official",
            "becomes": said["becomes"],
            "family": said["family"],
            "outcome": outcome,
            "note": note,
        }
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
