"""Inputs are strangers': what a hostile folder holds is not followed, waited for, printed raw, or
opened for writing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from command import run
from reference.cases import CASES
from xtuner2llava import ConversionError, convert, inspect, plan
from xtuner2llava.cli.terminal import printable
from xtuner2llava.errors import CorruptFileError, UsageError
from xtuner2llava.metadata.card import read_card_template
from xtuner2llava.storage.small_file import read_small

CASE = "qwen2_e_full_fullvis"
SECRET = "-----BEGIN PRIVATE KEY-----"  # noqa: S105 - what must not come out


@pytest.fixture
def bases(checkpoints: Path, tmp_path: Path) -> dict[str, Path]:
    """The base models of the case, copied, to be made hostile."""
    case = CASES[CASE]
    found = {}
    for key, name in (("llm", case.llm), ("vision", case.vision)):
        found[key] = tmp_path / "bases" / key
        shutil.copytree(checkpoints / name, found[key])
    return found


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text(json.dumps({"auths": SECRET}))
    return path


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("llm", "chat_template.jinja"),
        ("llm", "merges.txt"),
        ("llm", "tokenizer.json"),
        ("llm", "tokenizer_config.json"),
        ("llm", "special_tokens_map.json"),
        ("llm", "added_tokens.json"),
        ("llm", "generation_config.json"),
        ("llm", "config.json"),
        ("vision", "config.json"),
        ("vision", "preprocessor_config.json"),
    ],
)
def test_a_link_to_a_secret_is_not_published(
    part: str, name: str, bases: dict[str, Path], secret: Path, checkpoints: Path, tmp_path: Path
) -> None:
    """Else whoever gives a folder away could have the converter's files pushed to the Hub."""
    path = bases[part] / name
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.raises(ConversionError, match="is a link that leads out of its folder") as caught:
        convert(checkpoints / CASE / "iter_2.pth", tmp_path / "llava-out", **bases)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "llava-out").exists()


def test_links_within_a_folder_are_followed(
    bases: dict[str, Path], checkpoints: Path, tmp_path: Path
) -> None:
    real = bases["llm"] / "real.json"
    (bases["llm"] / "tokenizer.json").rename(real)
    (bases["llm"] / "tokenizer.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(bases["llm"])
    options = {"llm": tmp_path / "link", "vision": bases["vision"], "vision_tower_name": "openai/x"}
    planned = plan(checkpoints / CASE / "iter_2.pth", **options)
    assert planned.files["tokenizer.json"] == real.read_bytes()


PIPES = """
import sys
from xtuner2llava import ConversionError, plan
checkpoint, vision, *folders = sys.argv[1:]
for folder in folders:
    try:
        plan(checkpoint, llm=folder, vision=vision, vision_tower_name="openai/x")
    except ConversionError as error:
        print(error.faults[0])
"""


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_not_waited_for(
    kind: str, bases: dict[str, Path], checkpoints: Path, tmp_path: Path
) -> None:
    folders = []
    for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        folders.append(tmp_path / name.partition(".")[0])
        path = shutil.copytree(bases["llm"], folders[-1]) / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(kind)
    checkpoint = checkpoints / CASE / "iter_2.pth"
    done = subprocess.run(
        [sys.executable, "-c", PIPES, checkpoint, bases["vision"], *folders],
        timeout=60,
        capture_output=True,
        text=True,
        check=True,
    )
    # What is no file is as good as not there, and only the config must be there.
    lines = [line for line in done.stdout.splitlines() if line.startswith("/")]
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / "config/config.json")]


def test_a_pipe_in_place_of_a_rank_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "iter_2.pth"
    folder.mkdir()
    os.mkfifo(folder / "mp_rank_00_model_states.pt")
    with pytest.raises(ConversionError, match="is not a plain file"):
        inspect(folder)


def test_small_files_are_small_and_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(CorruptFileError, match=r"a\.json: has more than 4 bytes"):
        read_small(path, 4)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptFileError, match="not a plain file"):
        read_small(tmp_path / "pipe", 4)
    with pytest.raises(CorruptFileError, match="No such file"):
        read_small(tmp_path / "b.json", 4)
    with pytest.raises(CorruptFileError, match="changed while it was read"):
        read_small(Path("/proc/self/status"), 1 << 20)  # Of no bytes, it says, and has some.


def test_a_small_file_takes_the_memory_of_its_size(tmp_path: Path) -> None:
    """Python allocates what it is asked to read, which is far more than most files have."""
    (tmp_path / "a.json").write_bytes(b"12345")
    tracemalloc.start()
    assert read_small(tmp_path / "a.json", 256 << 20) == b"12345"
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pipe", "not a plain file"),
        ("/dev/zero", "not a plain file"),
        ("large", "more than 1,048,576"),
    ],
)
def test_a_card_template_is_small_and_plain(kind: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to(kind)
    with pytest.raises(UsageError, match=said):
        read_card_template(path)


def test_a_card_template_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.md").write_text("# Mine\n")
    (tmp_path / "card.md").symlink_to("there/mine.md")
    assert read_card_template(tmp_path / "card.md") == "# Mine\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain → text, ─ and 中文\n\tand tabs", "plain → text, ─ and 中文\n\tand tabs"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\x08\x7f\x9b", "a\\rb\\x08\\x7f\\x9b"),
        ("\u202eevil", "\\u202eevil"),
        ("half a \ud83d", "half a \\ud83d"),
    ],
)
def test_terminals_are_not_given_commands(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_names_in_a_file_reach_the_terminal_as_text(tmp_path: Path) -> None:
    header = json.dumps({"\x1b]0;owned\x07\u202e": {"dtype": "F99"}}).encode()
    folder = tmp_path / "iter_2_xtuner" / "projector"
    folder.mkdir(parents=True)
    data = len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(data)
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, "-m", "xtuner2llava", "inspect", folder.parent],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 1
        assert b"\\x1b]0;owned\\x07\\u202e" in done.stderr
        assert b"\x1b]0" not in done.stderr and b"fault of xtuner2llava" not in done.stderr


def test_long_texts_in_a_file_do_not_flood_the_terminal(tmp_path: Path) -> None:
    described = {f"{number}": {"dtype": f"F99{number}"} for number in range(1000)}
    described["x" * 1_000_000] = {"dtype": "y" * 1_000_000}
    header = json.dumps(dict(reversed(described.items()))).encode()
    folder = tmp_path / "iter_2_xtuner" / "projector"
    folder.mkdir(parents=True)
    data = len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(data)
    done = run("inspect", folder.parent)
    assert done.returncode == 1
    assert "1001 faults" in done.stderr and "and 801 more" in done.stderr
    assert "characters ...]" in done.stderr
    assert len(done.stderr) < 200 * (len(str(tmp_path)) + 200)


AUDIT = """
import os, sys
opened = []
home = os.path.realpath(sys.argv[1])
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "os.link",
            "os.symlink", "os.chmod", "os.chown", "shutil.rmtree", "shutil.move")

def hook(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        paths = arguments[:1]
    elif event in CHANGING:
        paths = arguments
    else:
        return
    for path in paths:
        if isinstance(path, (str, bytes)) and os.path.realpath(os.fsdecode(path)).startswith(home):
            opened.append((event, os.fsdecode(path)))

sys.addaudithook(hook)
from pathlib import Path
from xtuner2llava import convert, inspect
checkpoint, llm, vision, out = map(Path, sys.argv[2:6])
options = dict(llm=llm, vision=vision, vision_tower_name="openai/x")
inspect(checkpoint, llm=llm, vision=vision)
for dtype, jobs in (("keep", 1), ("float16", 2)):
    convert(checkpoint, out, dtype=dtype, jobs=jobs, overwrite=True, **options)
print(opened)
(checkpoint.parent / "proof").open("w").close()
print(opened)
"""


def test_the_input_is_never_opened_for_writing(checkpoints: Path, tmp_path: Path) -> None:
    case = CASES["qwen2_d_lora_vislora"]
    home = tmp_path / "input"
    shutil.copytree(checkpoints / case.llm, home / "llm")
    shutil.copytree(checkpoints / case.vision, home / "vision")
    shutil.copy(checkpoints / "qwen2_d_lora_vislora" / "iter_2.pth", home)
    before = {path: path.stat() for path in home.rglob("*")}
    paths = (home / "iter_2.pth", home / "llm", home / "vision", tmp_path / "llava-out")
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, home, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    # The file that is opened at last shows that the audit would have seen the others.
    assert done.stdout.splitlines() == ["[]", str([("open", str(home / "proof"))])]
    for path, status in before.items():
        if path.is_dir():
            continue
        found = path.stat()
        assert (found.st_mtime_ns, found.st_size) == (status.st_mtime_ns, status.st_size)
