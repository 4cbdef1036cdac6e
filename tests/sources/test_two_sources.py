"""Weights and an adapter for the same part, and all else that lies in a checkpoint beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builders.base import CLIP, llm_base, vision_base
from builders.pth import config_text, projector, save_pth
from builders.zero import ZeroRun
from xtuner2llava.errors import CheckpointError
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.checkpoint import Checkpoint, open_checkpoint
from xtuner2llava.sources.opening import open_artifact
from xtuner2llava.sources.part import Part

Tensors = Mapping[str, torch.Tensor]

Q, NORM = "model.q.weight", "model.norm.weight"
FC, BIAS = "vision_model.fc.weight", "vision_model.fc.bias"
# The weights that a base has, and others that lie in the checkpoint itself.
BASE = {Q: torch.full((2, 3), 1.0), NORM: torch.ones(3)}
OWN = {Q: torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]), NORM: torch.full((3,), 7.0)}
TOWER = {FC: torch.full((2, 3), 3.0), BIAS: torch.tensor([1.0, 2.0])}
A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0]])
ALPHA = 4.0
ADDED = ALPHA * (B @ A)  # of rank 1, so that the scale is alpha


def lora(module: str, infix: str = "") -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A{infix}.weight": A, f"{prefix}.lora_B{infix}.weight": B}


def save(tensors: Tensors, home: Path, stem: str, kind: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    if kind == "safetensors":
        save_file(dict(tensors), home / f"{stem}.safetensors", metadata={"format": "pt"})
    else:
        torch.save(dict(tensors), home / f"{stem.replace('model', 'pytorch_model', 1)}.bin")


def save_adapter(home: Path, module: str, kind: str = "safetensors", **settings: Any) -> None:
    home.mkdir(parents=True)
    path = home / "adapter_model"
    if kind == "safetensors":
        save_file(lora(module), path.with_suffix(".safetensors"))
    else:
        torch.save(lora(module), path.with_suffix(".bin"))
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": ALPHA} | settings
    (home / "adapter_config.json").write_text(json.dumps(values))


class Folder:
    """An XTuner folder to which a test adds what it is about, and the bases that it names."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "iter_2_xtuner"
        self.llm = llm_base(tmp_path / "llm", BASE)
        self.clip = vision_base(tmp_path / "clip", TOWER)
        parts = {name.removeprefix("projector."): t for name, t in projector().items()}
        save(parts, self.path / "projector", "model", "safetensors")
        (self.path / "xtuner_config.py").write_text(config_text(self.llm, self.clip))

    def model(self, name: str, config: Mapping[str, Any], tensors: Tensors, kind: str) -> Path:
        home = self.path / name if name else self.path
        home.mkdir(exist_ok=True)
        (home / "config.json").write_text(json.dumps(config))
        save(tensors, home, "model", kind)
        return home

    def open(self, **choice: Any) -> Checkpoint:
        return open_checkpoint(str(self.path), SourceOptions(**choice))


LLAMA = {"model_type": "llama", "torch_dtype": "float16", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def values(part: Part) -> dict[str, Any]:
    return {name: tensor.read(0, tensor.rows).tolist() for name, tensor in part.tensors.items()}


@pytest.mark.parametrize("home", ["llm", ""])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("factors", ["safetensors", "bin"])
def test_an_adapter_goes_onto_the_llm_that_lies_beside_it(
    home: str, weights: str, factors: str, folder: Folder
) -> None:
    folder.model(home, LLAMA, OWN, weights)
    save_adapter(folder.path / "llm_adapter", "model.q", factors)
    opened = folder.open()
    assert opened.faults == ()
    assert values(opened.llm) == {Q: (OWN[Q] + ADDED).tolist(), NORM: OWN[NORM].tolist()}
    assert opened.llm.origin == "LoRA (rank 1, alpha 4) on the checkpoint's own weights"
    assert opened.llm.trained
    (note,) = opened.notes
    assert "an adapter of the LLM" in note
    assert (f"in {home}/" if home else "at top level") in note
    assert "beside llm_adapter/" in note
    assert "If they have it in them already, remove the adapter" in note


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_goes_onto_the_tower_that_lies_beside_it(kind: str, folder: Folder) -> None:
    own = {FC: torch.full((2, 3), 5.0), BIAS: torch.zeros(2)}
    folder.model("visual_encoder", CLIP, own, kind)
    save_adapter(folder.path / "visual_encoder_adapter", "vision_model.fc", kind)
    opened = folder.open()
    assert opened.faults == ()
    assert values(opened.visual_encoder) == {FC: (own[FC] + ADDED).tolist(), BIAS: [0.0, 0.0]}
    assert "in visual_encoder/, beside visual_encoder_adapter/" in opened.notes[0]


def test_base_weights_beside_the_adapter_are_known_by_the_recorded_base(folder: Folder) -> None:
    folder.model("llm", LLAMA, BASE, "safetensors")
    save_adapter(folder.path / "llm_adapter", "model.q")
    opened = folder.open()
    assert values(opened.llm)[Q] == (BASE[Q] + ADDED).tolist()
    (note,) = opened.notes
    assert "already" not in note


@pytest.mark.parametrize("home", ["llm", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_beside_the_adapter_are_refused(
    home: str, dtype: torch.dtype, folder: Folder
) -> None:
    merged = {**BASE, Q: BASE[Q] + ADDED}
    folder.model(home, LLAMA, {n: t.to(dtype) for n, t in merged.items()}, "safetensors")
    save_adapter(folder.path / "llm_adapter", "model.q")
    (fault,) = folder.open().faults
    assert fault.where == str(folder.path)
    assert "the adapter of the LLM is in these weights already" in fault.what
    assert str(folder.llm) in fault.what
    assert "Remove llm_adapter/" in fault.advice


def test_a_given_llm_does_not_replace_weights_of_the_checkpoint(
    folder: Folder, tmp_path: Path
) -> None:
    other = llm_base(tmp_path / "other", {name: tensor * 0 for name, tensor in BASE.items()})
    folder.model("llm", LLAMA, OWN, "safetensors")
    save_adapter(folder.path / "llm_adapter", "model.q")
    opened = folder.open(llm=str(other))
    assert opened.llm.folder == other
    assert values(opened.llm)[Q] == (OWN[Q] + ADDED).tolist()
    assert "--llm gives config and small files only" in opened.notes[0]


UNDER = {
    # As PEFT calls them since 0.6, and before; and as a merge of two dicts leaves them.
    "base_layer": {"base_model.model.model.q.base_layer.weight": OWN[Q],
                   f"base_model.model.{NORM}": OWN[NORM]},
    "older": {f"base_model.model.{Q}": OWN[Q], f"base_model.model.{NORM}": OWN[NORM]},
    "plain": OWN,
    "saved": {"base_model.model.model.q.base_layer.weight": OWN[Q],
              "base_model.model.model.norm.original_module.weight": OWN[NORM] - 1,
              "base_model.model.model.norm.modules_to_save.default.weight": OWN[NORM]},
}  # fmt: skip


@pytest.mark.parametrize("names", UNDER)
def test_a_pth_file_with_the_weights_under_its_adapter(names: str, tmp_path: Path) -> None:
    tensors = {f"llm.{n}": t for n, t in {**UNDER[names], **lora("model.q", ".default")}.items()}
    # The base has its config here, and weights that must not be taken.
    base = llm_base(tmp_path / "llm", {name: tensor * 0 for name, tensor in BASE.items()})
    text = config_text(base, vision_base(tmp_path / "clip"), llm_lora={"r": 1, "lora_alpha": ALPHA})
    opened = open_checkpoint(str(save_pth(tmp_path / "iter_2.pth", tensors, text)))
    assert opened.faults == ()
    assert values(opened.llm) == {Q: (OWN[Q] + ADDED).tolist(), NORM: OWN[NORM].tolist()}
    assert "in the same file" in opened.notes[0]
    assert [f.name for f in opened.base_files] == ["model.safetensors"]  # the tower's


def test_some_weights_under_an_adapter_are_refused(tmp_path: Path) -> None:
    tensors = {**lora("a", ".default"), **lora("b", ".default"), **lora("c", ".default")}
    tensors["base_model.model.b.base_layer.weight"] = OWN[Q]
    state = {f"llm.{name}": tensor for name, tensor in tensors.items()}
    text = config_text(llm_base(tmp_path / "llm", BASE), vision_base(tmp_path / "clip"),
                       llm_lora={"r": 1, "lora_alpha": 1})  # fmt: skip
    (fault,) = open_checkpoint(str(save_pth(tmp_path / "iter_2.pth", state, text))).faults
    assert "LLM, a and 1 more" in fault.where
    assert "has no weights under its adapter, while 1 other modules have theirs" in fault.what


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = {**lora("model.q", ".default"), f"base_model.model.{Q}": OWN[Q],
               "base_model.model.model.q.base_layer.weight": OWN[Q] + 1}  # fmt: skip
    path = save_pth(tmp_path / "iter_2.pth", {f"llm.{n}": t for n, t in tensors.items()})
    faults = open_checkpoint(str(path), SourceOptions(llm=str(llm_base(tmp_path / "llm")))).faults
    assert "is there under two names" in faults[0].what


# ZeRO-3 keeps nothing in the module.
@pytest.mark.parametrize(("stage", "where"), [(2, "fragments"), (3, "fragments"), (2, "module")])
def test_a_deepspeed_directory_with_frozen_weights_under_the_adapter(
    stage: int, where: str, tmp_path: Path
) -> None:
    # Where frozen parameters are not excluded, and where DeepSpeed is older than 0.9.
    frozen = {f"llm.{name}": tensor for name, tensor in UNDER["base_layer"].items()}
    trained = {f"llm.{name}": tensor for name, tensor in lora("model.q", ".default").items()}
    text = config_text(llm_base(tmp_path / "llm"), vision_base(tmp_path / "clip"),
                       llm_lora={"r": 1, "lora_alpha": ALPHA})  # fmt: skip
    run = ZeroRun(
        stage=stage,
        ranks=2,
        groups=[{**trained, **projector()}],
        config=text,
        **({"frozen": frozen} if where == "fragments" else {"buffers": frozen}),
    )
    folder = run.save(tmp_path / "iter_2.pth")
    if where == "module":
        path = folder / "mp_rank_00_model_states.pt"
        value = torch.load(path, weights_only=False)
        torch.save({**value, "buffer_names": []}, path)
    opened = open_checkpoint(str(folder))
    assert opened.faults == ()
    assert values(opened.llm) == {Q: (OWN[Q] + ADDED).tolist(), NORM: OWN[NORM].tolist()}


# Nothing is left out without a word.


def test_two_llms_are_refused(folder: Folder) -> None:
    folder.model("llm", LLAMA, OWN, "safetensors")
    folder.model("", LLAMA, BASE, "bin")
    with pytest.raises(CheckpointError, match=r"two LLMs: pytorch_model.bin at top level, and the"):
        folder.open()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("model.safetensors.index.json", "model.safetensors.index.json"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("iter_500.pth", "iter_500.pth"),
        ("projector/pytorch_model.bin", "projector/pytorch_model.bin"),
        ("visual_encoder_adapter/adapter_model.bin", "visual_encoder_adapter/adapter_model.bin"),
        ("projector_adapter/adapter_config.json", "projector_adapter/"),
        ("old/adapter_model.safetensors", "old/"),
        ("visual_encoder.bak/pytorch_model.bin", "visual_encoder.bak/"),
    ],
)
def test_weights_that_are_not_read_are_named(extra: str, named: str, folder: Folder) -> None:
    folder.model("", LLAMA, OWN, "safetensors")
    save_adapter(folder.path / "visual_encoder_adapter", "vision_model.fc")
    before = folder.open()
    assert before.faults == before.notes == ()
    path = folder.path / extra
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{}")
    (note,) = folder.open().notes
    assert note.startswith(f"iter_2_xtuner also holds {named}, not read")


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "tokenizer.json", "optimizer.pt", "scheduler.pt", "training_args.bin",
        "rng_state_0.pth", "preprocessor_config.json", "images/README.md",
    ],
)  # fmt: skip
def test_files_that_are_not_weights_need_no_note(name: str, folder: Folder) -> None:
    folder.model("", LLAMA, OWN, "safetensors")
    (folder.path / name).parent.mkdir(exist_ok=True)
    (folder.path / name).write_bytes(b"{}")
    assert folder.open().notes == ()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model-00001-of-00002.safetensors"], "but not the index that names it"),
        (["visual_encoder/pytorch_model-00001-of-00002.bin"], "but not the index that names it"),
        (["visual_encoder/config.json"], "has no weights in it"),
        (["llm/config.json"], "has no weights in it"),
        (["config.json"], "has the config.json of an LLM, and no weights of it"),
    ],
)
def test_a_part_that_is_there_without_its_weights_is_not_taken_for_frozen(
    names: list[str], what: str, folder: Folder
) -> None:
    for name in names:
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text(json.dumps(LLAMA))
    with pytest.raises(CheckpointError) as caught:
        folder.open()
    assert what in caught.value.faults[0].what
    assert "Is the download complete?" in caught.value.faults[0].advice


def test_an_adapter_at_top_level_belongs_into_a_folder(folder: Folder) -> None:
    save_adapter(folder.path / "llm_adapter", "model.q")
    for path in (folder.path / "llm_adapter").iterdir():
        path.rename(folder.path / path.name)
    (folder.path / "llm_adapter").rmdir()
    with pytest.raises(CheckpointError, match="at top level, and nothing says of which part") as e:
        folder.open()
    assert "belongs in llm_adapter/" in e.value.faults[0].advice


def test_tensors_beside_the_state_dict_are_named(tmp_path: Path) -> None:
    ema = {"llm.lm_head.weight": torch.ones(1)}
    path = save_pth(tmp_path / "iter_2.pth", {}, ema_state_dict=ema, optimizer={"state": ema})
    (note,) = open_artifact(str(path)).notes
    assert "iter_2.pth also holds tensors under 'ema_state_dict', which are not read" in note


def test_entries_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "iter_2.pth", {"llm.scale": 0.5, "llm.x": [1]})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"holds 2 entries .* such as llm.scale \(float\)"):
        open_artifact(str(path))


def test_a_projector_under_an_adapter_is_refused(tmp_path: Path) -> None:
    tensors = {f"projector.{name}": t for name, t in lora("model.0", ".default").items()}
    with pytest.raises(CheckpointError, match="its projector is under an adapter"):
        open_artifact(str(save_pth(tmp_path / "iter_2.pth", tensors)))
