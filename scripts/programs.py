"""Writes the table of docs/compatibility.md: which programs take which output, as tests found.

    python scripts/programs.py            writes it from tests/consumers/results.jsonl
    python scripts/programs.py --check    exits with 1 where the table is another

`./scripts/test --consumers --record tests/consumers/results.jsonl` adds to these results what tests
find, as does `--all`. Of two results for the same version and output, the later one stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.mapping import Catalogue
from xtuner2llava.planning.programs import PROGRAMS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests/consumers/results.jsonl"
PAGE = ROOT / "docs/compatibility.md"
BEGIN, END = "<!-- Made by scripts/programs.py, from here -->\n", "<!-- to here -->\n"
TITLES = {name: program.title for name, program in PROGRAMS.items()} | {"llama.cpp": "llama.cpp"}


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
    def row(self) -> tuple[int, str, str]:
        return [*TITLES].index(self.program), self.version, self.options

    @property
    def options(self) -> str:
        also = " --model-type llava" if self.model_type == "llava" else ""
        return f"--format {self.format}{also}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--page", type=Path, metavar="FILE", default=PAGE, help="with the table")
    options = parser.parse_args()
    results = sorted(read(RESULTS), key=lambda result: (*result.row, result.family))
    made = table(results, Catalogue(ROOT / "mappings"))
    before, _, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    if options.check:
        sys.exit("The page has another table; run scripts/programs.py." if old != made else 0)
    lines = [json.dumps(values(result)) for result in results]
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    options.page.write_text(f"{before}{BEGIN}{made}{END}{after}", encoding="utf-8")


def read(file: Path) -> Iterable[Result]:
    lines = file.read_text(encoding="utf-8").splitlines()
    found = (Result(**json.loads(line)) for line in lines)
    return {(*result.row, result.family): result for result in found}.values()


def values(result: Result) -> Mapping[str, str]:
    names = Result.__dataclass_fields__
    return {name: getattr(result, name) for name in names if getattr(result, name)}


def table(results: Iterable[Result], catalogue: Catalogue) -> str:
    """A row for each program, version and output; a column for each class that an LLM becomes."""
    classes = sorted({family.becomes.name for family in catalogue.families.values()})
    rows: dict[tuple[int, str, str], list[Result]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
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
    lines.insert(1, ["---"] * len(lines[0]))
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "\n" + "".join(f"{number}. {note}\n" for note, number in notes.items())


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
