"""The verdict on each target: exact, exact up to a length, near, or not possible; as data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from builders.families.checkpoints import Trained, write_trained
from builders.families.models import KINDS
from command import run
from reference.cases import CASES
from xtuner2llava import Inspection, inspect, plan
from xtuner2llava.errors import MappingError
from xtuner2llava.inspection.inspection import TargetFormat
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.caveats import Limit
from xtuner2llava.planning.plan import Fidelity

CATALOGUE = Catalogue.shipped()


def limit(tokens: int | None = None, transformers: str | None = None) -> Limit:
    return Limit("text", tokens, transformers)


@pytest.mark.parametrize(
    ("limits", "other", "expected", "text"),
    [
        ([], {}, Fidelity("exact"), "exact"),
        ([limit(9), limit(7), limit(8)], {}, Fidelity("exact_up_to", 7), "exact up to 7 tokens"),
        (
            [limit(None, ">=4.45")],
            {},
            Fidelity("exact", None, (">=4.45",)),
            "exact with transformers >=4.45",
        ),
        (
            [limit(7), limit(9, ">=4.45"), limit(None, ">=4.45"), limit(None, "<5.4")],
            {},
            Fidelity("exact_up_to", 7, (">=4.45", "<5.4")),
            "exact up to 7 tokens with transformers >=4.45, <5.4",
        ),
        (
            [Limit.unproven("a.yaml"), limit(7, ">=4.45")],
            {},
            Fidelity("exact_if_right", 7, (">=4.45",), "a.yaml"),
            "exact up to 7 tokens with transformers >=4.45 if a.yaml is right; its logits were "
            "not compared",
        ),
        ([Limit.unproven("a.yaml"), limit()], {}, Fidelity("not_exact"), "possible, not exact"),
        ([limit(7), limit()], {}, Fidelity("not_exact"), "possible, not exact"),
        ([limit(7)], {"inexact": ["why"]}, Fidelity("not_exact"), "possible, not exact"),
    ],
)
def test_the_narrowest_limit_counts(
    limits: list[Limit], other: dict[str, Any], expected: Fidelity, text: str
) -> None:
    verdict = Fidelity.of(limits, **other)
    assert verdict == expected
    assert str(verdict) == text
    assert verdict.is_possible


def test_what_is_at_fault_is_not_possible() -> None:
    verdict = Fidelity("not_possible")
    assert str(verdict) == "not possible, because"
    assert not verdict.is_possible


def test_every_shipped_caveat_has_its_limit_as_data() -> None:
    caveats = [c for family in CATALOGUE.families.values() for c in family.caveats]
    for format_ in CATALOGUE.formats.values():
        caveats += [c for described in format_.classes.values() for c in described.caveats]
    assert len(caveats) > 8
    without = [c.where for c in caveats if c.exact_up_to is None and c.transformers is None]
    assert without == []


def own_family(tmp_path: Path, caveat: str) -> Any:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: 1\nfamily: mine\nextends: llama\ndims: {half: hidden_size // 2}\n"
        f"caveats:\n  - say: It differs.\n{caveat}"
    )
    return CATALOGUE.with_family_file(path)


def test_a_limit_is_computed_from_the_config(tmp_path: Path) -> None:
    family = own_family(tmp_path, "    exact_up_to: min(half, longest)\n")
    own = Limit.unproven("mine.yaml")
    assert family.limits({"hidden_size": 64, "longest": 40}) == [own, Limit("It differs.", 32)]
    assert family.limits({"hidden_size": 64, "longest": 4}) == [own, Limit("It differs.", 4)]


@pytest.mark.parametrize(
    ("longest", "what"),
    [(0, "`exact_up_to` is 0"), (None, "null"), ("9", "'9'"), (-5, "-5"), (0.5, "0.5")],
)
def test_a_limit_that_is_no_length_is_a_fault(tmp_path: Path, longest: object, what: str) -> None:
    family = own_family(tmp_path, "    exact_up_to: longest\n")
    with pytest.raises(MappingError) as error:
        family.limits({"hidden_size": 64, "longest": longest})
    assert what in error.value.faults[0].what
    assert error.value.faults[0].where.startswith("mine.yaml:")


def test_a_caveat_without_a_limit_leaves_nothing_exact(tmp_path: Path) -> None:
    limits = own_family(tmp_path, "").limits({"hidden_size": 64})
    assert Fidelity.of(limits) == Fidelity("not_exact")


# Of whole checkpoints


def trained(tmp_path: Path, checkpoints: Path, kind: str, **change: Any) -> Trained:
    import transformers

    if KINDS[kind].shapes is None and not hasattr(transformers, KINDS[kind].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    source = KINDS[kind].make(tmp_path / "source", **change)
    return write_trained(tmp_path / "trained", source, checkpoints)


def look(made: Trained) -> dict[str, TargetFormat]:
    inspection: Inspection = inspect(made.checkpoint, **made.bases)
    return {target.format: target for target in inspection.targets}


@pytest.mark.parametrize(
    ("kind", "change", "llava", "hf"),
    [
        ("llama", {}, Fidelity("exact"), Fidelity("exact")),
        ("qwen", {}, Fidelity("exact_up_to", 256), Fidelity("exact_up_to", 256)),
        ("qwen_early", {}, Fidelity("exact_up_to", 256), Fidelity("exact_up_to", 256)),
        ("internlm", {}, Fidelity("exact_up_to", 256), Fidelity("exact_up_to", 256)),
        ("internlm2", {}, Fidelity("exact"), Fidelity("exact")),
        ("internlm2_early", {}, Fidelity("exact_up_to", 256), Fidelity("exact_up_to", 256)),
        ("phi3", {}, Fidelity("exact_up_to", 100), Fidelity("exact_up_to", 100)),
        ("phi3", {"sliding_window": None}, Fidelity("exact"), Fidelity("exact")),
        ("baichuan2", {}, Fidelity("exact"), Fidelity("exact")),
        ("mistral", {}, Fidelity("exact_up_to", 8), Fidelity("exact_up_to", 8)),
        ("qwen3", {}, Fidelity("not_possible"), Fidelity("exact", None, (">=4.51",))),
        ("llama_3_1", {}, Fidelity("not_possible"), Fidelity("exact")),
        ("gemma", {}, Fidelity("not_possible"), Fidelity("exact", None, (">=4.38, <5.4",))),
        (
            "qwen2",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            Fidelity("not_possible"),
            Fidelity("exact", None, (">=4.45",)),
        ),
        (
            "mistral",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            Fidelity("not_possible"),
            Fidelity("exact_up_to", 8, (">=4.48",)),
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            Fidelity("exact"),
            Fidelity("exact"),
        ),
    ],
)
def test_the_verdict_on_a_checkpoint(
    checkpoints: Path,
    tmp_path: Path,
    kind: str,
    change: dict[str, Any],
    llava: Fidelity,
    hf: Fidelity,
) -> None:
    found = look(trained(tmp_path, checkpoints, kind, **change))
    assert (found["llava"].fidelity, found["hf"].fidelity) == (llava, hf)
    for target in found.values():
        assert bool(target.faults) is (target.fidelity.kind == "not_possible")
        said = " ".join(target.caveats)
        if target.fidelity.tokens is not None:
            assert f"{target.fidelity.tokens} tokens" in said
        for versions in target.fidelity.transformers:
            assert versions.split(",")[0].removeprefix(">=") in said


def test_a_scaled_qwen_is_told_which_transformers_reads_it(
    checkpoints: Path, tmp_path: Path
) -> None:
    made = trained(tmp_path, checkpoints, "qwen2", rope_scaling={"type": "linear", "factor": 2.0})
    notes = plan(made.checkpoint, format="hf", **made.bases).notes
    assert any(
        note.startswith("Qwen2 reads rope_scaling from transformers 4.45 on") for note in notes
    )


def test_an_llm_without_target_is_refused_for_each(checkpoints: Path, tmp_path: Path) -> None:
    made = trained(tmp_path, checkpoints, "llama")
    config = json.loads((made.llm / "config.json").read_text())
    config |= {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
    (made.llm / "config.json").write_text(json.dumps(config))
    for target in look(made).values():
        assert target.fidelity == Fidelity("not_possible")
        assert "ChatGLM and GLM-4 rotate half of each head" in str(target.faults[0])
        assert "Train again on" in str(target.faults[0])


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("llama_d_lora_vislora", "The LLM was trained as QLoRA"),
        ("qwen2_a_pretrain", "The LLM was quantised in training"),
    ],
)
def test_an_llm_that_training_quantised_is_near_and_not_exact(
    checkpoints: Path, tmp_path: Path, case: str, sentence: str
) -> None:
    config = (checkpoints / case / "config.py").read_text()
    place = "pretrained_model_name_or_path=llm_name_or_path,\n        trust_remote_code=True)"
    assert config.count(place) == 1
    quantised = tmp_path / "quantised.py"
    quantised.write_text(
        config.replace(place, f"{place[:-1]}, quantization_config=dict(load_in_4bit=True))")
    )
    made = CASES[case]
    bases = {"llm": checkpoints / made.llm, "vision": checkpoints / made.vision}
    for given, kind in ((None, "exact"), (quantised, "not_exact")):
        found = inspect(checkpoints / case / "iter_2.pth", xtuner_config=given, **bases)
        assert {target.fidelity.kind for target in found.targets} == {kind}
        for target in found.targets:
            found = [caveat for caveat in target.caveats if caveat.startswith(sentence)]
            assert len(found) == (given is not None)


@pytest.mark.parametrize(
    ("change", "llava", "hf"),
    [
        ({}, "exact", "exact"),
        ({"use_sliding_window": True, "sliding_window": 50}, "exact_up_to", "exact_up_to"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "not_possible", "exact"),
        ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, *["not_possible"] * 2),
    ],
)
def test_weights_that_a_conversion_downloads_make_nothing_impossible(
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    llava: str,
    hf: str,
) -> None:
    cached = tmp_path / "cached"
    shutil.copytree(checkpoints / "bases/llm_qwen2", cached)
    (cached / "model.safetensors").unlink()
    config = json.loads((cached / "config.json").read_text())
    (cached / "config.json").write_text(json.dumps({**config, **change}))
    monkeypatch.setattr(
        "xtuner2llava.sources.base_model.fetch_model", lambda reference, *, weights: cached
    )
    vision = checkpoints / "bases/vision_clip"
    case = checkpoints / "qwen2_a_pretrain/iter_2.pth"
    found = {t.format: t for t in inspect(case, llm="owner/llm", vision=vision).targets}
    assert (found["llava"].fidelity.kind, found["hf"].fidelity.kind) == (llava, hf)
    for target in found.values():
        is_pending = "By the configs alone" in " ".join(target.caveats)
        assert is_pending is (target.fidelity.kind != "not_possible")
        assert "not in the local cache" not in " ".join(str(fault) for fault in target.faults)


def test_the_command_line_says_it_in_words_and_as_data(checkpoints: Path, tmp_path: Path) -> None:
    made = trained(tmp_path, checkpoints, "phi3")
    command = ["inspect", made.checkpoint, "--llm", made.llm, "--vision", made.vision]
    command += ["--vision-tower-name", "openai/clip"]
    said = run(*command)
    assert "\nllava: exact up to 100 tokens, as LlavaLlamaForCausalLM\n" in said.stdout
    found = run(*command, "--json")
    assert (said.returncode, found.returncode) == (0, 0)
    targets = json.loads(found.stdout)["targets"]
    assert [(t["verdict"], t["exact_up_to"], t["transformers"]) for t in targets] == [
        ("exact_up_to", 100, [])
    ] * 2


def test_a_mapping_of_the_users_own_has_its_say(checkpoints: Path, tmp_path: Path) -> None:
    made = trained(tmp_path, checkpoints, "llama")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: 1\nfamily: mine\nextends: llama\n"
        "caveats: [{say: It differs., exact_up_to: max_position_embeddings // 2}]\n"
    )
    found = inspect(made.checkpoint, mapping=path, **made.bases)
    for target in found.targets:
        assert target.fidelity == Fidelity("exact_if_right", 128, if_right="mine.yaml")
        assert str(target.fidelity).startswith("exact up to 128 tokens if mine.yaml is right; its ")
        assert "It differs." in target.caveats
    assert {target.fidelity for target in look(made).values()} == {Fidelity("exact")}


def test_a_plan_has_it_too(checkpoints: Path, tmp_path: Path) -> None:
    made = trained(tmp_path, checkpoints, "phi3")
    data = plan(made.checkpoint, **made.bases).to_dict()
    assert (data["verdict"], data["exact_up_to"]) == ("exact_up_to", 100)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in made.bases.items()]
    said = run("plan", made.checkpoint, *options)
    assert said.returncode == 0
    words = said.stdout
    assert "\nphi3 → llava: LlavaLlamaForCausalLM, exact up to 100 tokens, dtype float32\n" in words
