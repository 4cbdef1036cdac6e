"""Records that disagree on an adapter, and bases that have it in them already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builders.base import llm_base, save_base, vision_base
from builders.pth import config_text, projector, save_pth
from xtuner2llava.errors import Fault
from xtuner2llava.options import SourceOptions
from xtuner2llava.sources.checkpoint import Checkpoint, open_checkpoint

Q, HEAD = "model.q.weight", "lm_head.weight"
BASE = {Q: torch.full((2, 3), 1.0), HEAD: torch.full((2, 3), 5.0)}
# Rank 2; B @ A is all twos.
A, B = torch.ones(2, 3), torch.ones(2, 2)
HEAD_AFTER = torch.full((2, 3), 9.0)


class Run:
    """A training, whose checkpoint is an XTuner folder or a `.pth` file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.llm = llm_base(folder / "llm", BASE)
        self.clip = vision_base(folder / "clip")

    def pth(self, llm: object = None, *, saved_head: bool = False, **lora: Any) -> Path:
        tensors = {
            "llm.base_model.model.model.q.lora_A.default.weight": A,
            "llm.base_model.model.model.q.lora_B.default.weight": B,
        }
        if saved_head:
            tensors["llm.base_model.model.lm_head.modules_to_save.default.weight"] = HEAD_AFTER
        text = config_text(llm or self.llm, self.clip, llm_lora=lora or {"r": 2, "lora_alpha": 4})
        return save_pth(self.folder / "iter_2.pth", tensors, text)

    def xtuner(self, config: str | None = None, **settings: Any) -> Path:
        path = self.folder / "iter_2_xtuner"
        (path / "projector").mkdir(parents=True)
        (path / "llm_adapter").mkdir()
        parts = {name.removeprefix("projector."): t for name, t in projector().items()}
        save_file(parts, path / "projector" / "model.safetensors")
        prefix = "base_model.model.model.q.lora"
        factors = {f"{prefix}_A.weight": A, f"{prefix}_B.weight": B}
        save_file(factors, path / "llm_adapter" / "adapter_model.safetensors")
        values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings
        (path / "llm_adapter" / "adapter_config.json").write_text(json.dumps(values))
        if config is not None:
            (path / "xtuner_config.py").write_text(config)
        return path

    def open(self, path: Path, **choice: Any) -> Checkpoint:
        return open_checkpoint(str(path), SourceOptions(vision=str(self.clip), **choice))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def merged(opened: Checkpoint) -> float:
    """The one value that all elements of the merged weight have."""
    assert opened.faults == ()
    (value,) = set(opened.llm.tensors[Q].read(0, 2).flatten().tolist())
    return float(value)


def only_fault(opened: Checkpoint) -> Fault:
    (fault,) = opened.faults
    return fault


def test_records_that_agree_need_no_word(run: Run) -> None:
    text = config_text(run.llm, run.clip, llm_lora={"r": 2, "lora_alpha": 4})
    opened = run.open(run.xtuner(text))
    assert opened.notes == ()
    assert merged(opened) == 1 + (4 / 2) * 2
    # The user's word, where it is theirs too.
    assert run.open(run.folder / "iter_2_xtuner", lora_alpha=4).notes == ()


@pytest.mark.parametrize(
    ("settings", "lora", "where", "texts"),
    [
        ({"r": 8}, None, "adapter_config.json", ["says r 8, the factors have rank 2"]),
        ({"r": 8, "rank_pattern": {"k": 4}}, None, "adapter_config.json", ["says r 4 and 8"]),
        ({}, {"r": 64, "lora_alpha": 4}, "xtuner_config.py", ["says r 64, the factors"]),
        # PEFT's default is 8.
        ({}, {"lora_alpha": 4}, "xtuner_config.py", ["says r 8, the factors"]),
        (
            {},
            {"r": 2, "lora_alpha": 16},
            "adapter_config.json",
            ["says lora_alpha 4, ", "xtuner_config.py says lora_alpha 16"],
        ),
        (
            {"alpha_pattern": {"q": 32}},
            {"r": 2, "lora_alpha": 4},
            "adapter_config.json",
            ["says lora_alpha 4 (q: 32)"],
        ),
    ],
)
def test_records_that_disagree_are_refused_unless_the_user_decides(
    settings: dict[str, Any], lora: dict[str, Any] | None, where: str, texts: list[str], run: Run
) -> None:
    path = run.xtuner(config_text(run.llm, run.clip, llm_lora=lora), **settings)
    fault = only_fault(run.open(path))
    assert fault.where.endswith(where)
    assert all(text in fault.what for text in texts), fault.what
    assert "--lora-alpha N decides" in fault.advice
    opened = run.open(path, lora_alpha=10)
    assert merged(opened) == 1 + (10 / 2) * 2
    assert any(all(text in note for text in texts) for note in opened.notes), opened.notes
    assert any("--lora-alpha 10 is used" in note for note in opened.notes)


@pytest.mark.parametrize("choice", [{}, {"lora_alpha": 4}])
def test_an_adapter_without_factors_is_refused(choice: dict[str, Any], run: Run) -> None:
    """PEFT saves such a file where it is given another model's state dict."""
    path = run.xtuner()
    for kept in ({}, {"base_model.model.lm_head.weight": HEAD_AFTER}):
        save_file(kept, path / "llm_adapter" / "adapter_model.safetensors")
        fault = only_fault(run.open(path, llm=str(run.llm), **choice))
        assert fault.what == "the adapter of the LLM is empty"
    (path / "llm_adapter" / "adapter_config.json").unlink()
    save_file({}, path / "llm_adapter" / "adapter_model.safetensors")
    assert "is empty" in only_fault(run.open(path, llm=str(run.llm), **choice)).what


@pytest.mark.parametrize("key", ["use_rslora", "use_dora"])
def test_other_kinds_of_adapters_are_not_decided_by_alpha(key: str, run: Run) -> None:
    text = config_text(run.llm, run.clip, llm_lora={"r": 2, "lora_alpha": 4})
    path = run.xtuner(text, **{key: True})
    for choice in ({}, {"lora_alpha": 4}):
        fault = only_fault(run.open(path, **choice))
        assert f"says {key}=True, " in fault.what
        assert f"says {key}=False" in fault.what


@pytest.mark.parametrize("rank_pattern", [{"q": 2}, {"q": 2, "k": 16}])
def test_a_rank_that_a_pattern_names(rank_pattern: dict[str, int], run: Run) -> None:
    path = run.xtuner(config_text(run.llm, run.clip), r=8, rank_pattern=rank_pattern)
    assert merged(run.open(path)) == 1 + (4 / 2) * 2


def test_another_trainings_config_for_a_pth_file(run: Run) -> None:
    path = run.pth()
    other = run.folder / "other.py"
    other.write_text(config_text(run.llm, run.clip, llm_lora={"r": 64, "lora_alpha": 16}))
    assert (
        "says r 64, the factors have rank 2" in only_fault(run.open(path, xtuner_config=other)).what
    )
    assert merged(run.open(path)) == 5


def test_the_users_alpha_is_said_where_a_record_says_another(run: Run) -> None:
    path = run.pth()
    opened = run.open(path, lora_alpha=1)
    assert merged(opened) == 1 + (1 / 2) * 2
    (note,) = opened.notes
    assert note == f"--lora-alpha 1 is used; {path} (meta.cfg) says lora_alpha 4."
    used = opened.llm.adapter
    assert used is not None
    assert used.settings is not None
    assert (used.ranks, used.settings.alpha, used.settings.where) == ((2,), 1, "--lora-alpha")


def test_adapter_config_names_the_base_where_no_other_record_does(run: Run) -> None:
    path = run.xtuner(base_model_name_or_path=str(run.llm))
    opened = run.open(path)
    assert merged(opened) == 5
    assert (opened.llm.folder, opened.llm.name) == (run.llm, str(run.llm))
    (path / "llm_adapter" / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 4, "base_model_name_or_path": "./not/here"})
    )
    fault = only_fault(run.open(path))
    assert "base LLM './not/here', as llm_adapter's config names it, is not a folder" in fault.what
    assert "--llm" in fault.advice


def test_records_that_name_different_bases_are_said(run: Run) -> None:
    text = config_text(run.llm, run.clip, llm_lora={"r": 2, "lora_alpha": 4})
    path = run.xtuner(text, base_model_name_or_path="org/other-7b")
    (note,) = run.open(path).notes
    assert f"is '{run.llm}', as the XTuner config says; llm_adapter's config says 'org/o" in note
    assert run.open(path, llm=str(run.llm)).notes == ()


# A base that was merged before.


def merged_base(run: Run, name: str = "merged", **config: Any) -> Path:
    after = {**BASE, Q: BASE[Q] + (4 / 2) * (B @ A)}
    halves = {n: t.to(torch.bfloat16) for n, t in after.items()}
    return save_base(run.folder / name, {"model_type": "llama", **config}, halves)


def test_a_merged_base_is_refused_where_the_recorded_one_is_here(run: Run) -> None:
    path, base = run.pth(), merged_base(run)
    fault = only_fault(run.open(path, llm=str(base)))
    assert fault.where == f"--llm {base}"
    assert "the adapter of the LLM is in these weights already" in fault.what
    assert "Give the base model with --llm" in fault.advice


def test_another_base_than_the_recorded_one_is_not_a_merged_one(run: Run) -> None:
    # Equal to the recorded one: no note, under any name.
    copy = llm_base(run.folder / "copy", BASE)
    opened = run.open(run.pth(), llm=str(copy))
    assert opened.notes == ()
    assert merged(opened) == 5


@pytest.mark.parametrize(
    ("name", "config", "extra", "signs"),
    [
        ("merged", {}, None, ["the XTuner config names 'org/llm-7b'"]),
        ("merged", {"_name_or_path": "x/llm-7b"}, None, ["it was made from 'x/llm-7b'"]),
        ("llm-7b", {}, "adapter_config.json", ["it holds adapter_config.json"]),
        ("llm-7b", {}, "xtuner_config.py", ["it holds xtuner_config.py"]),
        ("llm-7b", {}, None, []),
        ("llm-7b", {"_name_or_path": "/the/authors/folder"}, None, []),
    ],
)
def test_signs_of_a_merged_base_where_the_recorded_one_is_not_here(
    name: str, config: dict[str, Any], extra: str | None, signs: list[str], run: Run
) -> None:
    base = merged_base(run, name, **config)
    if extra is not None:
        (base / extra).write_text("{}")
    opened = run.open(run.pth("org/llm-7b"), llm=str(base))
    assert opened.faults == ()
    assert len(opened.notes) == bool(signs)
    for sign in signs:
        assert sign in opened.notes[0]
        assert "now in them twice. Give the base model with --llm" in opened.notes[0]


# Another base than the recorded one, of the same shapes.


def other_base(run: Run, name: str = "other") -> Path:
    return llm_base(run.folder / name, {Q: torch.full((2, 3), 1.1), HEAD: BASE[HEAD]})


def frozen(run: Run, llm: object = None) -> Path:
    return save_pth(run.folder / "iter_2.pth", {}, config_text(llm or run.llm, run.clip))


def test_another_base_is_said_where_the_recorded_one_is_here(run: Run) -> None:
    said = f"are those of --llm '{run.folder / 'other'}', and the XTuner config names '{run.llm}'"
    base = other_base(run)
    for path in (run.pth(), frozen(run)):
        opened = run.open(path, llm=str(base))
        assert opened.faults == ()
        (note,) = opened.notes
        assert note.startswith("The weights of the base LLM") and said in note
    copy = llm_base(run.folder / "copy", {n: t.to(torch.float16) for n, t in BASE.items()})
    assert run.open(frozen(run), llm=str(copy)).notes == ()


@pytest.mark.parametrize(
    ("recorded", "given", "said"),
    [
        ("org/llm-7b", "other", True),
        ("/root/llm-7b-chat", "llm-7b", True),
        ("org/LLM-7B", "llm-7b", False),
        # As ModelScope's cache has it.
        ("/root/.cache/modelscope/hub/org/llm1___5-7b", "llm1.5-7b", False),
    ],
)
def test_another_base_is_said_by_its_name(recorded: str, given: str, said: bool, run: Run) -> None:
    notes = run.open(frozen(run, recorded), llm=str(other_base(run, given))).notes
    assert [f"names '{recorded}'" in note for note in notes] == [True] * said


def test_another_config_of_a_full_llm_is_said(run: Run) -> None:
    text = config_text("org/llm-7b", run.clip, freeze_llm=False)
    tensors = {f"llm.{name}": tensor for name, tensor in BASE.items()}
    path = save_pth(run.folder / "iter_2.pth", tensors, text)
    (note,) = run.open(path, llm=str(run.llm)).notes
    assert note.startswith("The config and small files of the base LLM are those of --llm")


def test_another_tower_is_said(run: Run) -> None:
    path = save_pth(run.folder / "iter_2.pth", {}, config_text(run.llm, "laion/CLIP-ViT-L-14"))
    (note,) = run.open(path).notes
    assert "of the base vision tower are those of --vision" in note
    assert "names 'laion/CLIP-ViT-L-14'" in note


def test_another_config_than_the_recorded_one_is_said(run: Run) -> None:
    path, other = run.pth(), run.folder / "other.py"
    lora = {"r": 2, "lora_alpha": 8, "use_rslora": True}
    other.write_text(config_text("/data/llm", run.clip, llm_lora=lora))
    (note,) = run.open(path, xtuner_config=other, llm=str(run.llm)).notes[-1:]
    assert note.startswith(f"{other} is used, and {path} (meta.cfg) records other settings")
    assert "model.llm_lora.lora_alpha is 8 here and 4 there" in note
    assert "model.llm_lora.use_rslora is True here and not set there" in note
    assert "/data/llm" not in note
    other.write_text(config_text(run.llm, run.clip, llm_lora={"r": 2, "lora_alpha": 4}))
    assert run.open(path, xtuner_config=other).notes == ()


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_rope_theta_that_only_transformers_5_reads_is_said(run: Run, key: str) -> None:
    def notes(theta: float) -> tuple[str, ...]:
        values = {key: {"rope_type": "default", "rope_theta": theta}}
        (run.llm / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
        return run.open(run.pth()).notes

    (note,) = notes(1e6)
    assert "says rope_theta 1000000.0 where only transformers 5 reads it" in note
    assert notes(1e4) == ()


def test_a_base_with_tensors_of_this_training(run: Run) -> None:
    base = llm_base(run.folder / "llm-7b", {**BASE, HEAD: HEAD_AFTER})
    (note,) = run.open(run.pth("org/llm-7b", saved_head=True), llm=str(base)).notes
    assert "it has tensors that this training made" in note
    plain = llm_base(run.folder / "plain" / "llm-7b", BASE)
    assert run.open(run.pth("org/llm-7b", saved_head=True), llm=str(plain)).notes == ()
