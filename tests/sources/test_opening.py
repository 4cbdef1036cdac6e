"""What can be given as a checkpoint, and what a user is told who gives something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders.base import llm_base, vision_base
from builders.pth import config_text, projector, save_pth
from xtuner2llava.errors import ConversionError, CorruptFileError, UnsupportedError, UsageError
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.checkpoint import open_checkpoint
from xtuner2llava.sources.opening import open_artifact

LLM = {"llm.lm_head.weight": torch.ones(3, 2)}


def xtuner_folder(path: Path) -> Path:
    """A folder as `xtuner convert pth_to_hf` writes it after a projector's training."""
    (path / "projector").mkdir(parents=True)
    tensors = {name.removeprefix("projector."): t for name, t in projector().items()}
    save_file(tensors, path / "projector" / "model.safetensors")
    (path / "xtuner_config.py").write_text(config_text())
    return path


# Inputs that are wrong: what they are, the error, and the advice.
def lora_folder(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()


def model_folder(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))

    return make


def files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()

    return make


@pytest.mark.parametrize(
    ("make", "what", "advice"),
    [
        (
            model_folder("qwen2"),
            "a Hugging Face model folder (model_type 'qwen2') without XTuner's projector/",
            "Give it as --llm or --vision, and XTuner's checkpoint as CHECKPOINT.",
        ),
        (
            model_folder("llava_qwen"),
            "(model_type 'llava_qwen')",
            "It is LLaVA already: give what XTuner wrote.",
        ),
        (
            model_folder("internvl_chat"),
            "(model_type 'internvl_chat')",
            "XTuner's v1 trainer writes such folders; a model of its own kind, not LLaVA.",
        ),
        (model_folder("qwen3_vl"), "(model_type 'qwen3_vl')", "XTuner's v1 trainer"),
        (
            lora_folder,
            "a LoRA adapter alone, without the projector that belongs to it",
            "Give the iter_N_xtuner folder that it lies in, or XTuner's iter_N.pth.",
        ),
        (
            files("weights/.metadata", "weights/__0_0.distcp", "trainer_config.json"),
            "a distributed checkpoint (DCP), which XTuner's v1 trainer writes, and not for LLaVA",
            "LLaVA is trained by XTuner 0.1 and 0.2",
        ),
        (files(".metadata", "__0_0.distcp"), "a distributed checkpoint (DCP)", "XTuner 0.1"),
        (
            files("iter_500.pth", "iter_1000.pth", "last_checkpoint"),
            "not a checkpoint that XTuner writes",
            "It holds iter_1000.pth, iter_500.pth: give one of these.",
        ),
        (files("epoch_1.pth"), "not a checkpoint that XTuner writes", "It holds epoch_1.pth"),
        (
            files("notes.txt"),
            "not a checkpoint that XTuner writes",
            "Expected iter_N.pth, a DeepSpeed directory, or an iter_N_xtuner folder.",
        ),
        (files(), "an empty folder", "Expected iter_N.pth"),
    ],
)
def test_folders_of_other_things(
    make: Callable[[Path], None], what: str, advice: str, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    make(folder)
    with pytest.raises(UnsupportedError) as caught:
        open_artifact(str(folder))
    (fault,) = caught.value.faults
    assert what in fault.what
    assert advice in fault.advice
    assert fault.where == str(folder)


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "iter_1.pth"), "no/such/folder/here", "./none"):
        with pytest.raises(UsageError, match="no such file or folder") as caught:
            open_artifact(name)
        assert caught.value.faults[0].where == name
        assert "Hub repo id" in caught.value.faults[0].advice


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x.pth", "a\0b"])
def test_paths_that_the_system_refuses(name: str) -> None:
    with pytest.raises(ConversionError):
        open_checkpoint(name)


@pytest.mark.parametrize(
    ("value", "what", "advice"),
    [
        ({"optimizer_state_dict": {}}, "one rank's optimizer states", "Give the directory"),
        ({"state_dict": {}}, "no projector.*, but no tensors at all", "Give XTuner's iter_N.pth"),
        ({}, "no projector.*, but no tensors at all", "Give XTuner's iter_N.pth"),
        ([1], "holds a list, expected a state dict", ""),
        (7, "holds a int, expected a state dict", ""),
        ({"state_dict": 5}, "holds a int, expected a state dict", ""),
        (
            {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []},
            "no projector.*, but no tensors at all",
            "",
        ),
        (
            {"model.embed_tokens.weight": torch.ones(1)},
            "no projector.*, but model.embed_tokens.weight",
            "Give XTuner's iter_N.pth",
        ),
        (
            {"state_dict": LLM},
            "has tensors of llm, but none of the projector",
            "XTuner's LLaVAModel always saves `projector.*`; is this the right file?",
        ),
        (
            {
                "state_dict": {"llm.base_model.model.x.lora_A.default.weight": torch.ones(1)},
                "meta": {"cfg": "model = dict(type='xtuner.model.SupervisedFinetune')"},
            },
            "a checkpoint of SupervisedFinetune: text only, no projector",
            "Only LLaVA trainings can become LLaVA",
        ),
        (
            {"state_dict": {**LLM, **projector(), "head.weight": torch.ones(1)}},
            "1 tensors belong to no part of LLaVA, such as 'head.weight'",
            "Expected are llm.*, visual_encoder.* and projector.*",
        ),
    ],
)
def test_files_of_other_things(value: object, what: str, advice: str, tmp_path: Path) -> None:
    path = tmp_path / "iter_2.pth"
    torch.save(value, path)
    with pytest.raises(UnsupportedError) as caught:
        open_artifact(str(path))
    (fault,) = caught.value.faults
    assert what in fault.what
    assert advice in fault.advice
    assert fault.where == str(path)


def test_a_pth_file(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "iter_2.pth", LLM, "model = dict()")
    artifact = open_artifact(str(path))
    assert artifact.layout == "iter .pth file"
    assert {part: sorted(tensors) for part, tensors in artifact.weights.items()} == {
        "llm": ["lm_head.weight"],
        "projector": ["model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight"],
    }
    assert artifact.adapters == {}
    assert artifact.config == ("model = dict()", f"{path} (meta.cfg)")
    assert artifact.iteration == 2
    assert [(f.name, f.size) for f in artifact.files] == [("iter_2.pth", path.stat().st_size)]
    # A state dict alone is understood too.
    torch.save({**LLM, **projector()}, path)
    artifact = open_artifact(str(path))
    assert (set(artifact.weights), artifact.config, artifact.iteration) == (
        {"llm", "projector"},
        None,
        None,
    )


def test_parts_of_a_state_dict(tmp_path: Path) -> None:
    lora = {
        "x.lora_A.default.weight": torch.ones(1, 2),
        "x.lora_B.default.weight": torch.ones(2, 1),
    }
    tensors = {f"llm.base_model.model.{name}": t for name, t in lora.items()}
    # With bias="all", XTuner saves the biases of the frozen tower as well.
    tensors["visual_encoder.vision_model.post_layernorm.bias"] = torch.ones(2)
    artifact = open_artifact(str(save_pth(tmp_path / "iter_2.pth", tensors)))
    assert set(artifact.weights) == {"projector"}
    assert {part: set(found) for part, found in artifact.adapters.items()} == {
        "llm": {f"base_model.model.{name}" for name in lora},
        "visual_encoder": {"vision_model.post_layernorm.bias"},
    }


def test_a_pth_file_cut_short(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "iter_2.pth", LLM)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="its end is missing"):
        open_artifact(str(path))


@pytest.mark.parametrize("layout", ["iter_2.pth", "iter_2_xtuner", "iter_2_xtuner_bin"])
def test_real_layouts_hold_the_same(checkpoints: Path, layout: str) -> None:
    artifact = open_artifact(str(checkpoints / "qwen2_b_full_frozenvis" / layout))
    assert set(artifact.weights) == {"llm", "projector"}
    assert artifact.weights["llm"]["lm_head.weight"].shape[1] == 64
    assert artifact.config is not None
    assert "LLaVAModel" in artifact.config[0]
    artifact = open_artifact(str(checkpoints / "qwen2_d_lora_vislora" / layout))
    assert set(artifact.weights) == {"projector"}
    assert {part: len(found) for part, found in artifact.adapters.items()} == {
        "llm": 42,
        "visual_encoder": 48,
    }


def test_an_xtuner_folder(tmp_path: Path) -> None:
    folder = xtuner_folder(tmp_path / "iter_2_xtuner")
    artifact = open_artifact(str(folder))
    assert artifact.layout == "XTuner folder"
    assert set(artifact.weights) == {"projector"}
    assert artifact.folders == {"projector": folder / "projector"}
    assert artifact.config == (config_text(), str(folder / "xtuner_config.py"))
    assert [f.name for f in artifact.files] == ["projector/model.safetensors"]


def test_the_llm_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = xtuner_folder(tmp_path / "iter_2_xtuner")
    llm_base(folder / "llm", {"lm_head.weight": torch.ones(3, 2)})
    artifact = open_artifact(str(folder))
    assert set(artifact.weights["llm"]) == {"lm_head.weight"}
    assert artifact.folders["llm"] == folder / "llm"
    assert "llm/model.safetensors" in [f.name for f in artifact.files]


def test_an_xtuner_folder_that_is_not_whole(tmp_path: Path) -> None:
    folder = xtuner_folder(tmp_path / "iter_2_xtuner")
    (folder / "llm_adapter").mkdir()
    with pytest.raises(CorruptFileError, match=r"llm_adapter: has no weights in it"):
        open_artifact(str(folder))
    shutil.rmtree(folder / "llm_adapter")
    (folder / "projector" / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="projector: has no weights in it") as caught:
        open_artifact(str(folder))
    assert caught.value.faults[0].advice == (
        "Expected model.safetensors, pytorch_model.bin or their index. Is the download complete?"
    )


def test_a_config_of_any_size_is_not_read(tmp_path: Path) -> None:
    folder = xtuner_folder(tmp_path / "iter_2_xtuner")
    with (folder / "xtuner_config.py").open("wb") as stream:
        stream.truncate(5 << 20)
    with pytest.raises(CorruptFileError, match="has more than 4,194,304 bytes"):
        open_artifact(str(folder))


def test_a_folder_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    # There, every file is a link to a blob.
    folder = xtuner_folder(tmp_path / "models--org--x" / "snapshots" / "f00")
    blobs = tmp_path / "models--org--x" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        blob = path.rename(blobs / f"{number:040x}")
        path.symlink_to(blob)
    artifact = open_artifact(str(folder))
    assert artifact.weights["projector"]["model.0.weight"].read(0, 2).tolist() == [[0, 1], [2, 3]]


def test_a_given_config_replaces_the_one_inside(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "iter_2.pth", LLM, config_text("a", "b"))
    other = tmp_path / "other.py"
    other.write_text(config_text(llm_base(tmp_path / "llm"), vision_base(tmp_path / "clip")))
    opened = open_checkpoint(str(path), SourceOptions(xtuner_config=other))
    assert opened.faults == ()
    assert opened.llm.name == str(tmp_path / "llm")


def test_a_repo_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = xtuner_folder(tmp_path / "snapshot")
    asked: list[str] = []

    def fetch(reference: str) -> Path:
        asked.append(reference)
        return folder

    monkeypatch.setattr("xtuner2llava.sources.opening.fetch_checkpoint", fetch)
    assert open_artifact("xtuner/llava-llama-3-8b").path == folder
    assert open_artifact("xtuner/llava-llama-3-8b@main").path == folder
    assert asked == ["xtuner/llava-llama-3-8b", "xtuner/llava-llama-3-8b@main"]
    # What lies here is not asked for.
    monkeypatch.chdir(tmp_path)
    assert open_artifact("snapshot").path == Path("snapshot")
    assert len(asked) == 2
