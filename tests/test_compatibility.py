"""The tables of docs/compatibility.md say of every family and every refusal what the mappings say.

The figures are of `scripts/matrix.py`, which runs the tests that measure them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reference.measured import Measured
from xtuner2llava.mapping.catalogue import Catalogue

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
CATALOGUE = Catalogue(ROOT / "mappings")
FAMILY = re.compile(r"\| \[(\w+)\]\(\.\./mappings/families/(\w+)\.yaml\) \| (.+) \|")
EXACT = re.compile(r"exact, (0|≤ [1-9]e-\d+)")


def faults(page: str) -> Iterator[str]:
    """Where the text says something else than the mappings, read without the script."""
    rows = [match for match in map(FAMILY.fullmatch, page.splitlines()) if match]
    if [row[1] for row in rows] != [*CATALOGUE.families]:
        yield "other families"
    for row in rows:
        name, (architectures, llava, hf, _) = row[1], row[3].split(" | ")
        if row[2] != name or name not in CATALOGUE.families:
            yield f"{name}: no such family"
            continue
        family = CATALOGUE.families[name]
        if architectures != ", ".join(f"`{a}`" for a in family.match.architectures):
            yield f"{name}: other architectures"
        for format_, cell in (("llava", llava), ("hf", hf)):
            can = family.target_class.name in CATALOGUE.formats[format_].classes
            if not (EXACT.fullmatch(cell) if can else cell == "refused"):
                yield f"{name}: {cell} in {format_}"
    table = page.partition("| refused | in | because |\n")[2].partition("<!--")[0]
    reasons = [line.split(" | ")[-1].removesuffix(" |") for line in table.splitlines()[1:]]
    every = [refusal.because.text for refusal in CATALOGUE.refusals.llms]
    every += [requirement.because.text for requirement in requirements("llava")]
    every += [fault.what for fault in CATALOGUE.formats["llava"].refused.values()]
    if [words(text) for text in reasons] != [words(text) for text in every]:
        yield "other refusals"


def requirements(format_: str) -> list[Any]:
    return [r for c in CATALOGUE.formats[format_].classes.values() for r in c.requirements]


def words(sentence: str) -> str:
    """Without what stands for values of a config."""
    return re.sub(r" \(\{.+?\}\)|[{}`\n]|(?<=rope_scaling) \{rope_scaling\}", "", sentence)


def test_it_says_what_the_mappings_say() -> None:
    assert list(faults(PAGE)) == []


def row(of: str) -> str:
    (found,) = [line for line in PAGE.splitlines(keepends=True) if line.startswith(f"| [{of}]")]
    return found


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (row("yi"), "", "other families"),
        (row("yi"), row("yi") * 2, "other families"),
        (row("yi"), row("yi").replace("yi", "zi"), "zi: no such family"),
        (row("yi"), EXACT.sub("refused", row("yi")), "yi: refused in llava"),
        (row("gemma"), row("gemma").replace("refused", "exact, 0"), "gemma: exact, 0 in llava"),
        (row("gemma"), EXACT.sub("exact", row("gemma")), "gemma: exact in hf"),
        ("`YiForCausalLM`", "`LlamaForCausalLM`", "yi: other architectures"),
        ("MiniCPM 3 has multi-head latent attention", "MiniCPM 3 is fine", "other refusals"),
        ("Qwen 3 has norms on q and k", "Qwen 3 is fine", "other refusals"),
        ("(Llama 3.1 and later)", "(Llama 4)", "other refusals"),
    ],
)
def test_what_it_should_not_say_is_seen(old: str, new: str, fault: str) -> None:
    assert old in PAGE
    assert fault in faults(PAGE.replace(old, new))


# The script


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("matrix", ROOT / "scripts/matrix.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["matrix"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["matrix"]


def made_up(difference: float = 1.4e-6) -> list[dict[str, Any]]:
    """Results with which everything agrees, as if the tests had found them."""
    found: list[dict[str, Any]] = []
    refused = [refusal.where for refusal in CATALOGUE.refusals.llms]
    refused += [requirement.where for requirement in requirements("llava")]
    for name, family in CATALOGUE.families.items():
        for format_ in ("llava", "hf"):
            if family.target_class.name not in CATALOGUE.formats[format_].classes:
                refused.append(CATALOGUE.formats[format_].refused[family.target_class.name].where)
                continue
            result = {"family": name, "format": format_, "layout": "iter .pth file"}
            result |= {"llm": "full", "tower": "frozen", "real": name == "yi"}
            found += [{**result, "difference": d} for d in (difference, 0.0)]
    return found + [{"refused": where} for where in refused]


def matrix(script: ModuleType, results: list[dict[str, Any]]) -> str:
    found = script.read_results(map(json.dumps, results))
    return str(script.matrix(found, CATALOGUE))


def test_it_makes_the_families_and_refusals_of_the_page(script: ModuleType) -> None:
    made = matrix(script, made_up())
    assert "| LLM | tower |" in made
    assert "| full | frozen | `iter_N.pth` | exact, ≤ 2e-6 (yi) | exact, ≤ 2e-6 (yi) |" in made
    differing = list(script.disagreements(script.parts(PAGE)[1], made))
    # All but the training of real checkpoints, of which these results have only one.
    training = re.compile(r"(in the page only|by the tests): \| (frozen|LoRA|full) \| .+")
    assert [line for line in differing if not training.fullmatch(line)] == []
    assert len(differing) > 1


def test_only_verdicts_are_compared(script: ModuleType) -> None:
    near, far = matrix(script, made_up()), matrix(script, made_up(8e-9))
    assert near != far
    assert list(script.disagreements(near, far)) == []
    other = near.replace("refused | exact, ≤ 2e-6", "exact, 0 | exact, ≤ 2e-6")
    assert len(list(script.disagreements(near, other))) == 2 * 4


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ({"family": "yi", "format": "hf"}, "becomes of yi in the format hf"),
        ({"refused": CATALOGUE.refusals.llms[2].where}, "the refusal of refusals.yaml:"),
        ({"refused": requirements("llava")[0].where}, "the refusal of formats/llava.yaml:"),
        (
            {"refused": CATALOGUE.formats["llava"].refused["gemma"].where},
            "becomes of gemma in the format llava",
        ),
    ],
)
def test_what_no_test_found_is_not_written(
    script: ModuleType, lost: dict[str, str], says: str
) -> None:
    kept = [result for result in made_up() if not lost.items() <= result.items()]
    with pytest.raises(SystemExit, match=says):
        matrix(script, kept)


def test_the_script_fails_where_verdicts_differ(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(result) + "\n" for result in made_up()))
    ran = subprocess.run(
        [sys.executable, "scripts/matrix.py", "--check", "--results", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "docs/compatibility.md disagrees" in ran.stderr
    # The one checkpoint of these results is of no family in the PAGE's table.
    assert "by the tests: | full | frozen | `iter_N.pth` | exact (yi) |" in ran.stdout
    assert (ROOT / "docs/compatibility.md").read_text(encoding="utf-8") == PAGE


def test_numbers_are_rounded_up(script: ModuleType) -> None:
    found = [script.bound(value) for value in (0.0, 1e-6, 1.1e-6, 2e-6, 9.5e-7, 9e-7, 0.003)]
    assert found == ["0", "≤ 1e-6", "≤ 2e-6", "≤ 2e-6", "≤ 1e-6", "≤ 9e-7", "≤ 3e-3"]


# What the tests take down


def test_only_tests_that_take_something_down_are_run(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "--record-matrix", str(file)]
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider", "tests/end_to_end/test_families_config.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    found = {json.loads(line)["refused"] for line in file.read_text().splitlines()}
    refused = [*CATALOGUE.refusals.llms, *requirements("llava")]
    assert found == {refusal.where for refusal in refused}
    counted = re.search(r"(\d+) passed, (\d+) deselected", ran.stdout)
    assert counted is not None
    assert int(counted[1]) == len(file.read_text().splitlines())
    assert int(counted[2]) > 20


@pytest.mark.parametrize(
    ("part", "training"),
    [
        ({"trained": False, "weights": "base a/b"}, "frozen"),
        ({"trained": True, "weights": "LoRA (rank 8, alpha 16) on base a/b"}, "LoRA"),
        ({"trained": True, "weights": "trained"}, "full"),
    ],
)
def test_how_a_model_was_trained_is_taken_from_its_folder(
    tmp_path: Path, part: dict[str, Any], training: str
) -> None:
    said = {
        "dtype": "float32",
        "mapping": {"family": "f", "format": "hf"},
        "checkpoint": {"layout": "l"},
        "parts": {"llm": part, "visual_encoder": {"trained": True, "weights": "trained"}},
    }
    (tmp_path / "conversion.json").write_text(json.dumps(said))
    Measured(tmp_path / "file").exact(tmp_path, 0.5, real=True)
    found = [json.loads(line) for line in (tmp_path / "file").read_text().splitlines()]
    expected = {"family": "f", "format": "hf", "layout": "l", "real": True, "difference": 0.5}
    assert found == [{**expected, "llm": training, "tower": "full"}]


def test_only_float32_is_taken_down(tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text(json.dumps({"dtype": "float16"}))
    with pytest.raises(AssertionError):
        Measured(tmp_path / "file").exact(tmp_path, 0.5)
    assert not (tmp_path / "file").exists()
