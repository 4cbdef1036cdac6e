"""What users give in a checkpoint's place, and in a base model's: what they are told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders.base import llm_base, vision_base
from builders.pth import config_text, projector, save_pth
from xtuner2llava.errors import CheckpointError, ConversionError, Fault, UsageError
from xtuner2llava.hub.download import is_reference, local_path
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.checkpoint import open_checkpoint
from xtuner2llava.sources.opening import open_artifact

HEAD = "llm.lm_head.weight"
STATE = {HEAD: torch.ones(3, 2), "llm.model.norm.weight": torch.ones(2), **projector()}


def refused(reference: object) -> Fault:
    with pytest.raises(ConversionError) as caught:
        open_artifact(str(reference))
    (fault,) = caught.value.faults
    return fault


@pytest.mark.parametrize(
    "text",
    [
        "iter_9.pth", "work_dirs/iter_9.pth", "runs/model.pt", "a/pytorch_model.bin", "a/b.py",
        "a/model.safetensors", "a/config.json", "work_dirs/llava", "iter_500", "epoch_1",
        "llava/iter_500", "llava/iter_500_xtuner", "here/model", "./a", "a/b/c", "../a", "x/..",
    ],
)  # fmt: skip
def test_what_is_not_a_repo_id(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not is_reference(text)
    assert "no such file or folder" in refused(text).what


@pytest.mark.parametrize(
    "text", ["xtuner/llava-llama-3-8b-v1_1", "gpt2", "org/name@refs/pr/1", "Qwen/Qwen1.5-7B-Chat",
             "01-ai/Yi-6B", "org/my.model_v2"]
)  # fmt: skip
def test_what_may_be_a_repo_id(text: str) -> None:
    assert is_reference(text)


def test_a_checkpoint_that_is_not_there_is_looked_for_and_others_are_named(tmp_path: Path) -> None:
    save_pth(tmp_path / "iter_500.pth", STATE)
    with pytest.raises(UsageError) as caught:
        open_artifact(str(tmp_path / "iter_5000.pth"))
    assert caught.value.faults[0].advice == (
        f"Looked for it in {tmp_path}, which holds iter_500.pth."
    )


def xtuner_folder(path: Path) -> Path:
    for name in ("projector", "llm_adapter", "visual_encoder"):
        (path / name).mkdir(parents=True)
    tensors = {name.removeprefix("projector."): t for name, t in projector().items()}
    save_file(tensors, path / "projector" / "model.safetensors")
    (path / "projector" / "config.json").write_text('{"model_type": "projector"}')
    torch.save(tensors, path / "projector" / "pytorch_model.bin")
    save_file({"x": torch.ones(1)}, path / "llm_adapter" / "adapter_model.safetensors")
    (path / "llm_adapter" / "adapter_config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    "given",
    [
        "projector", "llm_adapter", "visual_encoder", "projector/model.safetensors",
        "projector/pytorch_model.bin", "llm_adapter/adapter_model.safetensors",
    ],
)  # fmt: skip
def test_a_part_of_an_xtuner_folder(given: str, tmp_path: Path) -> None:
    folder = xtuner_folder(tmp_path / "iter_2_xtuner")
    fault = refused(folder / given)
    assert "XTuner folder iter_2_xtuner" in fault.what
    assert fault.advice == f"Give the whole folder: {folder}"


def test_a_projector_that_was_taken_out_of_its_folder(tmp_path: Path) -> None:
    lone = xtuner_folder(tmp_path / "iter_2_xtuner") / "projector"
    lone = lone.rename(tmp_path / "mine")
    assert "the projector alone" in refused(lone).what
    (lone / "config.json").unlink()
    for name in ("model.safetensors", "pytorch_model.bin"):
        assert "the projector alone" in refused(lone / name).what
        assert "iter_N_xtuner folder that it belongs to" in refused(lone / name).advice


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_last_checkpoint_names_what_to_give(where: str, tmp_path: Path) -> None:
    named = tmp_path / "iter_2.pth"
    text = str(named) if where == "here" else "/data/work_dirs/x/iter_2.pth"
    save_pth(named, STATE)
    (tmp_path / "last_checkpoint").write_text(text)
    fault = refused(tmp_path / "last_checkpoint")
    assert text in fault.what
    assert fault.advice == f"Give that: {named}"


def test_a_config_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(config_text())
    assert "--xtuner-config" in refused(tmp_path / "config.py").advice


# What zero_to_fp32.py writes.


def shards(folder: Path, state: Mapping[str, torch.Tensor], kind: str) -> Path:
    """`state` in two shards, of which only the second holds the projector."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, keep in ((1, ("llm.",)), (2, ("projector.", "visual_encoder."))):
        name = f"{stem}-0000{number}-of-00002.{kind}"
        tensors = {n: t for n, t in state.items() if n.startswith(keep)}
        if kind == "safetensors":
            save_file(tensors, folder / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("given", ["", "*.index.json", "*-00001-of-*", "*-00002-of-*"])
def test_the_folder_of_zero_to_fp32(given: str, kind: str, tmp_path: Path) -> None:
    folder = shards(tmp_path / "out", STATE, kind)
    path = next(folder.glob(given)) if given else folder
    artifact = open_artifact(str(path))
    assert {part: sorted(found) for part, found in artifact.weights.items()} == {
        "llm": ["lm_head.weight", "model.norm.weight"],
        "projector": ["model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight"],
    }
    tensor = artifact.weights["projector"]["model.2.weight"]
    assert tensor.read(0, 2).tolist() == STATE["projector.model.2.weight"].tolist()
    assert len(artifact.files) == 2


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_whole_state_dict_in_one_file(kind: str, tmp_path: Path) -> None:
    name = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[kind]
    if kind == "bin":
        torch.save(STATE, tmp_path / name)
    else:
        save_file(STATE, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        assert set(open_artifact(str(path)).weights) == {"llm", "projector"}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_shard_without_its_index_is_not_taken_for_the_whole(kind: str, tmp_path: Path) -> None:
    folder = shards(tmp_path / "out", STATE, kind)
    next(folder.glob("*.index.json")).unlink()
    assert "one shard of several" in refused(next(folder.glob("*-00002-of-*"))).what


def test_weights_beside_a_state_dict_are_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "out", STATE, "bin")
    torch.save({}, folder / "other.pth")
    (note,) = open_artifact(str(folder)).notes
    assert note == "Beside pytorch_model.bin.index.json lies other.pth, not read."


# Quantised weights.


@pytest.mark.parametrize("suffix", [".absmax", ".quant_state.bitsandbytes__nf4", ".SCB"])
def test_a_quantised_state_dict_is_one_fault(suffix: str, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(40):
        module = f"llm.base_model.model.model.layers.{layer}.q"
        tensors[f"{module}.lora_A.default.weight"] = torch.ones(1, 2)
        tensors[f"{module}.lora_B.default.weight"] = torch.ones(2, 1)
        tensors[f"{module}.base_layer.weight"] = torch.zeros(2, 1, dtype=torch.uint8)
        tensors[f"{module}.base_layer.weight{suffix}"] = torch.zeros(1)
    fault = refused(save_pth(tmp_path / "iter_2.pth", tensors))
    assert fault.where.endswith("iter_2.pth, llm")
    assert "holds quantised weights such as " in fault.what
    assert "and 39 more" in fault.what
    assert "QLoRA" in fault.advice


def test_int8_weights_are_quantised(tmp_path: Path) -> None:
    tensors = {"llm.q.weight": torch.zeros(2, 2, dtype=torch.int8)}
    assert "holds quantised weights" in refused(save_pth(tmp_path / "iter_2.pth", tensors)).what


def test_another_base_is_one_fault_however_many_tensors_differ(tmp_path: Path) -> None:
    tensors = {
        f"llm.base_model.model.layers.{layer}.{name}.modules_to_save.default.weight": torch.ones(2)
        for layer in range(9)
        for name in ("norm", "gone")
    }
    base = llm_base(tmp_path / "llm", {f"layers.{n}.norm.weight": torch.ones(3) for n in range(9)})
    text = config_text(base, vision_base(tmp_path / "clip"))
    opened = open_checkpoint(str(save_pth(tmp_path / "iter_2.pth", tensors, text)))
    assert [(f.where.rpartition(", ")[2], f.what) for f in opened.faults] == [
        (
            "layers.0.norm.weight and 8 more",
            "has shape [2], the base's has [3]; is it the one that was used?",
        ),
        (
            "layers.0.gone.weight and 8 more",
            "is saved beside the adapter, but the base has none",
        ),
    ]


# Base models.


def cache(folder: Path, commits: list[str], main: str | None) -> Path:
    path = folder / "models--owner--name"
    for commit in commits:
        llm_base(path / "snapshots" / commit, {"lm_head.weight": torch.ones(3, 2)})
    if main is not None:
        (path / "refs").mkdir(parents=True, exist_ok=True)
        (path / "refs" / "main").write_text(main)
    return path


@pytest.mark.parametrize("given", ["", "snapshots"])
@pytest.mark.parametrize(("commits", "main"), [(["a", "b"], "b\n"), (["b"], None)])
def test_a_folder_of_the_cache_is_its_snapshot(
    given: str, commits: list[str], main: str | None, tmp_path: Path
) -> None:
    path = cache(tmp_path, commits, main)
    opened = open_checkpoint(
        str(save_pth(tmp_path / "iter_2.pth", {}, config_text())),
        SourceOptions(llm=path / given, vision=vision_base(tmp_path / "clip")),
    )
    assert opened.faults == ()
    assert opened.llm.folder == path / "snapshots" / "b"


@pytest.mark.parametrize(
    ("commits", "main", "what"),
    [
        (["a", "b"], None, "with 2 snapshots and no refs/main"),
        (["a", "b"], "c", "refs/main names the snapshot 'c', which is not there"),
        (["a"], "../../a", "refs/main names the snapshot '../../a', which is not there"),
    ],
)
def test_a_folder_of_the_cache_that_could_be_anything(
    commits: list[str], main: str | None, what: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        local_path(str(cache(tmp_path, commits, main)))
    assert what in caught.value.faults[0].what
    assert "snapshots/a" in caught.value.faults[0].advice


def test_a_base_that_is_nowhere_says_whose_it_is_and_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(reference: str, *, weights: bool) -> Path:
        raise CheckpointError("cannot be reached", where=reference, advice="Try later.")

    monkeypatch.setattr("xtuner2llava.sources.base_model.fetch_model", fetch)
    path = save_pth(tmp_path / "iter_2.pth", {}, config_text("org/llm", vision="/data/clip"))
    llm, tower = open_checkpoint(str(path)).faults
    assert llm == Fault(
        str(path),
        "the base LLM 'org/llm', as the XTuner config names it, is not a folder here (looked for "
        f"in {Path.cwd()} and beside the checkpoint); org/llm cannot be reached",
        "Try later. Give the base model's folder or Hub repo id with --llm.",
    )
    assert tower.what == (
        "the base vision tower '/data/clip', as the XTuner config names it, is not a folder here "
        "(looked for there and beside the checkpoint)"
    )
    assert "with --vision" in tower.advice


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.write_bytes(b""), "is a file, expected a folder"),
        (lambda path: xtuner_folder(path), "has no config.json, as models do"),
        (
            lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{}")),
            "a LoRA adapter, not a base model",
        ),
    ],
)
def test_what_is_not_a_base_model(make, what: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    given = tmp_path / "given"
    make(given)
    path = save_pth(tmp_path / "iter_2.pth", {}, config_text())
    clip = vision_base(tmp_path / "clip")
    (fault,) = open_checkpoint(str(path), SourceOptions(llm=given, vision=clip)).faults
    assert what in fault.what
    assert "--llm" in fault.where + fault.advice


def test_a_state_dict_without_config_still_shows_what_it_holds(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.pth")
    opened = open_checkpoint(str(tmp_path / "model.pth"))
    assert (opened.llm.origin, opened.llm.trained, len(opened.llm.tensors)) == ("trained", True, 2)
    assert [fault.where for fault in opened.faults] == [str(tmp_path / "model.pth")] * 2
    assert "--xtuner-config" in opened.faults[0].advice
