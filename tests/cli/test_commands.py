"""The command line as users and pipelines meet it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from command import run
from reference.cases import CASES
from xtuner2llava.cli import commands
from xtuner2llava.cli.commands import main

CASE = "qwen2_e_full_fullvis"


@pytest.fixture(scope="module")
def arguments(checkpoints: Path) -> list[object]:
    case = CASES[CASE]
    bases = ["--llm", checkpoints / case.llm, "--vision", checkpoints / case.vision]
    return [checkpoints / CASE / "iter_2.pth", *bases, "--vision-tower-name", "openai/clip"]


def test_convert_reports_on_stdout_and_logs_its_stages_on_stderr(
    arguments: list[object], tmp_path: Path
) -> None:
    done = run("convert", arguments[0], tmp_path / "llava-qwen2", *arguments[1:])
    assert done.returncode == 0
    stages = [line.split()[1] for line in done.stderr.splitlines()]
    assert stages == ["open:", "plan:", "write:", "describe:", "publish:"]
    assert "verified bit for bit" in done.stdout
    assert {path.name for path in (tmp_path / "llava-qwen2").iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "conversion.json",
        "tokenizer.json",
    }
    assert not (tmp_path / "llava-qwen2.partial").exists()


def test_quiet_says_nothing(arguments: list[object], tmp_path: Path) -> None:
    checkpoint, *options = arguments
    done = run("convert", checkpoint, tmp_path / "llava-qwen2", *options, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_json_is_all_of_stdout(arguments: list[object], tmp_path: Path) -> None:
    checkpoint, *options = arguments
    done = run("convert", checkpoint, tmp_path / "llava-qwen2", *options, "--json")
    report = json.loads(done.stdout)
    assert report["verified"] is True
    assert report["plan"]["architecture"] == "LlavaQwenForCausalLM"
    assert report["files"]["model.safetensors"] == report["plan"]["shards"][0]["bytes"]


def test_dry_run_is_plan_and_writes_nothing(arguments: list[object], tmp_path: Path) -> None:
    checkpoint, *options = arguments
    dry = run("convert", checkpoint, tmp_path / "out", *options, "--dry-run")
    assert dry.returncode == 0
    assert dry.stdout == run("plan", checkpoint, *options).stdout
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(run("plan", checkpoint, *options, "--json").stdout)
    assert len(plan["tensors"]) == 114
    assert {t["how"] for t in plan["tensors"]} == {"cast from float32"}


def test_inspect_says_where_each_part_comes_from(checkpoints: Path) -> None:
    # Paths in the config are relative to the working directory, as XTuner takes them.
    done = run("inspect", "qwen2_d_lora_vislora/iter_2.pth", "--json", cwd=checkpoints)
    parts = json.loads(done.stdout)["parts"]
    assert parts["llm"]["weights"] == "LoRA (rank 16, alpha 32) on base llm_qwen2"
    assert parts["visual_encoder"]["weights"] == "LoRA (rank 64, alpha 16) on base vision_clip"
    assert parts["projector"] == {
        "weights": "trained", "trained": True, "base": None, "tensors": 4, "parameters": 7296,
        "bytes": 29184, "dtypes": ["float32"],
    }  # fmt: skip


def test_missing_bases_are_one_error_with_the_flags(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints / "qwen2_d_lora_vislora" / "iter_2.pth"
    done = subprocess.run(
        [sys.executable, "-m", "xtuner2llava", "convert", checkpoint, tmp_path / "out"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "2 faults" in done.stderr
    assert "bases/llm_qwen2" in done.stderr
    assert "bases/vision_clip" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_such_checkpoint_is_a_usage_error(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "nothing.pth")
    assert done.returncode == 2
    assert "no such file or folder" in done.stderr
    assert "Expected an iter_N.pth" in done.stderr


def test_unknown_options_are_usage_errors() -> None:
    assert run("convert", "--nonsense").returncode == 2
    assert run("plan", "x", "--dtype", "int8").returncode == 2


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "nothing.pth", "-v")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_out_that_is_not_empty_is_refused(arguments: list[object], tmp_path: Path) -> None:
    checkpoint, *options = arguments
    (tmp_path / "mine.txt").write_text("mine")
    done = run("convert", checkpoint, tmp_path, *options)
    assert done.returncode == 1
    assert "exists and is not empty" in done.stderr
    assert "--overwrite" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_folder_name_is_checked(arguments: list[object], tmp_path: Path) -> None:
    checkpoint, *options = arguments
    done = run("convert", checkpoint, tmp_path / "my-llama-model", *options)
    assert "Rename the folder" in done.stdout
    assert "lacks 'llava'" in done.stdout
    assert "contains 'llama'" in done.stdout


def test_mappings_are_listed_shown_and_checked(tmp_path: Path) -> None:
    listed = run("mappings", "list").stdout
    assert re.search(r"\nfamily +qwen2 +Qwen 1.5, 2, 2.5 +Qwen2ForCausalLM\n", listed)
    assert re.search(r"\nformat +hf +LlavaForConditionalGeneration\n", listed)
    assert "LlavaQwenForCausalLM" in listed
    shown = run("mappings", "show", "qwen2").stdout
    assert "becomes: qwen2" in shown
    mine = tmp_path / "mine.yaml"
    mine.write_text(shown)
    assert run("mappings", "check", mine).returncode == 0
    mine.write_text(shown.replace("schema: 1", "schema: 1\nschema: 1"))
    wrong = run("mappings", "check", mine)
    assert wrong.returncode == 1
    assert "mine.yaml:" in wrong.stderr
    near = run("mappings", "show", "qwen22")
    assert near.returncode == 1
    assert "Did you mean `qwen2`?" in near.stderr


def test_a_mapping_is_checked_against_a_checkpoint(arguments: list[object], tmp_path: Path) -> None:
    checkpoint, *options = arguments
    mine = tmp_path / "mine.yaml"
    mine.write_text(run("mappings", "show", "llama").stdout)
    done = run("mappings", "check", mine, checkpoint, *options[:4])
    assert done.returncode == 1
    assert "self_attn.q_proj.bias" in done.stderr


def test_a_mapping_that_fits_is_said_in_a_line(arguments: list[object], tmp_path: Path) -> None:
    checkpoint, *options = arguments
    mine = tmp_path / "mine.yaml"
    mine.write_text(run("mappings", "show", "qwen2").stdout)
    done = run("mappings", "check", mine, checkpoint, *options[:4])
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{mine}: fits {checkpoint}: ")
    as_json = run("mappings", "check", mine, checkpoint, *options[:4], "--json")
    assert len(json.loads(as_json.stdout)["tensors"]) == 114


def test_a_draft_is_not_wrapped(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["mappings", "draft", *map(str, arguments[:5])]
    draft = run(*words).stdout
    monkeypatch.setattr(commands, "columns", lambda _: 40)
    assert CliRunner().invoke(main, words).stdout == draft
    assert max(map(len, draft.splitlines())) > 40


def test_a_plan_is_a_line_for_each_way_and_the_tensors_are_asked_for(
    arguments: list[object], checkpoints: Path
) -> None:
    checkpoint, options = checkpoints / "qwen2_d_lora_vislora/iter_2.pth", arguments[1:]
    short = run("plan", checkpoint, *options).stdout
    assert re.search(
        r"\n  merged with LoRA +\d+ +[\d.]+ kB +llm_qwen2/\S+ and \S+iter_2.pth\n", short
    )
    assert re.search(r"\n  cast from float32 +4 +[\d.]+ kB +\S+iter_2.pth\n", short)
    assert "q_proj" not in short
    assert "model.layers.{0..2}.self_attn.q_proj.weight" in run(
        "plan", checkpoint, *options, "--tensors"
    ).stdout  # fmt: skip


def test_the_demo_runs_twice(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first, second = run("demo", folder), run("demo", folder)
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert "verified bit for bit" in first.stdout
    assert "already converted: nothing was written" in second.stdout
    assert "With your own checkpoint" in second.stdout
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/iter_2.pth").write_bytes(b"mine")
    assert run("demo", tmp_path / "mine").returncode == 1
    assert (tmp_path / "mine/iter_2.pth").read_bytes() == b"mine"


def test_help_answers_without_torch_or_transformers() -> None:
    code = (
        "import sys; from xtuner2llava.cli.commands import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_and_inspect_need_no_torch(checkpoints: Path) -> None:
    code = (
        "import sys; from xtuner2llava import inspect, plan\n"
        "inspect('qwen2_d_lora_vislora/iter_2.pth'); plan('qwen2_f_zero3_full/iter_2.pth')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkpoints, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_progress_bar_shows_on_a_terminal_only(arguments: list[object], tmp_path: Path) -> None:
    """As a program of its own: the others run in this process."""
    checkpoint, *options = arguments
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = ["convert", checkpoint, tmp_path / "llava-qwen2", *options]
    with (
        (tmp_path / "stdout").open("w") as stdout,
        subprocess.Popen(
            [sys.executable, "-m", "xtuner2llava", *map(str, command)],
            stdout=stdout,
            stderr=theirs,
        ) as process,
    ):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux ends a pseudo terminal with EIO.
            pass
        assert process.wait() == 0
    os.close(ours)
    assert b"write" in shown
    assert b"B/s" in shown
    assert b"open:" not in shown  # No lines of a log.
    assert "verified bit for bit" in (tmp_path / "stdout").read_text()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["conver", "a", "b"], "convert"),
        (["mapping"], "mappings"),
        (["mappings", "lst"], "list"),
        (["plan", "x", "--fromat", "hf"], "--format"),
        (["plan", "x", "--for", "vlm"], "vllm"),
        (["plan", "x", "--format", "lava"], "llava"),
        (["plan", "x", "--dtype", "flota16"], "float16"),
        (["verify", "x", "--model-type", "oficial"], "official"),
        (["mappings", "show", "qwen22"], "qwen2"),
    ],
)
def test_what_may_have_been_meant_is_said(words: list[str], meant: str) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == (1 if "show" in words else 2)
    assert re.search(rf"Did you mean[^?]*['`]{meant}['`]", done.stderr)


def test_nothing_is_suggested_for_what_is_like_nothing() -> None:
    for words in (["xyz"], ["plan", "x", "--dtype", "zzz"], ["plan", "x", "--zzz"]):
        assert "Did you mean" not in CliRunner().invoke(main, words).stderr


@pytest.mark.parametrize(
    ("typed", "incomplete", "expected"),
    [
        ([], "con", ["convert"]),
        (["mappings"], "s", ["show"]),
        (["convert"], "--vis", ["--vision", "--vision-lora-alpha", "--vision-tower-name"]),
        (["convert", "a", "b", "--for"], "llava", ["llava", "llava-next"]),
        (["plan", "x", "--dtype"], "f", ["float16", "float32"]),
        (["plan", "x", "--mapping"], "mis", ["mistral", "a file"]),
        (["mappings", "show"], "gemm", ["gemma", "a file"]),
        (["plan"], "it", ["a file"]),
        (["plan", "x", "--llm"], "", ["a file"]),
    ],
)
def test_shells_complete(typed: list[str], incomplete: str, expected: list[str]) -> None:
    complete = ShellComplete(main, {}, "xtuner2llava", "_XTUNER2LLAVA_COMPLETE")
    found = complete.get_completions(typed, incomplete)
    assert ["a file" if c.type == "file" else c.value for c in found] == expected


def test_json_of_a_mapping_that_is_checked_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("schema: 1\nfamily: mine\nextends: qwen2\n")
    ran = CliRunner().invoke(main, ["mappings", "check", str(file), "--json"])
    assert json.loads(ran.stdout) == {"file": str(file), "faults": []}
