"""Everything that is written for every real checkpoint, pinned by SHA-256.

`golden.json` has a line per checkpoint, format and dtype: a hash of each file that `convert`
writes, and of what `plan` and `verify` say of it with `--json`; and a line per checkpoint for what
`inspect --json` says. A change of a line needs its reason in the commit message.

    pytest tests/golden --golden-files DIR   writes what is hashed into DIR: do it before and after
                                             a change, and `diff -r` shows what a hash cannot
    pytest tests/golden --update-golden      writes golden.json anew

Only this is taken out before hashing: the version of xtuner2llava, the folder of the test, the
checksums and line numbers of mapping files, which a comment there changes, and from the class of a
tokenizer the `Fast` that transformers 5 dropped. All else is the same from transformers 4.45 on.

LoRA is merged in float64 and rounded once, so the bytes could depend on the BLAS. With these
checkpoints they do not: the value that is nearest to where rounding changes is 500 units in the
last place of float64 away from it, and a sum of 64 products, in any order, errs by less than 70.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

import xtuner2llava
from reference.cases import CASES
from xtuner2llava import convert, inspect, plan, verify

GOLDEN = Path(__file__).parent / "golden.json"
SOURCES = [
    f"{path.parent.name}/{path.name}"
    for path in sorted(Path(__file__).parents[1].glob("checkpoints/*/iter_2*"))
]
# Slow ones: others go through the same.
REPEATED = re.compile(r"(llama|qwen2)_e_full_fullvis/|qwen2_b_full_frozenvis/|_bin$")


def normalised(data: bytes, folder: str) -> bytes:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return data
    version = xtuner2llava.__version__
    for old, new in (
        (f"xtuner2llava {version}", "xtuner2llava VERSION"),
        (f'"version": "{version}"', '"version": "VERSION"'),
        (folder, "FOLDER"),
    ):
        text = text.replace(old, new)
    for pattern, new in (
        (r"\.yaml:\d+", ".yaml:LINE"),
        (r'"sha256": "[0-9a-f]{64}"', '"sha256": "OF A MAPPING"'),
        (r'"(\w+Tokenizer)Fast, ', r'"\1, '),
        # In conversion.json; the card itself, which has the version in it, is hashed too.
        (r'("README.md": \{\s+"blake3": )"[0-9a-f]{64}"', r'\1"OF THE CARD"'),
    ):
        text = re.sub(pattern, new, text)
    return text.encode("utf-8")


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8")


def written(source: str, out: Path, options: dict[str, Any]) -> dict[str, bytes]:
    """The files of `out`, and what `plan` and `verify` say of it."""
    planned = convert(source, out, **options).plan  # `plan` makes it by the same function.
    if options["dtype"] == "keep":
        assert as_json(planned.to_dict()) == as_json(plan(source, **options).to_dict())
    return {
        "plan --json": as_json(planned.to_dict()),
        "verify --json": as_json(verify(out, dtype=options["dtype"]).to_dict()),
        **{path.name: path.read_bytes() for path in sorted(out.iterdir())},
    }


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in files.items()}


@pytest.mark.parametrize(
    "source",
    [pytest.param(s, marks=pytest.mark.slow if REPEATED.search(s) else ()) for s in SOURCES],
)
def test_what_is_written_has_not_changed(
    source: str,
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    monkeypatch.chdir(checkpoints)
    given = CASES[source.partition("/")[0]].options(Path())
    found = {source: {"inspect --json": as_json(inspect(source, **given).to_dict())}}
    for format, dtype in itertools.product(("llava", "hf"), ("float16", "keep")):
        options = {**given, "format": format, "dtype": dtype}
        if dtype == "keep":
            options["max_shard_size"] = "300KB"  # several files, and an index
        out = tmp_path / f"{format}-{dtype}" / "llava-out"
        found[f"{source} {format} {dtype}"] = {
            name: normalised(data, str(out)) for name, data in written(source, out, options).items()
        }
    if (kept := pytestconfig.getoption("--golden-files")) is not None:
        for line, files in found.items():
            folder = kept / line.replace(" ", "-")
            folder.mkdir(parents=True)
            for name, data in files.items():
                (folder / name).write_bytes(data)
    golden = json.loads(GOLDEN.read_text())
    now = {line: hashes(files) for line, files in found.items()}
    if pytestconfig.getoption("--update-golden"):
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted({**golden, **now}.items())]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    changed = [
        f"{line}: {name}"
        for line, files in now.items()
        for name in sorted(files.keys() | golden[line].keys())
        if files.get(name) != golden[line].get(name)
    ]
    if changed:
        pytest.fail(
            "\n".join([f"changed; {__file__} says how to compare:", *changed]), pytrace=False
        )


def test_every_line_is_of_a_checkpoint() -> None:
    lines = json.loads(GOLDEN.read_text())
    assert {line.partition(" ")[0] for line in lines} == set(SOURCES)
    assert len(lines) == 5 * len(SOURCES)
