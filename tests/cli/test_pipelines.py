"""What a pipeline reads: errors as JSON, exit codes, and the log."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reference.cases import CASES
from xtuner2llava import ConversionError, convert, plan
from xtuner2llava.cli import commands, progress
from xtuner2llava.cli.commands import main

CASE = "qwen2_d_lora_vislora"
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d (\S+): (?:\d+ bytes, )?\d+\.\d{3} s")
LOGGER = logging.getLogger("xtuner2llava")


@pytest.fixture
def words(checkpoints: Path) -> list[str]:
    case = CASES[CASE]
    bases = ["--llm", str(checkpoints / case.llm), "--vision", str(checkpoints / case.vision)]
    return [str(checkpoints / CASE / "iter_2.pth"), *bases, "--vision-tower-name", "openai/clip"]


@pytest.fixture
def given(checkpoints: Path) -> dict[str, Any]:
    case = CASES[CASE]
    return {"llm": checkpoints / case.llm, "vision": checkpoints / case.vision,
            "vision_tower_name": "openai/clip"}  # fmt: skip


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def error_of(result: Result) -> dict[str, Any]:
    """The error that is all of stdout."""
    found = json.loads(result.stdout)
    assert list(found) == ["error"]
    assert all(list(f) == ["where", "what", "advice"] for f in found["error"]["faults"])
    return found["error"]


def test_an_error_is_json_with_every_fault_and_text_on_stderr(
    words: list[str], tmp_path: Path
) -> None:
    done = run("convert", words[0], tmp_path / "out", *words[1:], "--mapping", "llama", "--json")
    error = error_of(done)
    assert done.exit_code == 1
    assert error["type"] == "PlanError"
    assert sorted(f["where"] for f in error["faults"]) == [
        f"families/llama.yaml:13, `model.layers.{{0..2}}.self_attn.{x}_proj.bias` (3 tensors)"
        for x in "kqv"
    ]
    assert "is not a tensor of LlamaForCausalLM" in error["faults"][0]["what"]
    assert error["faults"][0]["advice"].startswith("Drop it with a reason")
    assert "Error, 3 faults" in done.stderr
    assert done.stderr.count("is not a tensor of") == 1
    assert not (tmp_path / "out").exists()
    plain = run("convert", words[0], tmp_path / "out", *words[1:], "--mapping", "llama")
    assert (plain.exit_code, plain.stdout) == (1, "")


@pytest.mark.parametrize(
    ("command", "where", "what"),
    [
        (["plan", "x", "--dtype", "int8"], "--dtype", "'int8' is not one of"),
        (["verify", "x", "--jobs", "many"], "--jobs", "'many' is not a valid integer"),
        (["push", "x"], "repo_id", "Missing argument 'REPO_ID'"),
        (["convert", "x", "y", "--nonsense"], "--nonsense", "No such option"),
        (["convert", "x", "y", "--jobs", "0"], "--jobs", "is 0, expected a whole number"),
        (["inspect", "nothing.pth"], "nothing.pth", "no such file or folder"),
        (["plan", ""], "CHECKPOINT", "not empty"),
        (["--nonsense", "plan", "x"], "--nonsense", "No such option"),
        (["plan", "x", "--for", "vllm", "--format", "llava"], "--format", "--for sets 'hf'"),
        (["plan", "x", "--for", "sglang", "--model-type", "official"], "--model-type", "'llava'"),
        (["plan", "x", "--for", "llava", "--format", "hf"], "--format", "LLaVA reads 'llava'"),
        (["inspect", "nothing.py"], "nothing.py", "no such file or folder"),
    ],
)
def test_a_wrong_call_is_json_too_and_exits_with_2(
    command: list[str], where: str, what: str
) -> None:
    done = run(*command, "--json")
    error = error_of(done)
    assert (done.exit_code, error["type"]) == (2, "UsageError")
    (fault,) = error["faults"]
    assert fault["where"] == where
    assert what in fault["what"]
    assert done.stderr != ""
    assert run(*command).stdout == ""


@pytest.mark.parametrize(("raised", "status"), [(KeyError("x"), 1), (KeyboardInterrupt(), 130)])
def test_bugs_and_interrupts_are_json_too(
    words: list[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(commands, "_show_plan", fail)
    done = run("plan", *words, "--json")
    assert done.exit_code == status
    assert error_of(done)["type"] == type(raised).__name__
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["verify {}", "push {} a/b", "try {} x", "demo {}"])
def test_a_path_that_the_system_refuses_is_not_a_bug(command: str) -> None:
    """Such as a folder of someone else: here, a name that no file system takes."""
    words = command.format("a" * 300).split()
    done = run(*words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "cannot be read or written (File name too long)" in done.stderr
    assert "fault of xtuner2llava" not in done.stderr
    if words[0] != "demo":
        error = error_of(run(*words, "--json"))
        assert error["type"] == "OutputError"
        assert error["faults"][0]["where"].startswith("aaa")


def test_a_full_disk_under_stdout_is_said_without_a_traceback() -> None:
    for words in (["mappings", "list"], ["mappings", "list", "--json"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "xtuner2llava", *words]
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 1
        assert "stdout cannot be read or written (No space left on device)" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("words", "status"), [("mappings list", 0), ("lst", 2), ("plan /no", 2)])
def test_without_standard_streams(words: str, status: int) -> None:
    """As a process that closed them may start us."""
    command = f"exec {sys.executable} -m xtuner2llava {words} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == status


def test_without_standard_streams_no_shard_gets_the_number_of_stderr() -> None:
    code = (
        "import os; from xtuner2llava.cli.commands import main\n"
        "try: main(['mappings', 'list'])\n"
        "except SystemExit: os._exit(os.open('/dev/null', os.O_RDONLY))"
    )
    command = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], check=False).returncode > 2


def test_out_is_not_the_folder_that_it_runs_in(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming would leave the shell in a folder that is gone, in which nothing more works."""
    home = tmp_path / "llava-qwen2"
    home.mkdir()
    monkeypatch.chdir(home)
    for out in (".", home, "../llava-qwen2"):
        done = run("convert", words[0], out, *words[1:])
        assert done.exit_code == 2
        assert "is the folder that this runs in" in done.stderr
    assert [*tmp_path.iterdir()] == [home]
    monkeypatch.chdir(tmp_path)
    assert run("convert", words[0], home.name, *words[1:]).exit_code == 0
    monkeypatch.chdir(home)  # Finished, so there is nothing to rename.
    assert "already converted" in run("convert", words[0], ".", *words[1:]).stdout


def test_an_alpha_without_lora_is_said(words: list[str], checkpoints: Path) -> None:
    """Who gives one believes that the checkpoint has an adapter."""
    full = str(checkpoints / "qwen2_e_full_fullvis/iter_2.pth")
    for flag, part in (("--lora-alpha", "LLM"), ("--vision-lora-alpha", "vision tower")):
        note = f"Note: {flag} has no effect: the {part} has no LoRA."
        assert note in run("plan", full, *words[1:], flag, "16").stdout
        assert note not in run("plan", *words, flag, "32").stdout


def test_an_option_without_effect_is_said_or_refused(
    words: list[str], checkpoints: Path, tmp_path: Path
) -> None:
    full, tower = str(checkpoints / "qwen2_e_full_fullvis/iter_2.pth"), "--vision-tower-name"
    zero = str(checkpoints / "qwen2_f_zero3_full/iter_2.pth")
    for flag, value, format_, idle, used in (
        ("--weights", "module", "llava", full, zero),
        (tower, "openai/clip-x", "hf", full, None),
        ("--model-type", "llava", "hf", full, None),
    ):
        given = (*words[1:5], "--format", format_)
        note = f"Note: {flag} has no effect"
        assert note in run("plan", idle, *given, flag, value).stdout
        assert note not in run("plan", idle, *given).stdout
        assert used is None or note not in run("plan", used, *given, flag, value).stdout
    config = str(checkpoints / "qwen2_e_full_fullvis/config.py")
    done = run("inspect", config, *words[1:5], "--xtuner-config", config)
    assert done.exit_code == 2 and "config.py is a config itself" in done.stderr
    file = tmp_path / "my.yaml"
    file.write_text("schema: 1\nfamily: my\nextends: qwen2\n")
    assert run("mappings", "check", str(file)).exit_code == 0
    for option, *value in (("--llm", "base"), ("--dtype", "float16"), ("--include-vision-tower",)):
        flag = option if value else "--no-include-vision-tower"
        done = run("mappings", "check", str(file), flag, *value)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"{option}: says how a checkpoint is read, and without CHECKPOINT" in done.stderr
    for command, argument in (("check", str(file)), ("draft", full)):
        done = run("mappings", command, argument, "--mapping", "qwen2")
        assert done.exit_code == 2 and "No such option" in done.stderr
    assert "extends: qwen2" in run("mappings", "draft", full, *words[1:5]).stdout


def test_the_name_of_a_file_makes_no_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "x\nVerified: all 20 checks.pth"
    Path(name).symlink_to(words[0])
    out = "llava-qwen2\nVerified: all"
    shown = [run("inspect", name, *words[1:]), run("plan", name, *words[1:]),
             run("convert", name, out, *words[1:]), run("verify", out),
             run("plan", f"{name}x")]  # fmt: skip
    for done in shown:
        assert r"\nVerified: all" in done.output
        assert "\nVerified: all" not in done.output


def test_a_traceback_cannot_move_the_cursor(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "x\x1b[2J.pth", "-v")
    assert "Traceback" in done.stderr
    assert r"x\x1b[2J.pth" in done.stderr
    assert "\x1b[2J" not in done.stderr


def test_json_is_ascii(tmp_path: Path) -> None:
    """So it is JSON in any encoding of stdout, and no name in it moves the cursor."""
    name = "caf\u00e9\U0001f600\x9b31m.pth"
    done = run("inspect", tmp_path / name, "--json")
    assert done.stdout.isascii()
    assert error_of(done)["faults"][0]["where"] == str(tmp_path / name)


def test_names_that_are_not_utf8(
    checkpoints: Path, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File names of another encoding, as archives bring them along."""
    home = tmp_path / "gbk-\udcd6\udcd0"
    home.mkdir()
    checkpoint = home / "iter_\udcd6.pth"
    checkpoint.symlink_to(checkpoints / CASE / "iter_2.pth")
    monkeypatch.chdir(home)
    words = [checkpoint.name, "llava-qwen2-\udcd0", "--llm", given["llm"],
             "--vision", given["vision"], "--vision-tower-name", "openai/clip"]  # fmt: skip
    done = run("convert", *words)
    assert done.exit_code == 0, done.stderr
    out = home / words[1]
    record = json.loads((out / "conversion.json").read_text(encoding="utf-8"))
    assert record["checkpoint"]["files"][0]["name"] == "iter_?.pth"
    assert r"xtuner2llava convert 'iter_\udcd6.pth'" in (out / "README.md").read_text("utf-8")
    assert "already converted" in run("convert", *words).stdout


def test_each_stage_is_a_line_without_a_terminal(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "llava-qwen2"
    done = run("convert", words[0], out, *words[1:], "--json")
    lines = [LINE.fullmatch(line) for line in done.stderr.splitlines()]
    assert [line and line[1] for line in lines] == [
        "open", "plan", "write", "describe", "publish",
    ]  # fmt: skip
    seconds = json.loads(done.stdout)["seconds"]
    assert [*seconds] == ["open", "plan", "write", "describe", "publish"]
    written = next(x for x in done.stderr.splitlines() if " write: " in x)
    assert f" {(out / 'model.safetensors').stat().st_size} bytes," in written
    checked = run("verify", out, "--against", *words)
    assert [LINE.fullmatch(x)[1] for x in checked.stderr.splitlines()] == [  # type: ignore[index]
        "plan", "look", "compare",
    ]  # fmt: skip
    # What is missing is said before the folder is read.
    missing = run("verify", out, "--against", words[0], "--llm", tmp_path / "nothing")
    assert (missing.exit_code, "is not a folder here" in missing.stderr) == (1, True)
    assert "look:" not in missing.stderr
    assert run("verify", out, "-q").stderr == ""
    assert run("plan", *words).stderr == ""
    assert LOGGER.handlers == []


def test_verbose_says_what_is_read_from_where(
    words: list[str], checkpoints: Path, tmp_path: Path
) -> None:
    done = run("convert", words[0], tmp_path / "llava-qwen2", *words[1:], "-v")
    llm, vision = (checkpoints / "bases" / name for name in ("llm_qwen2", "vision_clip"))
    for line in (
        f"checkpoint: {words[0]}: iter .pth file",
        f"XTuner config: {words[0]} (meta.cfg)",
        f"weights: iter_2.pth, {Path(words[0]).stat().st_size} bytes",
        f"LLM: LoRA (rank 16, alpha 32) on base bases/llm_qwen2; config and small files from {llm}",
        f"config and small files from {vision}",
        "mapping: families/qwen2.yaml, SHA-256 ",
        f"merges.txt: copied from {llm}",
        "model.safetensors: ",
    ):
        assert line in done.stderr, line
    assert f"copied from {llm}" in run("plan", *words, "-v").stderr


def test_a_log_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A name cannot forge a line, or move the cursor."""
    with main.make_context("xtuner2llava", ["plan", "x"]):
        progress.show_log(logging.INFO)
        LOGGER.info("a\n2026-01-01T00:00:00 write: \x1b[1A")
        LOGGER.debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r" a\n2026-01-01T00:00:00 write: \x1b[1A")
    assert (LOGGER.handlers, LOGGER.level) == ([], logging.NOTSET)


def test_the_library_logs_and_prints_nothing(
    checkpoints: Path,
    given: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoint = checkpoints / CASE / "iter_2.pth"
    convert(checkpoint, tmp_path / "llava-qwen2", **given)
    with pytest.raises(ConversionError):
        plan(checkpoint, **given, mapping="llama")
    assert capfd.readouterr() == ("", "")
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == ([], logging.NOTSET, True)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "xtuner2llava"):
        report = convert(checkpoint, tmp_path / "llava-qwen2-b", **given, max_shard_size="200KB")
    at = {level: [r.getMessage() for r in caplog.records if r.levelno == level]
          for level in (logging.INFO, logging.DEBUG)}  # fmt: skip
    assert {r.name.partition(".")[0] for r in caplog.records} == {"xtuner2llava"}
    assert [line.partition(":")[0] for line in at[logging.INFO]] == [*report.seconds]
    shards = [line.partition(":")[0] for line in at[logging.DEBUG] if line.startswith("model-")]
    assert sorted(shards) == sorted(report.blake3)
    assert len(shards) > 1
