"""`--for PROGRAM` sets what that program reads, and refuses what it does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from reference.cases import CASES
from xtuner2llava import PlanError, UsageError, convert, plan
from xtuner2llava.metadata.report import next_steps
from xtuner2llava.options import PROGRAMS, Options, ProgramName, flag


def made(checkpoints: Path, case: str, **options: Any) -> Any:
    given = CASES[case].options(checkpoints)
    return plan(checkpoints / case / "iter_2.pth", **given, **options)


def test_the_programs_of_the_option_are_known() -> None:
    assert get_args(ProgramName) == (*PROGRAMS,)
    assert flag("for_") == "--for"


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_sets_format_and_model_type(name: Any) -> None:
    options = Options(for_=name)
    program = PROGRAMS[name]
    assert (options.format, options.model_type) == (program.format, program.model_type)


@pytest.mark.parametrize(
    ("name", "other", "named"),
    [
        ("llava", {"format": "hf"}, "format: is 'hf', and LLaVA reads 'llava'"),
        ("vllm", {"model_type": "llava"}, "model_type: is 'llava', and vLLM reads 'official'"),
        ("unknown", {}, "for_: is 'unknown', expected one of llava, llava-next"),
    ],
)
def test_what_contradicts_it_is_refused(
    checkpoints: Path, name: str, other: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as error:
        made(checkpoints, "qwen2_e_full_fullvis", for_=name, **other)
    assert named in str(error.value)


def test_an_llm_that_a_program_does_not_have_is_refused(checkpoints: Path) -> None:
    with pytest.raises(PlanError) as error:
        made(checkpoints, "qwen2_e_full_fullvis", for_="llava")
    (fault,) = error.value.faults
    assert (fault.where, fault.what) == (
        "for_",
        "LLaVA has no class for Qwen2ForCausalLM, which this LLM becomes",
    )
    assert "llava-next" in fault.advice
    assert made(checkpoints, "llama_e_full_fullvis", for_="llava").architecture == (
        "LlavaLlamaForCausalLM"
    )


def test_the_output_does_not_depend_on_how_it_was_asked_for(
    checkpoints: Path, tmp_path: Path
) -> None:
    case = "qwen2_e_full_fullvis"
    given = CASES[case].options(checkpoints)
    folders = {}
    for name, options in (("a", {"for_": "sglang"}), ("b", {"model_type": "llava"})):
        folders[name] = tmp_path / name / "llava-qwen"
        convert(checkpoints / case / "iter_2.pth", folders[name], **given, **options)  # type: ignore[arg-type]
    for path in folders["a"].iterdir():
        assert path.read_bytes() == (folders["b"] / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sglang", "with SGLang: python -m sglang.launch_server --model-path 'my out'"),
        ("llava-next", "with LLaVA-NeXT:"),
        ("vllm", "with vLLM: vllm serve 'my out'"),
        ("lmdeploy", "with LMDeploy: lmdeploy serve api_server 'my out'"),
        ("transformers", "with transformers:"),
    ],
)
def test_the_next_step_is_for_what_was_asked(checkpoints: Path, name: str, said: str) -> None:
    (step,) = next_steps(made(checkpoints, "qwen2_e_full_fullvis", for_=name), "my out", name)
    assert said in step


def test_the_families_that_a_card_names_were_seen() -> None:
    results = Path(__file__).parents[1] / "consumers/results.jsonl"
    seen = [json.loads(line) for line in results.read_text().splitlines()]
    vllm = [result for result in seen if result.get("program") == "vllm"]
    ran = {r["family"] for r in vllm if r["outcome"] == "ran" and not r.get("note")}
    assert PROGRAMS["vllm"].seen == ran


def test_the_table_of_programs_is_made_of_the_results(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = [sys.executable, root / "scripts/programs.py", "--check"]
    assert subprocess.run(script, check=False).returncode == 0
    page = tmp_path / "page.md"
    text = (root / "docs/compatibility.md").read_text()
    page.write_text(text.replace("| no class |", "| |", 1))
    assert subprocess.run([*script, "--page", page], check=False).returncode == 1
