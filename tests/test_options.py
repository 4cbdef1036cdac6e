"""Options are stated once: the API, the flags and the page follow, and values are checked alike."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner

import xtuner2llava
from xtuner2llava import UsageError, convert, plan, push, verify
from xtuner2llava.cli.commands import main
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.options import (
    ConvertOptions,
    Format,
    InspectOptions,
    Options,
    PushOptions,
    VerifyOptions,
    flag,
    parse_size,
)

ROOT = Path(__file__).parents[1]
KINDS: dict[str, type[Any]] = {
    "convert": ConvertOptions,
    "inspect": InspectOptions,
    "plan": Options,
    "push": PushOptions,
    "verify": VerifyOptions,
}
WRONG: list[tuple[str, object, str]] = [
    ("max_shard_size", 5, "a number with its unit, such as '5GB'"),
    ("max_shard_size", "5", "a number with its unit"),
    ("max_shard_size", "nanGB", "a number with its unit"),
    ("max_shard_size", "0GB", "a number with its unit"),
    ("max_shard_size", f"{'9' * 400}GB", "a number with its unit"),
    ("max_memory", 10**9, "a number with its unit"),
    ("lora_alpha", -3, "a number above 0"),
    ("lora_alpha", 0.0, "a number above 0"),
    ("lora_alpha", math.nan, "a number above 0"),
    ("vision_lora_alpha", math.inf, "a number above 0"),
    ("lora_alpha", "16", "a number above 0"),
    ("lora_alpha", True, "a number above 0"),
    ("jobs", 0, "a whole number, 1 or more"),
    ("jobs", 2.0, "a whole number, 1 or more"),
    ("jobs", True, "a whole number, 1 or more"),
    ("format", "x", "one of llava, hf"),
    ("format", None, "one of llava, hf"),
    ("dtype", ["keep"], "one of auto, keep"),
    ("verify", 1, "True or False"),
    ("overwrite", "no", "True or False"),
    ("llm", 5, "a text or a path"),
    ("llm", b"base", "a text or a path"),
    ("vision", "", "a text that is not empty"),
    ("mapping", "a\0b", "a text that is not empty and has no NUL"),
    ("bos_token", Path("x"), "a text"),
    ("push_to_hub", 5, "a text"),
    ("on_progress", "loud", "something to call"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_wrong_values_are_one_error_that_names_the_argument(
    name: str, value: object, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        convert("iter_1.pth", tmp_path / "out", **{name: value})  # type: ignore[arg-type]
    (fault,) = caught.value.faults
    assert fault.where == name
    assert expected in fault.what
    assert not [*tmp_path.iterdir()]


def test_all_wrong_values_are_listed_at_once() -> None:
    with pytest.raises(UsageError, match="3 faults") as caught:
        plan("iter_1.pth", format="gguf", lora_alpha=-1, llm="")  # type: ignore[arg-type]
    assert {fault.where for fault in caught.value.faults} == {"format", "lora_alpha", "llm"}


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: convert(5, "out"), "checkpoint"),  # type: ignore[arg-type]
        (lambda: convert("iter_1.pth", ""), "out"),
        (lambda: push("out", None), "repo_id"),  # type: ignore[arg-type]
        (lambda: verify(b"out"), "out"),  # type: ignore[arg-type]
    ],
)
def test_arguments_without_a_flag_are_checked_too(call: Callable[[], object], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.faults[0].where == where


def test_unknown_and_missing_arguments_are_type_errors_of_the_function() -> None:
    with pytest.raises(TypeError, match=r"plan\(\): got an unexpected keyword argument 'dtyp'"):
        plan("iter_1.pth", dtyp="keep")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"convert\(\): missing a required argument: 'out'"):
        convert("iter_1.pth")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-shard-size", "5"], "--max-shard-size: is '5', expected a number with its unit"),
        (["--lora-alpha", "-3"], "--lora-alpha: is -3.0, expected a number above 0"),
        (["--jobs", "0"], "--jobs: is 0, expected a whole number, 1 or more"),
        (["--llm", ""], "--llm: is '', expected a text that is not empty"),
        (["--jobs", "two"], "'two' is not a valid integer"),
        (["--format", "x"], "is not one of 'llava', 'hf'"),
        (["--fromat", "hf"], "--format"),  # Did you mean ...
    ],
)
def test_the_command_line_refuses_the_same_values(arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(main, ["convert", "iter_1.pth", "out", *arguments])
    assert done.exit_code == 2
    assert told in done.stderr


def test_an_empty_out_is_not_the_working_folder() -> None:
    done = CliRunner().invoke(main, ["convert", "iter_1.pth", ""])
    assert done.exit_code == 2
    assert "OUT: is ''" in done.stderr


@pytest.mark.parametrize("name", KINDS)
def test_signature_and_flags_follow_from_the_class(name: str) -> None:
    taken = inspect.signature(getattr(xtuner2llava, name)).parameters
    own = {each.name: each for each in fields(KINDS[name])}
    assert {p.name for p in taken.values() if p.kind is p.KEYWORD_ONLY} == own.keys()
    assert all(taken[option].default == each.default for option, each in own.items())
    command = main.commands[name]
    flags = {text: p for p in command.params if isinstance(p, click.Option) for text in p.opts}
    for option, each in own.items():
        assert (flag(option) in flags) == bool(each.metadata), option
        if each.metadata:
            assert flags[flag(option)].default == each.default


def test_the_formats_are_those_that_are_shipped() -> None:
    assert set(get_args(Format)) == set(Catalogue.shipped().formats)


def test_help_lists_options_under_headings_in_order() -> None:
    text = CliRunner().invoke(main, ["convert", "--help"]).output
    headings = ["Input:", "Output:", "Exactness:", "Speed and memory:", "Hub:", "Talk:"]
    places = [text.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    assert places[0] < text.index("--llm") < places[1] < text.index("  --overwrite  ") < places[2]


def test_sizes_are_read_as_the_hub_reads_them() -> None:
    assert [parse_size(s) for s in ("5GB", "1.5 mb", ".5KB")] == [5 * 10**9, 1_500_000, 500]


@pytest.mark.parametrize("size", ["", "5", "5XB", "infGB", "-1GB", "0GB", "5 G B", "\u0665GB"])
def test_what_is_not_a_size(size: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(size)


def test_type_checkers_see_names_types_and_choices(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from xtuner2llava import convert, inspect, plan, push, verify\n"
        'convert("a", Path("b"), dtype="keep", lora_alpha=1, on_progress=lambda s, d, t: None)\n'
        'verify("a", against="b", format="hf"); inspect("a", llm=Path("b")); push("a", "b/c")\n'
        'plan("a", dtype="int8")\n'
        'plan("a", jobs=2)\n'
        'convert("a", "b", lora_alpha="1")\n'
        'reveal_type(plan("a"))\n'
    )
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", program],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if ": error: " in line or "Revealed" in line]
    assert [line.split(":")[1] for line in told] == ["5", "6", "7", "8"]
    assert 'expected "Literal[' in told[0]
    assert 'Unexpected keyword argument "jobs"' in told[1]
    assert "xtuner2llava.planning.plan.Plan" in told[3]


def test_the_page_of_the_command_line_is_current() -> None:
    """`scripts/cli_docs.py` writes it."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "cli_docs.py", "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
