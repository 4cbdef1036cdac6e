"""The folders that are read, beside the names that the training recorded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from xtuner2llava import inspect


def test_what_is_read_stands_beside_what_was_recorded(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = "qwen2_e_full_fullvis"
    for name in ("llm_qwen2", "vision_clip"):
        shutil.copytree(checkpoints / "bases" / name, tmp_path / "mine" / name)
    found = inspect(
        checkpoints / case / "iter_2.pth",
        llm="mine/llm_qwen2",
        vision=tmp_path / "mine/vision_clip",
    )
    assert {name: (base.recorded, base.folder) for name, base in found.bases.items()} == {
        "llm": ("bases/llm_qwen2", "mine/llm_qwen2"),
        "visual_encoder": ("bases/vision_clip", str(tmp_path / "mine/vision_clip")),
        "tokenizer": ("bases/llm_qwen2", "mine/llm_qwen2"),
    }
    without = inspect(checkpoints / case / "iter_2.pth", vision=tmp_path / "mine/vision_clip")
    assert (without.bases["llm"].recorded, without.bases["llm"].folder) == ("bases/llm_qwen2", None)
    assert without.bases["tokenizer"].folder is None
