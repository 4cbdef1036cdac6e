"""Writes tables of docs/compatibility.md: which programs take which output, and which prompts have
the ids of training, as tests found.

    python scripts/programs.py            writes them from tests/consumers/results.jsonl
    python scripts/programs.py --check    exits with 1 where a table is another

`./scripts/test --consumers --record tests/consumers/results.jsonl` adds to these results what tests
find, as does `--all`. Of two results for the same version and output, the later one stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.options import PROGRAMS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests/consumers/results.jsonl"
PAGE = ROOT / "docs/compatibility.md"
BEGIN, END = "<!-- {} by scripts/programs.py, from here -->\n", "<!-- to here -->\n"
TITLES = {name: program.title for name, program in PROGRAMS.items()} | {"llama.cpp": "llama.cpp"}
TOKENIZERS = {"llm_qwen2": "Qwen2", "llm_llama": "Llama", "llm_phi3": "Phi-3"}


@dataclass(frozen=True)
class Prompts:
    """How many ids of prompts were those of XTuner, as `tests/reference/seen.py` wrote it."""

    template: str
    tokenizer: str
    format: str
    ids: int

    @property
    def row(self) -> tuple[str, ...]:
        return self.template, self.tokenizer, self.format


@dataclass(frozen=True)
class Result:
    """What `tests/reference/seen.py` wrote."""

    program: str
    version: str
    format: str
    model_type: str
    becomes: str
    family: str
    outcome: str
    note: str = ""

    @property
    def output(self) -> tuple[int, str, str]:
        return [*TITLES].index(self.program), self.version, self.options

    @property
    def row(self) -> tuple[int, str, str, str]:
        return *self.output, self.family

    @property
    def options(self) -> str:
        also = " --model-type llava" if self.model_type == "llava" else ""
        return f"--format {self.format}{also}"


R = TypeVar("R", Result, Prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--page", type=Path, metavar="FILE", default=PAGE, help="with the table")
    options = parser.parse_args()
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    results = latest(Result(**line) for line in lines if "program" in line)
    prompts = latest(Prompts(**line) for line in lines if "template" in line)
    page = old = options.page.read_text(encoding="utf-8")
    page = replace(page, "Programs", table(results, Catalogue(ROOT / "mappings")))
    page = replace(page, "Prompts", prompt_table(prompts))
    if options.check:
        sys.exit("The page has another table; run scripts/programs.py." if page != old else 0)
    written = [json.dumps(values(result)) for result in (*results, *prompts)]
    RESULTS.write_text("\n".join([*written, ""]), encoding="utf-8")
    options.page.write_text(page, encoding="utf-8")


def latest(results: Iterable[R]) -> list[R]:
    """The last result for each row and column, in the order of the table."""
    return sorted({result.row: result for result in results}.values(), key=lambda r: r.row)


def replace(page: str, name: str, made: str) -> str:
    before, begin, rest = page.partition(BEGIN.format(name))
    return f"{before}{begin}{made}{END}{rest.partition(END)[2]}"


def values(result: Result | Prompts) -> Mapping[str, str | int]:
    names = result.__dataclass_fields__
    return {name: getattr(result, name) for name in names if getattr(result, name)}


def table(results: Iterable[Result], catalogue: Catalogue) -> str:
    """A row for each program, version and output; a column for each class that an LLM becomes."""
    classes = sorted({family.target_class.name for family in catalogue.families.values()})
    rows: dict[tuple[int, str, str], list[Result]] = {}
    for result in results:
        rows.setdefault(result.output, []).append(result)
    notes: dict[str, int] = {}
    lines = [["program", "version", "output", *classes]]
    for found in rows.values():
        first = found[0]
        program = PROGRAMS.get(first.program)
        reads = program is not None and program.format == first.format
        cells = [
            "no class"
            if program and reads and not program.takes(name)
            else cell([r for r in found if r.becomes == name], notes)
            for name in classes
        ]
        lines.append([TITLES[first.program], first.version, f"`{first.options}`", *cells])
    return rendered(lines) + "\n" + "".join(f"{n}. {note}\n" for note, n in notes.items())


def prompt_table(prompts: Iterable[Prompts]) -> str:
    """A row for each prompt template, a column for each format and tokenizer."""
    found = {prompt.row: prompt.ids for prompt in prompts}
    columns = [(t, f) for f in ("hf", "llava") for t in TOKENIZERS]
    lines = [["prompt template", *(f"`{f}`, {TOKENIZERS[t]}" for t, f in columns)]]
    for template in sorted({template for template, *_ in found}):
        lines.append([template, *(str(found.get((template, *c), "")) for c in columns)])
    return rendered(lines)


def rendered(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def cell(found: list[Result], notes: dict[str, int]) -> str:
    """Outcomes, with the numbers of their notes and the families that they were seen with, where
    that is not the class alone.
    """
    parts: dict[str, list[str]] = {}
    for result in found:
        parts.setdefault(outcome(result, notes), []).append(result.family)
    if [*parts.values()] == [[result.becomes for result in found]]:
        return next(iter(parts))
    return "; ".join(f"{said}: {', '.join(families)}" for said, families in parts.items())


def outcome(result: Result, notes: dict[str, int]) -> str:
    if not result.note:
        return result.outcome
    return f"{result.outcome} [{notes.setdefault(result.note, len(notes) + 1)}]"


if __name__ == "__main__":
    main()
