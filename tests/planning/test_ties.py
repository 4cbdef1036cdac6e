"""Tied heads: written once where they are the same, twice where they are not, never wrongly."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reference.compose import read_tensors
from storing import stored
from xtuner2llava import convert, inspect, plan, verify
from xtuner2llava.planning.language_model import are_equal

if TYPE_CHECKING:
    import torch

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 640


def make(
    checkpoints: Path, folder: Path, head: str, *, says_tied: bool
) -> tuple[Path, dict[str, Any]]:
    """A `.pth` of the tiny Qwen with more rows, and what to convert it with.

    `head` is "shared" with the embedding, "equal" to it, "other" from the start, or "late": other
    in its last number only.
    """
    import torch
    from safetensors.torch import load_file

    case = checkpoints / "qwen2_e_full_fullvis/iter_2_xtuner"
    tensors = load_file(case / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(ROWS, 64, generator=generator).half()
    tensors[EMBED] = embed
    tensors[HEAD] = embed if head == "shared" else embed.clone()
    if head == "other":
        tensors[HEAD] = -embed
    if head == "late":
        tensors[HEAD][-1, -1] += 1
    state = OrderedDict((f"llm.{name}", tensor) for name, tensor in tensors.items())
    for part in ("projector", "visual_encoder"):
        for name, tensor in load_file(case / part / "model.safetensors").items():
            state[f"{part}.{name}"] = tensor
    folder.mkdir(exist_ok=True)
    torch.save({"meta": {"iter": 2}, "state_dict": state}, folder / "iter_2.pth")
    llm = folder / "base"
    shutil.copytree(checkpoints / "bases/llm_qwen2", llm)
    config = json.loads((llm / "config.json").read_text())
    config |= {"tie_word_embeddings": says_tied, "vocab_size": ROWS, "torch_dtype": "float16"}
    (llm / "config.json").write_text(json.dumps(config))
    bases = {
        "llm": llm,
        "vision": checkpoints / "bases/vision_clip",
        "vision_tower_name": "openai/clip",
    }
    return folder / "iter_2.pth", bases


def written(folder: Path) -> tuple[bool, dict[str, torch.Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    return config["tie_word_embeddings"], read_tensors(folder)


@pytest.mark.parametrize("head", ["shared", "equal"])
def test_a_tied_head_is_written_once(checkpoints: Path, tmp_path: Path, head: str) -> None:
    checkpoint, bases = make(checkpoints, tmp_path / "in", head, says_tied=True)
    report = convert(checkpoint, tmp_path / "llava-qwen", **bases)
    tied, tensors = written(tmp_path / "llava-qwen")
    assert tied and HEAD not in tensors and tensors[EMBED].shape == (ROWS, 64)
    (dropped,) = [d for _, d in report.plan.dropped if d.name == HEAD]
    assert dropped.because == f"the same as {EMBED}, to which it is tied"


@pytest.mark.parametrize("says_tied", [True, False])
def test_another_head_is_written_and_the_config_says_so(
    checkpoints: Path, tmp_path: Path, says_tied: bool
) -> None:
    import torch

    checkpoint, bases = make(checkpoints, tmp_path / "in", "other", says_tied=says_tied)
    report = convert(checkpoint, tmp_path / "llava-qwen", **bases)
    tied, tensors = written(tmp_path / "llava-qwen")
    assert not tied
    assert torch.equal(tensors[HEAD], -tensors[EMBED])
    noted = [note for note in report.plan.notes if "but they differ; both are written" in note]
    assert len(noted) == says_tied


def test_a_base_that_says_tied_and_has_another_head_is_not_what_training_had(
    checkpoints: Path, tmp_path: Path
) -> None:
    bases = {
        "llm": Path(shutil.copytree(checkpoints / "bases/llm_qwen2", tmp_path / "llm_qwen2")),
        "vision": checkpoints / "bases/vision_clip",
        "vision_tower_name": "openai/clip",
    }
    config = bases["llm"] / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "tie_word_embeddings": True}))
    (note,) = (
        note
        for note in plan(checkpoints / "qwen2_a_pretrain/iter_2.pth", **bases).notes
        if "but they differ" in note
    )
    assert "Where training loaded this base, it had one of them in both places" in note


def test_an_untied_config_keeps_equal_tensors_apart(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint, bases = make(checkpoints, tmp_path / "in", "shared", says_tied=False)
    convert(checkpoint, tmp_path / "llava-qwen", **bases)
    tied, tensors = written(tmp_path / "llava-qwen")
    assert not tied and HEAD in tensors


@pytest.mark.parametrize("saved", ["model.embed_tokens", "lm_head"])
def test_what_training_told_apart_is_written_apart(
    checkpoints: Path, tmp_path: Path, saved: str
) -> None:
    """With `modules_to_save`, PEFT trains a copy of one; the other keeps the base's weight."""
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint, bases = make(checkpoints, tmp_path / "in", "shared", says_tied=True)
    state = torch.load(checkpoint)["state_dict"]
    kept = {name.removeprefix("llm."): t for name, t in state.items() if name.startswith("llm.")}
    kept.pop(HEAD)
    save_file(kept, bases["llm"] / "model.safetensors", {"format": "pt"})
    adapter = load_file(
        checkpoints / "qwen2_d_lora_vislora/iter_2_xtuner/llm_adapter/adapter_model.safetensors"
    )
    trained = {f"base_model.model.{saved}.modules_to_save.default.weight": kept[EMBED] + 1}
    trained |= {n.replace(".weight", ".default.weight"): t for n, t in adapter.items()}
    state = {name: t for name, t in state.items() if not name.startswith("llm.")}
    state |= {f"llm.{name}": tensor for name, tensor in trained.items()}
    torch.save({"meta": {"iter": 2}, "state_dict": state}, checkpoint)
    convert(checkpoint, tmp_path / "llava-qwen", lora_alpha=32, **bases)
    tied, tensors = written(tmp_path / "llava-qwen")
    before, after = kept[EMBED], kept[EMBED] + 1
    expected = (after, before) if saved == "model.embed_tokens" else (before, after)
    assert not tied
    assert all(map(torch.equal, (tensors[EMBED], tensors[HEAD]), expected))


@pytest.mark.parametrize("head", ["shared", "equal", "late"])
def test_the_plan_says_what_the_conversion_does(
    checkpoints: Path, tmp_path: Path, head: str
) -> None:
    import torch

    checkpoint, bases = make(checkpoints, tmp_path / "in", head, says_tied=True)
    planned = plan(checkpoint, **bases)
    report = convert(checkpoint, tmp_path / "llava-qwen", **bases)
    assert planned.to_dict() == report.plan.to_dict()
    tied, tensors = written(tmp_path / "llava-qwen")
    assert {planned.name for planned in planned.tensors} == {*tensors}
    differs = any("but they differ; both are written" in note for note in planned.notes)
    assert (differs, tied) == (head == "late", head != "late")
    assert tied or not torch.equal(tensors[HEAD], tensors[EMBED])
    (llava, _) = inspect(checkpoint, **bases).targets
    assert any("but they differ" in caveat for caveat in llava.caveats) is differs
    assert verify(tmp_path / "llava-qwen", against=checkpoint, **bases).passed


def test_two_tensors_are_equal_if_all_their_bytes_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("xtuner2llava.planning.language_model._BLOCK_BYTES", 50_000)
    one = torch.zeros(300, 100)  # 120,000 bytes: the last block is a short one
    last, middle = one.clone(), one.clone()
    last[-1, -1], middle[150, 1] = 1, 1
    first, same, other, near = (
        stored(tmp_path, name, tensor)
        for name, tensor in (("a", one), ("b", one), ("c", last), ("d", middle))
    )
    assert are_equal(first, first) and are_equal(first, same)
    assert not are_equal(first, other)
    assert not are_equal(first, near)
    assert not are_equal(first, stored(tmp_path, "e", one[:299]))
    assert not are_equal(first, stored(tmp_path, "f", one.double()))
