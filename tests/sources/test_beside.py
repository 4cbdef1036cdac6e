"""Base models beside the checkpoint, and in the Hub's cache: found and known without a flag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.base import llm_base, vision_base
from builders.pth import config_text, save_pth
from xtuner2llava import convert
from xtuner2llava.errors import CheckpointError
from xtuner2llava.options import SourceOptions
from xtuner2llava.planning.redaction import cached_id
from xtuner2llava.sources.checkpoint import open_checkpoint

HEAD = {"lm_head.weight": torch.ones(3, 2)}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def fetch(reference: str, *, weights: bool) -> Path:
        asked.append(reference)
        raise CheckpointError("cannot be reached", where=reference)

    monkeypatch.setattr("xtuner2llava.sources.base_model.fetch_model", fetch)
    return asked


@pytest.mark.parametrize("name", ["org/llm", "/mnt/petrelfs/ann/llm", "./pretrained/llm", "llm"])
@pytest.mark.parametrize("where", ["run", "."])
def test_a_folder_of_that_name_beside_the_checkpoint(
    name: str, where: str, tmp_path: Path, no_hub: list[str]
) -> None:
    vision_base(tmp_path / "run" / "clip")
    llm = llm_base(tmp_path / where / "llm", HEAD)
    path = save_pth(tmp_path / "run" / "iter_2.pth", {}, config_text(name, "org/clip"))
    opened = open_checkpoint(path)
    assert opened.faults == ()
    assert no_hub == []
    assert opened.llm.folder == llm
    assert opened.llm.tensors.keys() == HEAD.keys()
    (note,) = (n for n in opened.notes if n.startswith("The base LLM is 'llm'"))
    assert f"names '{name}'" in note
    assert ("in the checkpoint's folder" in note) == (where == "run")
    assert str(tmp_path) not in note


def test_what_does_not_count_as_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a config, a file, one further up; the named one and the user's word win."""
    vision_base(tmp_path / "a" / "clip")
    llm_base(tmp_path / "llm", HEAD)
    (tmp_path / "a" / "b" / "llm").mkdir(parents=True)
    (tmp_path / "a" / "llm").write_text("a file")
    path = save_pth(tmp_path / "a" / "b" / "iter_2.pth", {}, config_text("org/llm", "org/clip"))
    (fault,) = open_checkpoint(path).faults
    assert "the base LLM 'org/llm', as the XTuner config names it, is not a folder" in fault.what
    given = open_checkpoint(path, SourceOptions(llm=tmp_path / "llm"))
    assert given.faults == ()
    assert not any(note.startswith("The base LLM is") for note in given.notes)
    # As XTuner takes it: from the working directory.
    named = llm_base(tmp_path / "cwd" / "org" / "llm", HEAD)
    (tmp_path / "a" / "b" / "llm").rmdir()
    llm_base(tmp_path / "a" / "b" / "llm", HEAD)
    monkeypatch.chdir(tmp_path / "cwd")
    assert open_checkpoint(path).llm.folder == named.relative_to(tmp_path / "cwd")


def test_a_link_into_the_cache_is_known_by_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--Qwen--Qwen2-7B/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "qwen").symlink_to(snapshot)
    assert cached_id(snapshot) == cached_id(tmp_path / "qwen") == "Qwen/Qwen2-7B"
    assert cached_id(tmp_path) is None


def card_of(out: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard.load(out / "README.md", ignore_metadata_errors=False).data


def test_bases_in_the_cache_are_right_in_the_card_without_a_flag(
    checkpoints: Path, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    for name, base in (("Qwen/Qwen2-tiny", "llm_qwen2"), ("openai/clip-tiny", "vision_clip")):
        snapshot = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "0123"
        shutil.copytree(checkpoints / "bases" / base, snapshot)
    (hub / "models--Qwen--Qwen2-tiny/snapshots/0123/README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Qwen2\n"
    )
    # The config names the data as XTuner's own configs do.
    trained = checkpoints / "qwen2_e_full_fullvis"
    text = (trained / "config.py").read_text()
    config = tmp_path / "config.py"
    file = "data/LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
    config.write_text(text.replace("data_root + '/train.json'", repr(file)))
    out = tmp_path / "llava-qwen-tiny"
    convert(
        trained / "iter_2.pth",
        out,
        llm=hub / "models--Qwen--Qwen2-tiny",
        vision=hub / "models--openai--clip-tiny/snapshots/0123",
        xtuner_config=config,
    )
    card = card_of(out)
    assert card.base_model == ["Qwen/Qwen2-tiny", "openai/clip-tiny"]
    assert (card.license, card.language) == ("apache-2.0", ["en"])
    assert card.datasets == ["liuhaotian/LLaVA-Instruct-150K"]
    assert json.loads((out / "config.json").read_text())["mm_vision_tower"] == "openai/clip-tiny"
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_data_of_ones_own_is_not_named(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "llava-qwen-tiny"
    bases = checkpoints / "bases"
    convert(
        checkpoints / "qwen2_e_full_fullvis" / "iter_2.pth",
        out,
        llm=bases / "llm_qwen2",
        vision=bases / "vision_clip",
        vision_tower_name="openai/clip-tiny",
    )
    assert card_of(out).datasets is None
