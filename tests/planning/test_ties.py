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
from xtuner2llava import convert, plan, verify
from xtuner2llava.planning.ties import are_surely_different, are_surely_equal, first_difference

if TYPE_CHECKING:
    import torch

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 640  # times 64 numbers of two bytes: more than the sample of 64 KiB that planning reads


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
    # A shared storage is known to be the same without reading; copies are compared.
    assert len(report.plan.ties) == (0 if head == "shared" else 1)
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


def test_an_untied_config_keeps_equal_tensors_apart(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint, bases = make(checkpoints, tmp_path / "in", "shared", says_tied=False)
    convert(checkpoint, tmp_path / "llava-qwen", **bases)
    tied, tensors = written(tmp_path / "llava-qwen")
    assert not tied and HEAD in tensors


def test_a_difference_beyond_the_sample_is_found_by_the_conversion(
    checkpoints: Path, tmp_path: Path
) -> None:
    import torch

    checkpoint, bases = make(checkpoints, tmp_path / "in", "late", says_tied=True)
    assert len(plan(checkpoint, **bases).ties) == 1  # headers and a sample do not show it
    report = convert(checkpoint, tmp_path / "llava-qwen", **bases)
    tied, tensors = written(tmp_path / "llava-qwen")
    assert not tied
    assert not torch.equal(tensors[HEAD], tensors[EMBED])
    assert any("but they differ; both are written" in note for note in report.plan.notes)
    assert verify(tmp_path / "llava-qwen", against=checkpoint, **bases).passed


def test_what_headers_and_a_sample_tell(tmp_path: Path) -> None:
    import torch

    one = torch.zeros(300, 100)  # 120,000 bytes
    late, early = one.clone(), one.clone()
    late[-1, -1], early[0, 1] = 1, 1
    first, same, other, near = (
        stored(tmp_path, name, tensor)
        for name, tensor in (("a", one), ("b", one), ("c", late), ("d", early))
    )
    assert are_surely_equal(first, first) and not are_surely_equal(first, same)
    assert not are_surely_different(first, same)
    assert not are_surely_different(first, other)  # it reads 64 KiB
    assert are_surely_different(first, near)
    assert are_surely_different(first, stored(tmp_path, "e", one[:299]))
    assert are_surely_different(first, stored(tmp_path, "f", one.double()))
    assert first_difference(first, same) is None
    # Little-endian 1.0 is 00 00 80 3f.
    assert first_difference(first, other) == 119_998
    assert first_difference(first, near) == 6
