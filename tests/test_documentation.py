"""The pages: their examples run in order, as a reader would; links lead somewhere; style.

A page runs in one folder of its own, see `examples.py`. The Hub of the examples is a server on
loopback, which holds tiny models.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import BLOCK, Example, blocks, examples, fault, mismatch
from hub_server import HubServer
from xtuner2llava.storage.allowlist import ALLOWED

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GENERATED = ROOT / "docs/cli.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, *(ROOT / n for n in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")),
         ROOT / "mappings/README.md"]  # fmt: skip
# In a clone only; the scripts have a test of their own.
SCRIPTS = ("./scripts/demo", "./scripts/test")
MAX_WORDS, MAX_LINE, MAX_README = 30, 120, 130


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_EXAMPLES = [page for page in PAGES if next(examples(page), None) is not None]


@pytest.fixture(scope="module")
def environment(
    checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """What programs of a reader see: our command, and a Hub that holds the models of the pages."""
    folder = checkpoints / "llama_e_full_fullvis/iter_2_xtuner"
    with HubServer() as hub:
        hub.add(
            "xtuner/llava-llama-3-8b-v1_1",
            {p.relative_to(folder).as_posix(): p.read_bytes()
             for p in folder.rglob("*") if p.is_file()},
        )  # fmt: skip
        home = tmp_path_factory.mktemp("hub")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield {**os.environ, **hub.environment(home), "PATH": path}


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_the_examples_run_in_order(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    for example in examples(page):
        if example.text not in SCRIPTS:
            assert mismatch(example, tmp_path, environment) is None


@pytest.mark.parametrize(
    ("shown", "status", "printed", "expected"),
    [
        ("", 0, "anything\n", None),
        ("", 1, "Error:\n", "exit status 1"),
        ("one, 0.1 s\n", 0, "one, 20.3 s\n", None),
        ("9.99 kB in 2 shards\n", 0, "1.23 kB in 2 shards\n", None),
        ("9.99 kB in 2 shards\n", 0, "9.99 kB in 1 shard\n", "other output"),
        ("9.99 kB\n", 0, "1.23 kB\n", "other output"),
        ("one\n", 0, "two\n", "other output"),
        ("one\n", 0, "one\ntwo\n", "other output"),
        ("one\n...\nfour\n", 0, "one\ntwo\nthree\nfour\n", None),
        ("one\n...\n", 0, "one\ntwo\nthree\n", None),
        ("one ... three\n", 0, "one two three\n", None),
        ("one ... three\n", 0, "one\ntwo three\n", "other output"),
        ("Error:\n  no\n", 1, "Error:\n  no\n", None),
        ("Error:\n  no\n", 0, "Error:\n  no\n", "exit status 0"),
    ],
)
def test_what_a_page_shows_is_held_to_it(
    shown: str, status: int, printed: str, expected: str | None
) -> None:
    assert fault(Example("console", "command", shown), status, printed) == expected


def test_only_what_needs_a_network_is_not_run() -> None:
    skipped = [(block["reason"], block["text"]) for page in PAGES for block in blocks(page)
               if block["reason"] not in (None, "another program")]  # fmt: skip
    assert {reason for reason, _ in skipped} == {"network"}
    # The steps of this page are those of tests/consumers.
    others = {page.name for page in PAGES for b in blocks(page) if b["reason"] == "another program"}
    assert others == {"gguf.md"}
    needs = ("uv tool install", "pip install", " push ")
    assert [text for _, text in skipped if not any(word in text for word in needs)] == []
    assert {b["language"] for page in PAGES for b in blocks(page) if page != GENERATED} <= {
        "console",
        "python",
        "yaml",  # run by the tests of mappings
    }


@pytest.mark.slow
def test_the_scripts_are_there_and_demo_runs(tmp_path: Path) -> None:
    for script in SCRIPTS:
        assert f"$ {script}\n" in README.read_text(encoding="utf-8")
        assert os.access(ROOT / script, os.X_OK)
    # This test is part of ./scripts/test; the continuous integration calls that and nothing else.
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith(("#", "set "))][-1].endswith(
        "./scripts/test --all"
    )
    done = subprocess.run(
        ["./scripts/demo", str(tmp_path / "demo")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in ("LlavaQwenForCausalLM", "verified bit for bit", "model.safetensors", "Load it"):
        assert text in done.stdout


# Links


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    return [t for t in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in t]


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return not target.exists() or (anchor != "" and anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in links(page) if dead(page, link)] == []


def test_a_dead_link_is_found() -> None:
    assert not dead(README, "docs/api.md#errors")
    assert dead(README, "docs/none.md") and dead(README, "docs/api.md#none") and dead(README, "#x")


def test_modules_of_the_architecture_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+(?:\.py|\.yaml|/))`", text)
    assert len(named) > 40
    roots = (ROOT, ROOT / "converter/xtuner2llava")
    assert [n for n in named if not any((root / n).exists() for root in roots)] == []


def test_pages_are_linked_both_ways() -> None:
    there = {(README.parent / link).resolve() for link in links(README)}
    assert [name_of(page) for page in DOCS if page not in there] == []
    back = {page: {(page.parent / link).resolve() for link in links(page)} for page in DOCS}
    assert [name_of(page) for page in DOCS if page != GENERATED and README not in back[page]] == []


# Style


def long_lines(text: str) -> list[str]:
    """Lines over the limit; a row of a table cannot be broken."""
    return [x for x in text.splitlines() if len(x) > MAX_LINE and not x.startswith("|")]


def long_sentences(text: str) -> list[str]:
    """Sentences of prose, of list entries and of table cells that have too many words."""
    text = re.sub(r"<!--.*?-->|^#.*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|[-| ]+\|$", "", text, flags=re.MULTILINE).replace("|", "\n\n")
    text = re.sub(r"\n(?=\s*(?:[-*]|\d+\.) )", "\n\n", text)
    parts = re.split(r"\n\s*\n|(?<=[.!?])[*\"”)]*\s+", text)
    return [" ".join(part.split()) for part in parts if len(part.split()) > MAX_WORDS]


@pytest.mark.parametrize("page", [p for p in PAGES if p != GENERATED], ids=name_of)
def test_lines_and_sentences_are_short(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []
    if page.name != "compatibility.md":  # its reasons are those of the mappings
        assert long_sentences(prose(page)) == []


@pytest.mark.parametrize("page", sorted(ROOT.glob("tests/end_to_end/days/*.md")), ids=name_of)
def test_lines_of_the_days_are_short(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []


def test_long_ones_are_found() -> None:
    assert long_sentences("word " * 31 + ".") and not long_sentences("word " * 29 + ". word.")
    assert long_sentences("- one\n- " + "word " * 31) and not long_sentences("- word\n" * 40)
    assert long_lines("x" * 121) and not long_lines("|" + "x" * 121)


def test_the_readme_is_short_and_its_number_is_right() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_README
    assert f"a list of {len(ALLOWED)} is refused" in text


# What a user of LLaVA models knows; everything else in capitals must be explained where it stands.
STANDARD = frozenset(
    "API CLIP CPU DeepSpeed GB GELU GGUF GPU GitHub InternLM LLM LLMs LLaVA LoRA MB PyTorch SGLang "
    "README vLLM LMDeploy SECURITY CONTRIBUTING CHANGELOG CITATION LICENSE NeXT XTuner".split()
)
EXPLAINED = {
    "CHECKPOINT": "checkpoint is an `iter_N.pth` file",
    "OUT": "OUT, the folder that is written",
    "QLoRA": "QLoRA adapters are merged onto the unquantised base",
    "IMAGE": "try OUT IMAGE QUESTION` answers",
    "QUESTION": "try OUT IMAGE QUESTION` answers",
}


def test_the_terms_of_the_readme_are_standard_or_explained() -> None:
    text = " ".join(prose(README).split())
    words = {word for word in re.findall(r"[A-Za-z]+", text) if re.search(r"[A-Z].*[A-Z]", word)}
    assert sorted(words - STANDARD - EXPLAINED.keys()) == []
    assert {term for term, where in EXPLAINED.items() if where not in text} == set()
