"""The official LLaVA, in an environment of its own, loads what the converter writes.

LLaVA's loader forces float16, so its logits are within float16 arithmetic of XTuner's; its class,
loaded in float32, is within float32 rounding. LLaVA has no Qwen class: what LLaVA-NeXT's class does
is composed from the parts that it uses, under the same transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from acceptance.environments import run_llava
from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from reference.cases import Converted
from reference.exchange import write_exchanged
from reference.seen import Seen
from reference.trained import write_reference
from xtuner2llava import convert

pytestmark = pytest.mark.acceptance

FLOAT16, FLOAT32 = 5e-3, 1e-5
LLAMA = ("llama_b_full_frozenvis", "llama_d_lora_vislora", "llama_e_full_fullvis")
QWEN = ("qwen2_a_pretrain", "qwen2_d_lora_vislora", "qwen2_e_full_fullvis", "qwen2_f_zero2_full")

Job = tuple[Path, str | Path, str]  # folder, case or folder of its reference.npz, how


def run_logits(python: Path, checkpoints: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    return run_llava(
        python,
        checkpoints,
        [
            {"folder": folder, "reference": f"{case}/reference.npz", "how": how}
            for folder, case, how in jobs
        ],
    )


@pytest.fixture(scope="module")
def loaded(
    llava_python: Path, checkpoints: Path, converted: Converted
) -> dict[tuple[str, str], dict[str, Any]]:
    """The results for all cases, by case and precision."""
    jobs = [
        (converted(case, dtype=dtype), case, f"{how} {dtype}")
        for cases, how in ((LLAMA, "official"), (QWEN, "qwen"))
        for case in cases
        for dtype in ("float16", "float32")
    ]
    results = run_logits(llava_python, checkpoints, jobs)
    return {
        (case, how.split()[1]): result for (_, case, how), result in zip(jobs, results, strict=True)
    }


@pytest.mark.parametrize("case", (*LLAMA, *QWEN))
def test_logits_are_xtuners(
    loaded: dict[tuple[str, str], dict[str, Any]], converted: Converted, seen: Seen, case: str
) -> None:
    best = "logits_master32" if "zero" in case else "logits_f32"
    for dtype, tolerance in (("float16", FLOAT16), ("float32", FLOAT32)):
        result = loaded[case, dtype]
        assert "error" not in result, result["error"]
        expected = "LlavaLlamaForCausalLM" if case in LLAMA else "Qwen2ForCausalLM"
        assert result["class"] == expected
        assert result["differences"][best] < tolerance, dtype
    if case in LLAMA:
        seen.ran("llava", "1.2.2", converted(case, dtype="float32"))


@pytest.mark.parametrize("case", (*LLAMA, *QWEN))
def test_it_generates(loaded: dict[tuple[str, str], dict[str, Any]], case: str) -> None:
    generated = loaded[case, "float32"]["generated"]
    bos = 1 if case in LLAMA else 361
    # Before transformers 4.38, ids generated from embeddings start with the bos token.
    assert generated[0] == bos
    assert len(generated) > 1


# Mistral: a random one, and the reference composed here.


MISTRAL: dict[str, dict[str, Any]] = {
    "whole": {"sliding_window": None, "num_key_value_heads": 2},
    "window": {"sliding_window": 8},
}
TOKENS = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def mistrals(
    llava_python: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """The results for Mistrals without and with a window, by case and how they were loaded."""
    import numpy
    import torch

    jobs: dict[tuple[str, str], Job] = {}
    for case, change in MISTRAL.items():
        folder = tmp_path_factory.mktemp(case)
        source = KINDS["mistral"].make(folder / "m", **TOKENS, **change)
        # Logits of the size of the real checkpoints', or a bit smaller; exact, as it is 1/4.
        with torch.no_grad():
            for head in (source.tensors["lm_head.weight"], source.model.lm_head.weight):
                head.mul_(0.25)
        trained = write_trained(folder / "trained", source, checkpoints)
        # This one is of a tokenizers that is newer than LLaVA's, which takes tokenizer.model then.
        (trained.llm / "tokenizer.json").unlink()
        write_reference(source, trained, numpy.array([[1, 300, 21, -200, 55, 131, 380, 7]]))
        bases = {**trained.bases, "vision_tower_name": "bases/vision_clip"}
        home = trained.checkpoint.parent
        for dtype in ("float16", "float32"):
            out = folder / f"llava-mistral-{dtype}"
            convert(trained.checkpoint, out, dtype=dtype, **bases)
            jobs[case, dtype] = (out, home, f"official {dtype}")
        jobs[case, "eager"] = (out, home, "official eager")
        exchanged = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
        wrong = write_exchanged(out, folder / "llava-mistral-wrong", exchanged)
        jobs[case, "wrong"] = (wrong, home, "official float16")
        other = folder / "llava-named-otherwise"
        shutil.copytree(out, other)
        jobs[case, "named otherwise"] = (other, home, "official float16")
    results = run_logits(llava_python, checkpoints, [*jobs.values()])
    for key, result in zip(jobs, results, strict=True):
        assert "error" not in result, (key, result["error"])
    return {
        key: {**result, "folder": folder}
        for (key, (folder, *_)), result in zip(jobs.items(), results, strict=True)
    }


def test_a_mistral_is_loaded_as_one(
    mistrals: dict[tuple[str, str], dict[str, Any]], seen: Seen
) -> None:
    for how, tolerance in (("float16", FLOAT16), ("float32", FLOAT32), ("eager", FLOAT32)):
        result = mistrals["whole", how]
        assert result["class"] == "LlavaMistralForCausalLM"
        assert result["differences"]["logits_f32"] < tolerance, how
        assert result["generated"][0] == 1
        assert len(result["generated"]) > 1
    assert mistrals["whole", "wrong"]["differences"]["logits_f32"] > 10 * FLOAT16
    # The folder's name is what its loader goes by.
    assert mistrals["whole", "named otherwise"]["class"] == "LlavaLlamaForCausalLM"
    seen.ran("llava", "1.2.2", mistrals["whole", "float32"]["folder"])


def test_a_window_is_there_for_attention_that_heeds_it(
    mistrals: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """The caveat of mistral.yaml: by default, Mistral of transformers 4.37.2 has no window."""
    assert mistrals["window", "eager"]["class"] == "LlavaMistralForCausalLM"
    assert mistrals["window", "eager"]["differences"]["logits_f32"] < FLOAT32
    assert mistrals["window", "float32"]["differences"]["logits_f32"] > 1e-2


def test_a_sharded_folder_is_loaded_whole(
    llava_python: Path, checkpoints: Path, converted: Converted
) -> None:
    case = "llama_e_full_fullvis"
    folder = converted(case, dtype="float16", max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (result,) = run_logits(llava_python, checkpoints, [(folder, case, "official float16")])
    assert result["differences"]["logits_f32"] < FLOAT16


def test_gate_and_up_exchanged_is_seen(
    llava_python: Path, checkpoints: Path, converted: Converted, tmp_path: Path
) -> None:
    case = "llama_e_full_fullvis"
    wrong = write_exchanged(
        converted(case, dtype="float32"),
        tmp_path / "llava-llama-wrong",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    )
    (result,) = run_logits(llava_python, checkpoints, [(wrong, case, "official float16")])
    assert result["differences"]["logits_f32"] > 10 * FLOAT16


def test_a_qwen_without_bos_token_id_would_not_generate(
    llava_python: Path, checkpoints: Path, converted: Converted, tmp_path: Path
) -> None:
    case = "qwen2_e_full_fullvis"
    folder = tmp_path / "llava-qwen-without-bos"
    shutil.copytree(converted(case, dtype="float32"), folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        assert content.pop("bos_token_id") == 361
        (folder / name).write_text(json.dumps(content))
    (result,) = run_logits(llava_python, checkpoints, [(folder, case, "qwen float32")])
    assert "`bos_token_id` has to be defined" in result["error"]
