"""Every family in the Hugging Face format: tied heads, rotary scaling, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from builders.families.checkpoints import Trained, write_trained
from builders.families.formulas import Formula
from builders.families.models import KINDS, Source
from reference import huggingface
from reference.compose import read_tensors
from reference.measured import Measured
from reference.trained import compose_trained
from xtuner2llava import PlanError, convert, plan
from xtuner2llava.mapping.catalogue import Catalogue

SAME = 1e-5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama_linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama_3_1": ("llama_3_1", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    # What transformers 4.37 does not read: the hidden size is 64, for 4 heads.
    "llama_head_dim": ("llama", {"head_dim": 24, "num_key_value_heads": 2}),
    "llama_mlp_bias": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "mistral_head_dim": ("mistral", {"head_dim": 8, "sliding_window": None}),
    "mixtral_head_dim": ("mixtral", {"head_dim": 24}),
    "qwen2_head_dim": ("qwen2", {"head_dim": 24, "tie_word_embeddings": True}),
}
# Families that become one of these classes by rules of their own.
CASES |= {kind: (kind, {}) for kind in KINDS if kind not in {known for known, _ in CASES.values()}}


def make(case: str, folder: Path, checkpoints: Path) -> tuple[Source, Trained]:
    import transformers

    kind, change = CASES[case]
    own_code = KINDS[kind].forward is not None
    if not own_code and not hasattr(transformers, KINDS[kind].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    source = KINDS[kind].make(folder / "source", **change)
    return source, write_trained(folder / "trained", source, checkpoints)


class Family:
    """A source, trained and converted: not to be written to."""

    def __init__(self, case: str, folder: Path, checkpoints: Path) -> None:
        self.source, self.trained = make(case, folder, checkpoints)
        self.out = folder / "out"
        convert(
            self.trained.checkpoint, self.out, format="hf", dtype="float32", **self.trained.bases
        )
        self.model = huggingface.load(self.out)


@pytest.fixture(scope="module")
def family(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return cache(lambda case: Family(case, tmp_path_factory.mktemp(case), checkpoints))


@pytest.mark.parametrize("case", CASES)
def test_the_language_model_computes_what_it_did(
    family: Callable[[str], Family], measured: Measured, case: str
) -> None:
    import torch

    made = family(case)
    source, out, model = made.source, made.out, made.model
    ids = torch.randint(3, 380, (1, 60), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        if isinstance(source.model, Formula):
            expected = source.model(source.model.get_input_embeddings()(ids)).logits
        else:
            expected = source.model(input_ids=ids, attention_mask=mask).logits
        found = model(input_ids=ids, attention_mask=mask).logits
    assert expected.abs().max() > 0.5
    difference = (found[..., : expected.shape[-1]] - expected).abs().max().item()
    assert difference < SAME
    tied = source.config.get("tie_word_embeddings", case == "gemma")
    assert ("language_model.lm_head.weight" in read_tensors(out)) != tied
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == tied
    measured.exact(out, difference)


def test_every_family_and_every_class_are_tried() -> None:
    catalogue = Catalogue.shipped()
    tried = {kind if kind in catalogue.families else KINDS[kind].model_type
             for kind, _ in CASES.values()}  # fmt: skip
    assert tried == set(catalogue.families)
    becomes = {catalogue.families[name].target_class.name for name in tried}
    assert set(catalogue.formats["hf"].classes) == becomes


def test_a_tied_head_needs_the_config_to_say_so(checkpoints: Path, tmp_path: Path) -> None:
    _, trained = make("qwen2_tied", tmp_path, checkpoints)
    out = tmp_path / "out"
    convert(trained.checkpoint, out, format="hf", dtype="float32", **trained.bases)
    config = json.loads((out / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="lm_head"):
        huggingface.load(out)


@pytest.mark.parametrize(
    ("case", "key", "versions"),
    [
        ("llama_head_dim", "head_dim", ">=4.45"),
        ("llama_mlp_bias", "mlp_bias", ">=4.41"),
        ("mistral_head_dim", "head_dim", ">=4.43"),
        ("mixtral_head_dim", "head_dim", ">=4.47"),
        ("qwen2_head_dim", "head_dim", ">=4.48"),
    ],
)
def test_what_only_later_versions_read_is_for_hf_with_these_versions(
    checkpoints: Path, tmp_path: Path, case: str, key: str, versions: str
) -> None:
    source, trained = make(case, tmp_path, checkpoints)
    made = plan(trained.checkpoint, format="hf", **trained.bases)
    assert (made.fidelity.kind, made.fidelity.transformers) == ("exact", (versions,))
    assert made.config["text_config"][key] == source.config[key]  # type: ignore[index, call-overload]
    assert sum(note.endswith("this model.") or "MLP" in note for note in made.notes) == 1
    with pytest.raises(PlanError, match=r"of transformers 4\.37\.2 has .*the format hf supports"):
        plan(trained.checkpoint, **trained.bases)
    # Without the key the same tensors are refused in every format.
    config = json.loads((trained.bases["llm"] / "config.json").read_text())
    del config[key]
    (trained.bases["llm"] / "config.json").write_text(json.dumps(config))
    assert "self_attn.q_proj" in faults_of(trained) or "mlp.gate_proj.bias" in faults_of(trained)


# What it cannot hold


def faults_of(trained: Trained, **options: Any) -> str:
    with pytest.raises(PlanError) as error:
        plan(trained.checkpoint, format="hf", **{**trained.bases, **options})
    return str(error.value)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_projector_of_another_depth_is_refused(
    checkpoints: Path, tmp_path: Path, depth: int
) -> None:
    import torch

    _, trained = make("llama", tmp_path, checkpoints)
    saved = torch.load(trained.checkpoint)
    state = saved["state_dict"]
    if depth == 1:
        del state["projector.model.2.weight"], state["projector.model.2.bias"]
    else:
        state["projector.model.4.weight"] = torch.zeros(64, 64)
        state["projector.model.4.bias"] = torch.zeros(64)
    torch.save(saved, trained.checkpoint)
    assert f"has a projector of two layers, linear_1 and linear_2, and this one has {depth}" in (
        faults_of(trained)
    )
    made = plan(trained.checkpoint, **trained.bases)
    assert made.config["mm_projector_type"] == f"mlp{depth}x_gelu"


def test_the_tower_cannot_be_left_out(checkpoints: Path, tmp_path: Path) -> None:
    _, trained = make("llama", tmp_path, checkpoints)
    assert "the vision tower is a part of LlavaForConditionalGeneration" in faults_of(
        trained, include_vision_tower=False
    )


def test_no_name_of_the_tower_is_needed(checkpoints: Path, tmp_path: Path) -> None:
    _, trained = make("llama", tmp_path, checkpoints)
    bases = {**trained.bases, "vision_tower_name": None, "vision": trained.vision.resolve()}
    made = plan(trained.checkpoint, format="hf", **bases)
    assert not any("mm_vision_tower is" in note for note in made.notes)


def test_what_to_do_about_padded_images_is_said(checkpoints: Path, tmp_path: Path) -> None:
    _, trained = make("llama", tmp_path, checkpoints)
    notes = plan(trained.checkpoint, format="hf", **trained.bases).notes
    assert any(note.startswith("Training padded images to squares") for note in notes)
    assert any("LlavaImageProcessor" in note and "transformers 4.49" in note for note in notes)
    official = plan(trained.checkpoint, **trained.bases).notes
    assert not any("Training padded" in note for note in official)


# With an image


def difference_with_an_image(source: Source, trained: Trained, model: Any) -> float:
    import numpy
    import torch

    ids = numpy.array([[7, 300, 21, -200, 55, 131, 309, 2]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(2)).numpy()
    reference = compose_trained(source, trained)
    expected = reference.logits(ids, pixels)
    found = huggingface.logits(model, ids, pixels)
    assert len(expected) == len(found) == 7 + 16  # the image's patches are in it
    assert expected.abs().max() > 0.5
    # The image counts: another one gives other logits.
    assert (reference.logits(ids, -pixels) - expected).abs().max() > 1e-2
    return float((found[:, : expected.shape[1]] - expected).abs().max())


@pytest.mark.parametrize("case", [case for case in CASES if case != "gemma"])
def test_an_image_counts_as_it_did(family: Callable[[str], Family], case: str) -> None:
    if not huggingface.expands_image_tokens():
        pytest.skip("before 4.45 logits have other places")
    made = family(case)
    assert difference_with_an_image(made.source, made.trained, made.model) < SAME


def test_gemma_sees_images_as_its_verdict_says(family: Callable[[str], Family]) -> None:
    """From 5.4 on images are too weak in LlavaForConditionalGeneration, and the verdict says so."""
    import transformers

    if not huggingface.expands_image_tokens():
        pytest.skip("before 4.45 logits have other places")
    made = family("gemma")
    verdict = plan(made.trained.checkpoint, format="hf", **made.trained.bases).fidelity
    (versions,) = verdict.transformers
    difference = difference_with_an_image(made.source, made.trained, made.model)
    if SpecifierSet(versions).contains(transformers.__version__, prereleases=True):
        assert difference < SAME
    else:
        assert difference > 1e-2


def test_a_wrong_projector_is_seen_with_an_image(checkpoints: Path, tmp_path: Path) -> None:
    if not huggingface.expands_image_tokens():
        pytest.skip("before 4.45 logits have other places")
    import torch

    source, trained = make("llama", tmp_path, checkpoints)
    out = tmp_path / "out"
    convert(trained.checkpoint, out, format="hf", dtype="float32", **trained.bases)
    saved = torch.load(trained.checkpoint)
    saved["state_dict"]["projector.model.2.weight"] *= -1
    torch.save(saved, trained.checkpoint)
    assert difference_with_an_image(source, trained, huggingface.load(out)) > 1e-2
