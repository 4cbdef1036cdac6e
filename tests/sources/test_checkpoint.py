"""A trained model gathered: what was trained, and the rest from base models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builders.base import CLIP, llm_base, save_base, vision_base
from builders.pth import config_text, projector, save_pth
from builders.zero import ZeroRun
from xtuner2llava.errors import CheckpointError, Fault
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.checkpoint import Checkpoint, open_checkpoint
from xtuner2llava.sources.part import Part

HEAD = "lm_head.weight"
BASE, TRAINED, EARLIER = (torch.full((2, 2), value) for value in (1.0, 2.0, 3.0))
TOWER_BIAS = "vision_model.post_layernorm.bias"
# Rank 1, so that B @ A is all ones.
LORA = {
    "llm.base_model.model.lm_head.lora_A.default.weight": torch.ones(1, 2),
    "llm.base_model.model.lm_head.lora_B.default.weight": torch.ones(2, 1),
}


class Workshop:
    """A folder with base models, in which checkpoints are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.llm = llm_base(folder / "llm", {HEAD: BASE})
        self.clip = vision_base(folder / "clip", {TOWER_BIAS: torch.tensor([5.0, 6.0])})

    def config(self, **further: Any) -> str:
        return config_text(**{"llm": self.llm, "vision": self.clip, **further})

    def save(self, tensors: dict[str, torch.Tensor], config: str | None = None) -> Path:
        path = self.folder / "iter_2.pth"
        return save_pth(path, tensors, self.config() if config is None else config)

    def open(self, path: Path, **choice: Any) -> Checkpoint:
        return open_checkpoint(str(path), SourceOptions(**choice))


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def values(part: Part) -> dict[str, Any]:
    return {name: tensor.read(0, tensor.rows).tolist() for name, tensor in part.tensors.items()}


def only_fault(opened: Checkpoint) -> Fault:
    (fault,) = opened.faults
    return fault


def test_a_trained_part_is_taken_from_the_checkpoint(workshop: Workshop) -> None:
    opened = workshop.open(workshop.save({f"llm.{HEAD}": TRAINED}))
    assert opened.faults == opened.notes == ()
    assert values(opened.llm) == {HEAD: TRAINED.tolist()}
    assert (opened.llm.origin, opened.llm.trained) == ("trained", True)
    assert (opened.llm.folder, opened.llm.name) == (workshop.llm, str(workshop.llm))
    assert opened.llm.config is not None
    assert opened.llm.config.model_type == "llama"
    # The tower was frozen: it is that of the base.
    assert values(opened.visual_encoder) == {TOWER_BIAS: [5.0, 6.0]}
    assert (opened.visual_encoder.origin, opened.visual_encoder.trained) == ("base clip", False)
    assert [f.name for f in opened.base_files] == ["model.safetensors"]
    assert set(opened.projector.tensors) == {
        f"model.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")
    }


def test_the_user_decides_which_base(workshop: Workshop, tmp_path: Path) -> None:
    other = llm_base(tmp_path / "other", {HEAD: EARLIER})
    opened = workshop.open(workshop.save({}), llm=str(other))
    assert values(opened.llm) == {HEAD: EARLIER.tolist()}
    assert opened.llm.folder == other


def test_without_downloads_what_is_here_is_still_opened(workshop: Workshop) -> None:
    path = str(workshop.save({}))
    wanted, here = open_checkpoint(path), open_checkpoint(path, base_weights=False)
    assert values(here.llm) == values(wanted.llm) != {}
    assert (here.base_files, here.faults) == (wanted.base_files, ())


def test_without_downloads_weights_on_the_hub_are_a_fault(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the cache holds of a repository whose small files only were fetched.
    cached = llm_base(tmp_path / "cached", {HEAD: EARLIER})
    (cached / "model.safetensors").unlink()
    fetched: list[bool] = []

    def fetch(reference: str, *, weights: bool) -> Path:
        fetched.append(weights)
        return cached

    monkeypatch.setattr("xtuner2llava.sources.base_model.fetch_model", fetch)
    path = workshop.save({}, config_text("somebody/model", str(workshop.folder / "clip")))
    opened = open_checkpoint(str(path), base_weights=False)
    assert fetched == [False]
    (fault,) = opened.faults
    assert fault.where == "somebody/model"
    assert "not in the local cache" in fault.what


def test_bases_that_are_missing_are_told_both(workshop: Workshop, tmp_path: Path) -> None:
    path = workshop.save({}, config_text("./no/model", "./no/tower"))
    opened = workshop.open(path)
    assert [(f.where, f.what, f.advice) for f in opened.faults] == [
        (
            str(path),
            "the base LLM './no/model', as the XTuner config names it, is not a folder here "
            f"(looked for in {Path.cwd()} and beside the checkpoint)",
            "Give the base model's folder or Hub repo id with --llm.",
        ),
        (
            str(path),
            "the base vision tower './no/tower', as the XTuner config names it, is not a folder "
            f"here (looked for in {Path.cwd()} and beside the checkpoint)",
            "Give the base model's folder or Hub repo id with --vision.",
        ),
    ]
    assert (opened.llm.origin, opened.llm.tensors) == ("not available", {})
    assert (opened.llm.trained, opened.llm.name) == (False, "./no/model")
    opened = workshop.open(path, llm="./neither", vision=str(workshop.clip))
    assert str(only_fault(opened)).startswith("--llm: the base LLM './neither' is not a folder")


def test_a_checkpoint_that_names_no_base(workshop: Workshop) -> None:
    path = save_pth(workshop.folder / "plain.pth", {f"llm.{HEAD}": TRAINED})
    opened = workshop.open(path)
    assert [(f.what, f.advice) for f in opened.faults] == [
        (
            "nothing names the base LLM, whose config and small files are needed",
            "Give its folder or Hub repo id with --llm, or the config of the training with "
            "--xtuner-config.",
        ),
        (
            "nothing names the base vision tower, whose config and small files are needed",
            "Give its folder or Hub repo id with --vision, or the config of the training with "
            "--xtuner-config.",
        ),
    ]
    opened = workshop.open(path, llm=str(workshop.llm), vision=str(workshop.clip))
    assert opened.faults == ()
    assert values(opened.llm) == {HEAD: TRAINED.tolist()}


def test_a_path_of_a_base_that_the_system_refuses(workshop: Workshop) -> None:
    opened = workshop.open(workshop.save({f"llm.{HEAD}": TRAINED}), llm="x" * 5000)
    assert opened.faults
    assert opened.llm.config is None


@pytest.mark.parametrize(
    ("config", "tensors", "what"),
    [
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
            {HEAD: BASE},
            "a quantised model, whose weights are not those that become the merged model",
        ),
        (
            {"model_type": "llama"},
            {HEAD: BASE, "q_proj.weight.absmax": torch.ones(1)},
            "holds quantised weights such as 'q_proj.weight'",
        ),
        ({"model_type": "llama"}, {"q_proj.qweight": torch.ones(1)}, "holds quantised weights"),
        ({"model_type": "llama"}, None, "has no weights, and the LLM's are needed"),
    ],
)
def test_bases_of_other_kinds(
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None,
    what: str,
    workshop: Workshop,
    tmp_path: Path,
) -> None:
    base = save_base(tmp_path / "other", config, tensors)
    opened = workshop.open(workshop.save(LORA), llm=str(base), lora_alpha=1)
    assert what in only_fault(opened).what
    assert str(base) in only_fault(opened).where


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("siglip", "XTuner drops the first patch of a tower without class token"),
        ("siglip_vision_model", "XTuner drops the first patch"),
        ("dinov2", "model_type is 'dinov2', expected a CLIP model: XTuner's LLaVA trains CLIP"),
        (None, "model_type is None, expected a CLIP model"),
    ],
)
def test_towers_of_other_kinds(
    kind: str | None, what: str, workshop: Workshop, tmp_path: Path
) -> None:
    tower = save_base(tmp_path / "other", {**CLIP, "model_type": kind}, {TOWER_BIAS: torch.ones(2)})
    opened = workshop.open(workshop.save({}), vision=str(tower))
    assert what in only_fault(opened).what


def test_a_whole_clip_model_as_tower(workshop: Workshop, tmp_path: Path) -> None:
    config = {"model_type": "clip", "vision_config": CLIP}
    tensors = {TOWER_BIAS: torch.ones(2), "text_model.x": BASE, "logit_scale": torch.ones(1)}
    tower = save_base(tmp_path / "whole", config, tensors)
    opened = workshop.open(workshop.save({}), vision=str(tower))
    assert values(opened.visual_encoder) == {TOWER_BIAS: [1.0, 1.0]}
    nothing = save_base(tmp_path / "text", config, {"text_model.x": BASE})
    opened = workshop.open(workshop.save({}), vision=str(nothing))
    assert only_fault(opened).what == "has no vision tower in it"


def test_an_adapter_is_merged_onto_the_base(workshop: Workshop) -> None:
    config = workshop.config(llm_lora={"r": 1, "lora_alpha": 4})
    opened = workshop.open(workshop.save(LORA, config))
    assert opened.faults == ()
    assert values(opened.llm) == {HEAD: [[5.0, 5.0], [5.0, 5.0]]}
    assert opened.llm.origin == "LoRA (rank 1, alpha 4) on base llm"
    assert opened.llm.trained


def test_alpha_is_never_guessed(workshop: Workshop) -> None:
    path = save_pth(workshop.folder / "plain.pth", LORA)
    bases = {"llm": str(workshop.llm), "vision": str(workshop.clip)}
    fault = only_fault(workshop.open(path, **bases))
    assert fault.where == f"{path}, LLM, LoRA on lm_head"
    assert fault.what == (
        "rank 1 is in the shapes, but alpha is recorded nowhere; "
        "give --lora-alpha (LLM) or --vision-lora-alpha (tower)"
    )
    opened = workshop.open(path, **bases, lora_alpha=2)
    assert values(opened.llm) == {HEAD: [[3.0, 3.0], [3.0, 3.0]]}
    # The other part's is not taken for it.
    assert workshop.open(path, **bases, vision_lora_alpha=2).faults


def test_the_users_alpha_goes_before_a_record_even_one_that_cannot_be_read(
    workshop: Workshop,
) -> None:
    config = workshop.config(llm_lora={"r": 1, "lora_alpha": 4})
    opened = workshop.open(workshop.save(LORA, config), lora_alpha=2)
    assert values(opened.llm) == {HEAD: [[3.0, 3.0], [3.0, 3.0]]}
    unknown = config.replace("lora_alpha=4", "lora_alpha=compute()")
    path = workshop.save(LORA, unknown)
    assert "lora_alpha" in str(only_fault(workshop.open(path)))
    opened = workshop.open(path, lora_alpha=2)
    assert opened.faults == ()
    assert values(opened.llm) == {HEAD: [[3.0, 3.0], [3.0, 3.0]]}


def test_qlora_is_merged_onto_the_plain_base_and_said(workshop: Workshop) -> None:
    config = workshop.config(llm_lora={"r": 1, "lora_alpha": 1}, quantized=True)
    opened = workshop.open(workshop.save(LORA, config))
    assert values(opened.llm) == {HEAD: [[2.0, 2.0], [2.0, 2.0]]}
    (note,) = opened.notes
    assert opened.inexact == (note,)
    assert "The LLM was trained as QLoRA, on quantised weights" in note


@pytest.mark.parametrize("flag", ["load_in_4bit=True", "load_in_8bit=True"])
def test_a_quantised_llm_without_a_quantization_config(flag: str, workshop: Workshop) -> None:
    config = workshop.config(llm_lora={"r": 1, "lora_alpha": 1})
    changed = config.replace("from_pretrained',", f"from_pretrained', {flag},", 1)
    opened = workshop.open(workshop.save(LORA, changed))
    assert opened.inexact and "The LLM was trained as QLoRA" in opened.inexact[0]
    changed = changed.replace(flag, flag.replace("True", "False"))
    assert workshop.open(workshop.save(LORA, changed)).inexact == ()


@pytest.mark.parametrize(
    ("argument", "refused"),
    [
        ("subfolder='llm'", True),
        ("variant='fp16'", True),
        ("use_safetensors=False", True),
        ("gguf_file='q4.gguf'", True),
        ("config=dict(rope_theta=5.0)", True),
        ("revision='v1'", False),  # transformers ignores that of a folder.
        ("use_safetensors=True, variant=None, subfolder=''", False),
    ],
)
def test_arguments_that_choose_other_files_than_the_path_says(
    argument: str, refused: bool, workshop: Workshop
) -> None:
    config = workshop.config(llm_lora={"r": 1, "lora_alpha": 1})
    path = workshop.save(
        LORA, config.replace("from_pretrained',", f"from_pretrained', {argument},", 1)
    )
    opened = workshop.open(path)
    assert bool(opened.faults) == refused
    if refused:
        (fault,) = opened.faults
        assert fault.where == f"{path} (meta.cfg), model.llm.{argument.partition('=')[0]}"
        assert f"'{workshop.llm}' alone does not say what was loaded" in fault.what
        assert fault.advice.startswith("Give --llm the folder")
    assert workshop.open(path, llm=str(workshop.llm)).faults == ()


def test_a_recorded_revision_of_a_repository(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "xtuner2llava.sources.base_model.fetch_model", lambda *_, **__: workshop.llm
    )
    config = workshop.config(llm="org/other", llm_lora={"r": 1, "lora_alpha": 1})
    path = workshop.save(
        LORA, config.replace("from_pretrained',", "from_pretrained', revision='v1',", 1)
    )
    fault = only_fault(workshop.open(path))
    assert fault.where.endswith("model.llm.revision") and "OWNER/NAME@REVISION" in fault.advice
    assert workshop.open(path, llm="org/other@v1").faults == ()


def test_biases_of_a_frozen_tower_are_no_tower(workshop: Workshop) -> None:
    # bias="all": XTuner saves every key with "bias" in it, and TOWER_BIAS is not all of the tower.
    weight = "vision_model.post_layernorm.weight"
    tensors = {weight: torch.ones(2), TOWER_BIAS: torch.zeros(2)}
    tower = vision_base(workshop.folder / "clip2", tensors)
    config = workshop.config(llm_lora={"r": 1, "lora_alpha": 1, "bias": "all"}, vision=tower)
    saved = LORA | {f"visual_encoder.{TOWER_BIAS}": torch.tensor([8.0, 9.0])}
    opened = workshop.open(workshop.save(saved, config))
    assert opened.faults == ()
    assert values(opened.visual_encoder) == {weight: [1.0, 1.0], TOWER_BIAS: [8.0, 9.0]}
    assert opened.visual_encoder.origin == "saved biases on base clip2"


@pytest.mark.parametrize("key", ["pretrained_pth", "load_from"])
def test_a_frozen_part_is_what_the_run_started_from(key: str, workshop: Workshop) -> None:
    earlier = save_pth(workshop.folder / "stage1.pth", {f"llm.{HEAD}": EARLIER})
    path = workshop.save({}, workshop.config(**{key: earlier}))
    opened = workshop.open(path)
    assert values(opened.llm) == {HEAD: EARLIER.tolist()}
    assert opened.llm.origin == f"{key} stage1.pth"
    assert not opened.llm.trained
    assert opened.notes == ()
    assert "stage1.pth" in [f.name for f in opened.base_files]
    # It had not trained the tower.
    assert values(opened.visual_encoder) == {TOWER_BIAS: [5.0, 6.0]}


@pytest.mark.parametrize("key", ["pretrained_pth", "load_from"])
def test_a_start_that_xtuner_rounds_is_said(key: str, workshop: Workshop) -> None:
    run = ZeroRun([{f"llm.{HEAD}": EARLIER, **projector()}], stage=2, ranks=2)
    earlier = run.save(workshop.folder / "stage1.pth")
    opened = workshop.open(workshop.save({}, workshop.config(**{key: earlier})))
    assert (opened.llm.origin, opened.faults) == (f"{key} stage1.pth", ())
    assert values(opened.llm) == {HEAD: EARLIER.tolist()}
    assert ["rounds these to float16" in note for note in opened.notes] == (
        [True] if key == "pretrained_pth" else []
    )


def test_mmengine_loads_what_it_is_told_over_pretrained_pth(workshop: Workshop) -> None:
    first = save_pth(workshop.folder / "stage1.pth", {f"llm.{HEAD}": EARLIER})
    second = save_pth(workshop.folder / "stage2.pth", {f"llm.{HEAD}": TRAINED})
    config = workshop.config(pretrained_pth=first, load_from=second)
    opened = workshop.open(workshop.save({}, config))
    assert (opened.llm.origin, opened.notes) == ("load_from stage2.pth", ())
    assert values(opened.llm) == {HEAD: TRAINED.tolist()}
    save_pth(second, {})  # A pretraining: what it does not hold stays.
    opened = workshop.open(workshop.save({}, config))
    assert (opened.llm.origin, opened.notes) == ("pretrained_pth stage1.pth", ())


def test_a_run_that_was_resumed_started_from_itself(workshop: Workshop) -> None:
    config = workshop.config(load_from=workshop.folder / "iter_1.pth", resume=True)
    opened = workshop.open(workshop.save({}, config))
    assert (opened.llm.origin, opened.notes) == ("base llm", ())


@pytest.mark.parametrize(
    "trained", [{"freeze_llm": False}, {"llm_lora": {"r": 1, "lora_alpha": 1}}]
)
def test_a_part_that_was_trained_and_is_missing(
    trained: dict[str, Any], workshop: Workshop, tmp_path: Path
) -> None:
    """The base in its place would be another model, without a word."""
    path = workshop.save({}, workshop.config(**trained))
    for choice in ({}, {"llm": workshop.llm}):
        fault = only_fault(workshop.open(path, **choice))
        assert "config trains the LLM, and the checkpoint holds nothing of it" in fault.what
        assert fault.where == str(path)
    # The trained LLM may have been taken out of it, or merged.
    opened = workshop.open(path, llm=llm_base(tmp_path / "merged", {HEAD: TRAINED}))
    assert opened.faults == ()
    assert values(opened.llm) == {HEAD: TRAINED.tolist()}
    assert "the weights of --llm" in opened.notes[0]


@pytest.mark.parametrize("key", ["pretrained_pth", "load_from"])
@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_a_start_that_cannot_be_read_is_said(state: str, key: str, workshop: Workshop) -> None:
    earlier = workshop.folder / "stage1.pth"
    if state == "damaged":
        earlier.write_bytes(b"PK\x03\x04")
    opened = workshop.open(workshop.save({}, workshop.config(**{key: earlier})))
    assert values(opened.llm) == {HEAD: BASE.tolist()}
    assert len(opened.notes) == 2  # for the LLM, and for the tower
    assert f"started from '{earlier}', which cannot be read here" in opened.notes[0]
    assert "give --llm a folder with its weights" in opened.notes[0]
    assert "give --vision" in opened.notes[1]


def test_an_adapter_does_not_belong_to_a_start_that_xtuner_did_not_load(
    workshop: Workshop,
) -> None:
    # With LoRA layers, the model has other names than a fully trained one, and XTuner loads
    # `pretrained_pth` with strict=False: nothing of that LLM arrives.
    earlier = save_pth(workshop.folder / "stage1.pth", {f"llm.{HEAD}": EARLIER})
    config = workshop.config(llm_lora={"r": 1, "lora_alpha": 1}, pretrained_pth=earlier)
    opened = workshop.open(workshop.save(LORA, config))
    assert values(opened.llm) == {HEAD: [[2.0, 2.0], [2.0, 2.0]]}
    assert opened.llm.origin == "LoRA (rank 1, alpha 1) on base llm"
    (note,) = opened.notes
    assert "XTuner does not load that under LoRA" in note
    earlier.unlink()
    opened = workshop.open(workshop.save(LORA, config))
    assert all("vision tower" in note for note in opened.notes)


def test_an_xtuner_folder_brings_its_own_configs(workshop: Workshop, tmp_path: Path) -> None:
    folder = llm_base(tmp_path / "iter_2_xtuner", {HEAD: TRAINED})
    save_base(folder / "visual_encoder", CLIP, {TOWER_BIAS: torch.zeros(2)})
    (folder / "projector").mkdir()
    save_file({"model.0.weight": BASE}, folder / "projector" / "model.safetensors")
    (folder / "xtuner_config.py").write_text(config_text("./no/model", "./no/tower"))
    opened = workshop.open(folder)
    assert opened.faults == ()
    assert (opened.llm.folder, opened.llm.name) == (folder, "./no/model")
    assert values(opened.visual_encoder) == {TOWER_BIAS: [0.0, 0.0]}
    # A folder that the user gives has the say over config and tokenizer, not over the weights.
    opened = workshop.open(folder, llm=str(workshop.llm))
    assert opened.llm.folder == workshop.llm
    assert values(opened.llm) == {HEAD: TRAINED.tolist()}


def test_adapter_settings_beside_the_weights(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "iter_2_xtuner"
    for name in ("projector", "llm_adapter"):
        (folder / name).mkdir(parents=True)
    save_file({"model.0.weight": BASE}, folder / "projector" / "model.safetensors")
    adapter = {n.removeprefix("llm.").replace(".default", ""): t for n, t in LORA.items()}
    save_file(adapter, folder / "llm_adapter" / "adapter_model.safetensors")
    settings = folder / "llm_adapter" / "adapter_config.json"
    settings.write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 7}))
    (folder / "xtuner_config.py").write_text(workshop.config())
    opened = workshop.open(folder)
    assert values(opened.llm) == {HEAD: [[8.0, 8.0], [8.0, 8.0]]}
    settings.unlink()
    recorded = workshop.config(llm_lora={"lora_alpha": 1, "r": 1})
    (folder / "xtuner_config.py").write_text(recorded)
    assert values(workshop.open(folder).llm) == {HEAD: [[2.0, 2.0], [2.0, 2.0]]}
    settings.write_text(json.dumps({"peft_type": "LORA", "use_qalora": True}))
    with pytest.raises(CheckpointError, match="LoRA setting use_qalora=True"):
        workshop.open(folder)


@pytest.mark.parametrize(
    "case", ["llama_d_lora_vislora", "qwen2_d_lora_vislora", "qwen2_c_full_vislora"]
)
def test_real_layouts_of_adapters_make_the_same_model(
    case: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Base models are named relative to the folder in which XTuner was run.
    monkeypatch.chdir(checkpoints)
    file, folder = (open_checkpoint(f"{case}/{n}") for n in ("iter_2.pth", "iter_2_xtuner"))
    assert file.faults == folder.faults == ()
    for part in ("llm", "visual_encoder", "projector"):
        one, other = (getattr(opened, part).tensors for opened in (file, folder))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            left, right = (t.read(0, t.rows).double() for t in (tensor, other[name]))
            # Folders hold LLMs and their adapters in float16, the rest as it was trained.
            limit = 1e-3 if part == "llm" else 0.0
            assert float((left - right).abs().max()) <= limit, name
