"""Writes the tables of docs/compatibility.md: which models become which, and how exactly.

    python scripts/matrix.py             runs the tests behind it, and writes it
    python scripts/matrix.py --check     says where the page has other verdicts, and exits with 1
    python scripts/matrix.py --results FILE    takes what `pytest --record-matrix FILE` wrote before

Needs what the tests need, as in the environment of scripts/test. Differences of logits depend on
the machine and on torch, so they are rounded up to one digit, and `--check` does not compare them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.caveats import Caveat
from xtuner2llava.mapping.family import Family

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/compatibility.md"
BEGIN, END = "<!-- Made by scripts/matrix.py, from here -->\n", "<!-- to here -->\n"
FORMATS = ("llava", "hf")
TRAINING = ("frozen", "LoRA", "full")
BOUND = re.compile(r", (?:0|≤ \de-\d+)\b")


@dataclass(frozen=True)
class Result:
    """Logits that agreed: of which conversion, and how far they were apart at most."""

    family: str
    format: str
    layout: str
    llm: str
    tower: str
    real: bool
    difference: float


@dataclass(frozen=True)
class Results:
    """All of them, and the places in the mappings whose refusals were met."""

    exact: tuple[Result, ...]
    refused: frozenset[str]


def main() -> None:
    options = parse()
    file = options.results
    with tempfile.TemporaryDirectory(prefix="xtuner2llava-matrix-") as folder:
        if file is None:
            file = Path(folder) / "results.jsonl"
            run_tests(file)
        results = read_results(file.read_text(encoding="utf-8").splitlines())
    made = matrix(results, Catalogue(ROOT / "mappings"))
    before, old, after = parts(PAGE.read_text(encoding="utf-8"))
    if options.check:
        wrong = list(disagreements(old, made))
        for line in wrong:
            print(line)
        sys.exit("docs/compatibility.md disagrees: run scripts/matrix.py." if wrong else 0)
    PAGE.write_text(before + made + after, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--results", type=Path, metavar="FILE", help="of a run of the tests")
    return parser.parse_args()


def run_tests(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--record-matrix", str(file)]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        sys.exit("The tests failed, see above; docs/compatibility.md stays as it is.")


def read_results(lines: Iterable[str]) -> Results:
    found = [json.loads(line) for line in lines]
    exact = tuple(Result(**values) for values in found if "refused" not in values)
    return Results(exact, frozenset(v["refused"] for v in found if "refused" in v))


def parts(text: str) -> tuple[str, str, str]:
    """What stands before the matrix, the matrix, and what stands after it."""
    before, begin, rest = text.partition(BEGIN)
    matrix, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"docs/compatibility.md lacks the line {(END if begin else BEGIN).strip()}")
    return before + begin, matrix, end + after


def disagreements(old: str, new: str) -> Iterator[str]:
    """Lines that one of two matrices has and the other has not, numbers left out."""
    was, now = ([BOUND.sub("", line) for line in text.splitlines()] for text in (old, new))
    yield from (f"in the page only: {line}" for line in was if line not in now)
    yield from (f"by the tests: {line}" for line in now if line not in was)


def matrix(results: Results, catalogue: Catalogue) -> str:
    tables = (family_table, training_table, refusal_table)
    return "\n".join(table(results, catalogue) for table in tables)


def family_table(results: Results, catalogue: Catalogue) -> str:
    """A row for each family that is shipped, and below what else there is to say of them."""
    rows, remarks = [], []
    for name, family in catalogue.families.items():
        cells = [family_cell(results, catalogue, family, format_) for format_ in FORMATS]
        limits = [limit(caveat) for caveat in family.caveats if is_limit(caveat)]
        for format_ in FORMATS:
            described = catalogue.formats[format_].classes.get(family.target_class.name)
            limits += [
                f"{limit(c)} in `{format_}`" for c in (described.caveats if described else ())
            ]
        remarks += [f"{name}: {published(c.say.text)}" for c in family.caveats if not is_limit(c)]
        link = f"[{name}](../mappings/families/{name}.yaml)"
        architectures = ", ".join(f"`{a}`" for a in family.match.architectures)
        rows.append([link, architectures, *cells, "; ".join(limits) or "any length"])
    head = ["family", "architecture", *(f"`--format {format_}`" for format_ in FORMATS), "within"]
    return table(head, rows) + "".join(f"\n{remark}\n" for remark in remarks)


def family_cell(results: Results, catalogue: Catalogue, family: Family, format_: str) -> str:
    refused = catalogue.formats[format_].refused.get(family.target_class.name)
    found = [r for r in results.exact if (r.family, r.format) == (family.name, format_)]
    if refused is not None and not found and refused.where in results.refused:
        return "refused"
    if refused is not None or not found:
        sys.exit(f"No test says what becomes of {family.name} in the format {format_}.")
    return exact(found)


def training_table(results: Results, catalogue: Catalogue) -> str:
    """A row for each way of training and layout, of the checkpoints that XTuner wrote."""
    real = [result for result in results.exact if result.real]
    keys = {(result.llm, result.tower, layout_name(result.layout)) for result in real}
    rows = []
    for llm, tower, layout in sorted(
        keys, key=lambda key: (TRAINING.index(key[0]), TRAINING.index(key[1]), key[2])
    ):
        cells = []
        for format_ in FORMATS:
            found = [r for r in real if (r.llm, r.tower, layout_name(r.layout), r.format) == (
                llm, tower, layout, format_)]  # fmt: skip
            cells.append(f"{exact(found)} ({families(found)})" if found else "")
        rows.append([llm, tower, layout, *cells])
    return table(["LLM", "tower", "from", *(f"`--format {f}`" for f in FORMATS)], rows)


def layout_name(layout: str) -> str:
    """A layout as the page has it."""
    if match := re.match(r"DeepSpeed (ZeRO-\d) directory", layout):
        return f"`iter_N.pth/` of {match[1]}"
    return {"iter .pth file": "`iter_N.pth`", "XTuner folder": "`iter_N_xtuner/`"}[layout]


def families(results: Sequence[Result]) -> str:
    return ", ".join(sorted({result.family for result in results}))


def refusal_table(results: Results, catalogue: Catalogue) -> str:
    """A row for each refusal of refusals.yaml and of a format; each must be met by a test."""
    rows = []
    for refusal in catalogue.refusals.llms:
        if refusal.where not in results.refused:
            sys.exit(f"No test shows the refusal of {refusal.where}.")
        names = ", ".join(f"`{name}`" for name in refusal.match.architectures)
        if refusal.match.when is not None:
            names += f" where `{refusal.match.when.text}`"
        rows.append([names, "all", published(refusal.because.text)])
    for format_ in FORMATS:
        described = catalogue.formats[format_].classes
        for name, requirement in ((n, r) for n, c in described.items() for r in c.requirements):
            if requirement.where not in results.refused:
                sys.exit(f"No test shows the refusal of {requirement.where}.")
            architecture = catalogue.classes[name].architecture
            because = published(requirement.because.text)
            rows.append([f"some `{architecture}`", f"`{format_}`", because])
        for name, fault in catalogue.formats[format_].refused.items():
            rows.append([f"`{catalogue.classes[name].architecture}`", f"`{format_}`", fault.what])
    return table(["refused", "in", "because"], rows)


def is_limit(caveat: Caveat) -> bool:
    """Whether a model is exact all the same, within some length or with some versions."""
    return caveat.exact_up_to is not None or caveat.transformers is not None


def limit(caveat: Caveat) -> str:
    """The length, the versions, and the condition on the config."""
    length = f"`{caveat.exact_up_to.text}` tokens" if caveat.exact_up_to is not None else ""
    versions = f"with transformers {caveat.transformers}" if caveat.transformers else ""
    where = f"where `{caveat.when.text}`" if caveat.when is not None else ""
    return " ".join(part for part in (length, versions, where) if part)


def published(sentence: str) -> str:
    """A sentence of a mapping without the values that it takes from a config."""
    short = re.sub(r" \(\{[\w.]+\}\)", "", sentence)
    short = re.sub(r"\b(\w+) \{\1\}", r"\1", short)
    return re.sub(r"\{([\w.]+)\}", r"`\1`", short).strip()


def exact(results: Sequence[Result]) -> str:
    return f"exact, {bound(max(result.difference for result in results))}"


def bound(value: float) -> str:
    """A number rounded up to one digit."""
    if value == 0.0:
        return "0"
    power = math.floor(math.log10(value))
    digit = math.ceil(value / 10.0**power - 1e-9)
    return f"≤ {digit}e{power}" if digit < 10 else f"≤ 1e{power + 1}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n"
                   for line in lines)  # fmt: skip


if __name__ == "__main__":
    main()
