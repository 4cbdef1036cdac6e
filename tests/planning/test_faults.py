"""A plan is exact or refused: every fault names its place, and all are reported at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from xtuner2llava import CheckpointError, PlanError, UsageError, plan
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.planning.plan import Plan

if TYPE_CHECKING:
    import torch

QWEN, LLAMA = "qwen2_e_full_fullvis", "llama_e_full_fullvis"
BASES = {QWEN: "llm_qwen2", LLAMA: "llm_llama"}


class Workshop:
    """Copies of real files, for a test to spoil."""

    def __init__(self, checkpoints: Path, folder: Path) -> None:
        self.checkpoints, self.folder = checkpoints, folder

    def llm(self, case: str, **config: Any) -> Path:
        """The base LLM with other config values; None takes a key away."""
        return self._copy(BASES[case], config)

    def vision(self, **config: Any) -> Path:
        return self._copy("vision_clip", config)

    def exported(self, case: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        """XTuner's folder of `case` with other tensors in its LLM."""
        from safetensors.torch import load_file, save_file

        copy = self.folder / "iter_2_xtuner"
        shutil.copytree(self.checkpoints / case / "iter_2_xtuner", copy)
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        return copy

    def plan(self, case: str, checkpoint: Path | None = None, **options: Any) -> Plan:
        given: dict[str, Any] = {
            "llm": self.checkpoints / "bases" / BASES[case],
            "vision": self.checkpoints / "bases/vision_clip",
            "vision_tower_name": "openai/clip",
        }
        source = checkpoint or self.checkpoints / case / "iter_2.pth"
        return plan(source, **{**given, **options})

    def faults(self, case: str, checkpoint: Path | None = None, **options: Any) -> list[str]:
        with pytest.raises(PlanError) as error:
            self.plan(case, checkpoint, **options)
        return [str(fault) for fault in error.value.faults]

    def _copy(self, name: str, config: dict[str, Any]) -> Path:
        copy = self.folder / name
        shutil.copytree(self.checkpoints / "bases" / name, copy)
        values = json.loads((copy / "config.json").read_text())
        values = {k: v for k, v in {**values, **config}.items() if v is not None}
        (copy / "config.json").write_text(json.dumps(values))
        return copy


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


@pytest.fixture
def workshop(checkpoints: Path, tmp_path: Path) -> Workshop:
    return Workshop(checkpoints, tmp_path)


# The LLM


def test_a_wrong_hidden_size_is_seen_in_every_tensor_and_in_the_projector(
    workshop: Workshop,
) -> None:
    faults = "\n".join(workshop.faults(QWEN, llm=workshop.llm(QWEN, hidden_size=32)))
    assert "has 64 where the config has `hidden_size: 32`" in faults
    assert "model.layers.{0..2}.mlp.up_proj.weight" in faults
    assert "projector.model.0.weight: has shape [64, 48], expected [32, 48]" in faults


def test_a_wrong_number_of_layers(workshop: Workshop) -> None:
    more = "\n".join(workshop.faults(QWEN, llm=workshop.llm(QWEN, num_hidden_layers=4)))
    assert "model.layers.3.self_attn.q_proj.weight" in more
    assert "is missing: Qwen2ForCausalLM has it" in more


def test_fewer_layers_than_there_are(workshop: Workshop) -> None:
    fewer = "\n".join(workshop.faults(QWEN, llm=workshop.llm(QWEN, num_hidden_layers=2)))
    assert "model.layers.2." in fewer
    assert "is not a tensor of Qwen2ForCausalLM" in fewer


def test_a_missing_tensor(workshop: Workshop) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = workshop.exported(QWEN, without(name))
    (fault,) = workshop.faults(QWEN, folder)
    assert name in fault and "is missing" in fault and "classes/qwen2.yaml:" in fault


def test_a_tensor_too_many(workshop: Workshop) -> None:
    name = "model.layers.1.mlp.side_proj.weight"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors["model.norm.weight"].clone()

    (fault,) = workshop.faults(QWEN, workshop.exported(QWEN, add))
    assert name in fault and "is not a tensor of Qwen2ForCausalLM" in fault


def test_gate_and_up_exchanged_cannot_be_seen_here(workshop: Workshop) -> None:
    """Their shapes are equal; that is what comparing logits is for."""

    def exchange(tensors: dict[str, torch.Tensor]) -> None:
        gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    assert workshop.plan(QWEN, workshop.exported(QWEN, exchange)).tensors


def test_faults_of_all_parts_are_told_at_once(workshop: Workshop) -> None:
    llm = workshop.llm(QWEN, num_hidden_layers=2)
    vision = workshop.vision(num_hidden_layers=5, image_size=70)
    (llm / "tokenizer.json").write_text("{")
    faults = "\n".join(workshop.faults(QWEN, llm=llm, vision=vision))
    assert "Qwen2ForCausalLM" in faults
    assert "CLIPVisionModel" in faults
    assert "prepares images of 56 pixels, the vision tower takes 70" in faults
    assert "tokenizer.json" in faults and "is not JSON" in faults


# The tokenizer


def test_a_part_at_fault_is_tried_once_and_hides_no_other(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer's folder may be on the Hub, where each try asks it again."""
    tried = []

    def find_folder(reference: str) -> Path:
        tried.append(reference)
        raise CheckpointError("is not a folder here", where=reference)

    monkeypatch.setattr("xtuner2llava.planning.tokenizer.find_folder", find_folder)
    faults = workshop.faults(
        QWEN, tokenizer="ann/tokenizer", llm=workshop.llm(QWEN, hidden_size=32), for_="llava"
    )
    assert tried == ["ann/tokenizer"]
    assert faults[0] == "ann/tokenizer: is not a folder here"
    assert "LLaVA has no class for Qwen2ForCausalLM" in faults[1]
    assert any("projector.model.0.weight: has shape [64, 48]" in fault for fault in faults)
    assert len(faults) == len(set(faults))


@pytest.mark.parametrize("format_name", ["llava", "hf"])
def test_tokens_of_a_base_that_have_no_row_get_one(workshop: Workshop, format_name: str) -> None:
    """As <pad> of the first Llama 2: training cannot have used them, and LLaVA adds random rows."""
    llm = workshop.llm(LLAMA)
    (llm / "added_tokens.json").write_text(json.dumps({"<pad>": 384}))
    made = workshop.plan(LLAMA, llm=llm, format=format_name)
    config: Any = made.config.get("text_config", made.config)
    assert config["vocab_size"] == 448
    assert "The base's vocabulary has 384 rows, and tokens without one: '<pad>'." in made.notes
    assert any("in place of 384" in note and "the mean of the" in note for note in made.notes)


def test_tokens_that_the_base_does_not_have_and_without_a_row(workshop: Workshop) -> None:
    other = workshop.llm(QWEN)
    added = json.loads((other / "added_tokens.json").read_text())
    (other / "added_tokens.json").write_text(json.dumps(added | {"<extra>": 400}))
    llm = workshop.checkpoints / "bases" / BASES[QWEN]
    (fault,) = workshop.faults(QWEN, llm=llm, tokenizer=other)
    assert "token '<extra>' has id 400, the embedding has 400 rows" in fault
    assert str(other) in fault


def test_a_base_without_tokenizer(workshop: Workshop) -> None:
    llm = workshop.llm(QWEN)
    for path in [*llm.glob("*token*"), llm / "vocab.json", llm / "merges.txt"]:
        path.unlink()
    (fault,) = workshop.faults(QWEN, llm=llm)
    assert "holds no tokenizer" in fault


def test_a_tokenizer_that_only_remote_code_could_load(workshop: Workshop) -> None:
    llm = workshop.llm(QWEN)
    config = {
        "tokenizer_class": "MyTokenizer",
        "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]},
    }
    (llm / "tokenizer_config.json").write_text(json.dumps(config))
    (fault,) = workshop.faults(QWEN, llm=llm)
    assert "its tokenizer MyTokenizer is code of the model's repository" in fault


# The projector


def spoiled_projector(
    workshop: Workshop, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    from safetensors.torch import load_file, save_file

    folder = workshop.exported(QWEN, lambda tensors: None)
    path = folder / "projector/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_a_projector_without_bias(workshop: Workshop) -> None:
    def weights_only(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]

    (fault,) = workshop.faults(QWEN, spoiled_projector(workshop, weights_only))
    assert "a projector without bias" in fault
    assert "LLaVA's mlp projectors always have one" in fault


def test_a_projector_that_lacks_one_tensor(workshop: Workshop) -> None:
    folder = spoiled_projector(workshop, without("model.2.bias"))
    (fault,) = workshop.faults(QWEN, folder)
    assert "projector.model.2.bias: is missing" in fault


@pytest.mark.parametrize("index", ["10000000000", "9" * 5000, "\u0664"])
def test_a_projector_with_a_hostile_index(workshop: Workshop, index: str) -> None:
    """It would be a loop over all layers below that."""
    import torch

    name = f"model.{index}.weight"
    change = {name: torch.zeros(2)}
    folder = spoiled_projector(workshop, lambda tensors: tensors.update(change))
    (fault,) = workshop.faults(QWEN, folder)
    assert fault.endswith(f"projector.{name}: is unexpected")


@pytest.mark.parametrize("layer", [-6, -5, 4, 5])
def test_a_layer_that_the_tower_does_not_have(workshop: Workshop, layer: int) -> None:
    """`hidden_states` has one more than there are layers, which are four."""
    text = (workshop.checkpoints / QWEN / "config.py").read_text()
    config = workshop.folder / "config.py"
    frozen = "freeze_llm=False,"
    config.write_text(text.replace(frozen, f"{frozen} visual_select_layer={layer},"))
    if layer in (-5, 4):
        made = workshop.plan(QWEN, xtuner_config=config)
        assert made.config["mm_vision_select_layer"] == layer
    else:
        (fault,) = workshop.faults(QWEN, xtuner_config=config)
        assert f"visual_select_layer is {layer}, and the vision tower has 4 layers" in fault


@pytest.mark.parametrize("mean", [0.5, [0.5, 0.5], [0.5, True, 0.5], "x"])
def test_a_mean_that_is_not_of_three_channels(workshop: Workshop, mean: object) -> None:
    tower = workshop.vision()
    values = json.loads((tower / "preprocessor_config.json").read_text())
    (tower / "preprocessor_config.json").write_text(json.dumps(values | {"image_mean": mean}))
    (fault,) = workshop.faults(QWEN, vision=tower)
    assert fault.endswith(
        f"preprocessor_config.json: image_mean is {mean!r}, expected three numbers"
    )


def test_a_projector_with_another_activation(workshop: Workshop) -> None:
    folder = spoiled_projector(workshop, lambda tensors: None)
    config = json.loads((folder / "projector/config.json").read_text())
    (folder / "projector/config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    (fault,) = workshop.faults(QWEN, folder)
    assert "the projector's hidden_act is 'relu'" in fault


# The tower


def test_a_trained_tower_must_be_written(workshop: Workshop) -> None:
    (fault,) = workshop.faults(QWEN, include_vision_tower=False)
    assert fault.startswith("include_vision_tower: the vision tower was trained")


def test_a_frozen_tower_may_be_left_out_and_what_breaks_is_said(workshop: Workshop) -> None:
    case = workshop.checkpoints / "qwen2_b_full_frozenvis/iter_2.pth"
    made = workshop.plan(QWEN, case, include_vision_tower=False)
    assert not [p.name for p in made.tensors if "vision_tower" in p.name]
    assert made.config["unfreeze_mm_vision_tower"] is False
    assert any("LLaVA-NeXT computes NaN" in note for note in made.notes)


def test_a_tower_whose_only_name_is_a_path(workshop: Workshop) -> None:
    config = workshop.folder / "config.py"
    text = (workshop.checkpoints / QWEN / "config.py").read_text()
    assert "bases/vision_clip" in text
    config.write_text(text.replace("bases/vision_clip", "/home/me/clip"))
    with pytest.raises(PlanError, match="only by a path of this machine"):
        workshop.plan(QWEN, vision_tower_name=None, xtuner_config=config)


@pytest.mark.parametrize("kind", ["llama", "qwen_early"])
def test_a_projector_for_another_llm(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    """`hidden_size` is that of the plain class: this Qwen calls its own n_embd."""
    import torch

    source = KINDS[kind].make(tmp_path / "source")
    assert ("hidden_size" in source.config) is (kind == "llama")
    made = write_trained(tmp_path / "trained", source, checkpoints)
    assert plan(made.checkpoint, **made.bases).mapping.family == kind
    saved = torch.load(made.checkpoint)
    state = saved["state_dict"]
    for name, shape in (("0.weight", (48, 48)), ("0.bias", (48,)), ("2.weight", (48, 48)),
                        ("2.bias", (48,))):  # fmt: skip
        assert state[f"projector.model.{name}"].shape != shape
        state[f"projector.model.{name}"] = torch.zeros(shape)
    torch.save(saved, made.checkpoint)
    with pytest.raises(PlanError) as error:
        plan(made.checkpoint, **made.bases)
    said = "\n".join(str(fault) for fault in error.value.faults)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert f"projector.model.{name}: has shape [48" in said
    assert "expected [64, 48] = [LLM hidden_size, vision or LLM hidden_size]" in said


# Rotary embeddings


def long_context(workshop: Workshop, case: str) -> Path:
    """The config of `case` with XTuner's argument for twice the length."""
    text = (workshop.checkpoints / case / "config.py").read_text()
    assert "type=LLaVAModel" in text
    config = workshop.folder / "config.py"
    config.write_text(
        text.replace("type=LLaVAModel", "type=LLaVAModel,\n    max_position_embeddings=1024")
    )
    return config


def test_a_longer_context_becomes_linear_scaling(workshop: Workshop) -> None:
    made = workshop.plan(LLAMA, xtuner_config=long_context(workshop, LLAMA))
    assert made.config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert workshop.plan(LLAMA).config["rope_scaling"] is None


def test_a_qwen_of_longer_context_cannot_be_llavas(workshop: Workshop) -> None:
    config = long_context(workshop, QWEN)
    (fault,) = workshop.faults(QWEN, xtuner_config=config)
    assert "LlavaQwenForCausalLM overwrites rope_scaling with None" in fault
    made = workshop.plan(QWEN, xtuner_config=config, format="hf").to_dict()
    assert '"rope_scaling": {"type": "linear", "factor": 2.0}' in json.dumps(made["config"])


@pytest.mark.parametrize("format_name", ["llava", "hf"])
@pytest.mark.parametrize(
    "scaling",
    [
        *("linear", [2.0], 2, True, {"type": "ntk", "factor": 2.0}, {"factor": 2.0}),
        *({"type": "linear"}, {"rope_type": "dynamic", "factor": "2"}, {"type": ["linear"]}),
        *({"rope_type": "llama3", "factor": 8.0}, {"type": "longrope", "short_factor": [1.0]}),
    ],
)
def test_a_rope_scaling_that_no_transformers_loads(
    workshop: Workshop, scaling: object, format_name: str
) -> None:
    llm = workshop.llm(LLAMA, rope_scaling=scaling)
    (fault,) = workshop.faults(LLAMA, llm=llm, format=format_name)
    assert "rope_scaling" in fault


@pytest.mark.parametrize(
    "scaling",
    [
        *({}, {"rope_type": "default"}, {"type": "dynamic", "factor": 2}),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ],
)
def test_a_rope_scaling_that_transformers_loads(
    workshop: Workshop, scaling: dict[str, Any]
) -> None:
    made = workshop.plan(LLAMA, llm=workshop.llm(LLAMA, rope_scaling=scaling), format="hf")
    written: Any = made.config["text_config"]
    assert (written["rope_scaling"] or {}).get("factor") == scaling.get("factor")


@pytest.mark.parametrize("window", ["4096", 4096.5, [4096]])
def test_a_key_that_may_be_null_has_its_kind(workshop: Workshop, window: object) -> None:
    plain = Catalogue.shipped().classes["mixtral"]
    sizes = dict.fromkeys(plain.config.required, 8)
    assert plain.complete({**sizes, "sliding_window": None})[1] == []
    assert plain.complete({**sizes, "sliding_window": 4096.0})[1] == []
    (fault,) = plain.complete({**sizes, "sliding_window": window})[1]
    assert "`sliding_window` is" in fault.what
    assert fault.what.endswith("expected a whole number")


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "int8"), ("model_type", "llama"), ("weights", "none")],
)
def test_values_that_do_not_exist(workshop: Workshop, option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"is '{value}', expected one of"):
        workshop.plan(QWEN, **{option: value})


def test_the_plain_model_type(workshop: Workshop) -> None:
    assert workshop.plan(QWEN).config["model_type"] == "llava_qwen"
    assert workshop.plan(QWEN, model_type="llava").config["model_type"] == "llava"
    assert workshop.plan(QWEN, model_type="llava", format="hf").config["model_type"] == "llava"
