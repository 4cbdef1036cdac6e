"""The same command again: nothing to do, goes on, or says what differs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from reference.cases import CASES
from xtuner2llava import OutputError, Report, convert
from xtuner2llava.cli.commands import main

CASE = "qwen2_b_full_frozenvis"
Convert = Callable[..., Report]


@pytest.fixture
def inputs(checkpoints: Path, tmp_path: Path) -> Path:
    """A folder with a checkpoint and its base models, which may be changed."""
    case, home = CASES[CASE], tmp_path / "inputs"
    shutil.copytree(checkpoints / case.llm, home / "llm")
    shutil.copytree(checkpoints / case.vision, home / "vision")
    shutil.copy(checkpoints / CASE / "iter_2.pth", home)
    return home


@pytest.fixture
def run(inputs: Path, tmp_path: Path) -> Convert:
    """Converts into tmp_path/out."""

    def call(checkpoint: Path = inputs / "iter_2.pth", **given: Any) -> Report:
        options = {"llm": inputs / "llm", "vision": inputs / "vision", "dtype": "keep", "jobs": 1,
                   "vision_tower_name": "openai/x", "max_shard_size": "100KB", **given}  # fmt: skip
        return convert(checkpoint, tmp_path / "out", **options)

    return call


@pytest.fixture
def interrupted(run: Convert, tmp_path: Path) -> Path:
    """An OUT.partial in which one shard is finished."""

    def stop(stage: str, done: int, total: int) -> None:
        if list(tmp_path.glob("out.partial/.xtuner2llava/records/*.json")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="same command again"):
        run(on_progress=stop)
    assert not (tmp_path / "out").exists()
    return tmp_path / "out.partial"


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
    }


def change(path: Path) -> None:
    """Other bytes, later."""
    data = path.read_bytes()
    path.write_bytes(data[:-4] + bytes(4))
    os.utime(path, (2e9, 2e9))


def test_the_same_command_again_has_nothing_to_do(run: Convert, tmp_path: Path) -> None:
    first = run()
    before = contents(tmp_path / "out")
    for same in ({}, {"jobs": 3, "max_memory": "300MB", "verify": False}, {"resume": True},
                 {"restart": True}, {"llm": os.path.relpath(tmp_path / "inputs/llm")}):  # fmt: skip
        again = run(**same)
        assert again.already_converted and again.to_dict()["already_converted"] is True
        assert not again.verified
        assert (again.files, again.blake3) == (first.files, first.blake3)
    assert contents(tmp_path / "out") == before
    assert not first.already_converted
    assert not run(overwrite=True).already_converted


def test_the_command_line_says_that_there_is_nothing_to_do(
    run: Convert, inputs: Path, tmp_path: Path
) -> None:
    run()
    command = ["convert", inputs / "iter_2.pth", tmp_path / "out", "--llm", inputs / "llm",
               "--vision", inputs / "vision", "--dtype", "keep", "--vision-tower-name",
               "openai/x", "--max-shard-size", "100KB"]  # fmt: skip
    done = CliRunner().invoke(main, [*map(str, command)])
    assert done.exit_code == 0
    assert "already converted: nothing was written" in done.stdout
    as_json = json.loads(CliRunner().invoke(main, [*map(str, command), "--json"]).stdout)
    assert as_json["already_converted"] is True
    other = CliRunner().invoke(main, [*map(str, command), "--no-include-vision-tower"])
    assert other.exit_code == 1
    assert "--include-vision-tower is True there, False here" in other.stderr


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dtype": "float16"}, "dtype is keep there, float16 here"),
        ({"max_shard_size": "1MB"}, "max_shard_size is 100KB there, 1MB here"),
        ({"vision_tower_name": "openai/y"}, "vision_tower_name is openai/x there, openai/y here"),
        ({"bos_token": "<|im_start|>"}, "bos_token is not given there, <|im_start|> here"),
        ({"format": "hf"}, "format is llava there, hf here"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_an_option_that_changes_the_bytes_is_named_with_both_values(
    given: dict[str, Any],
    named: str,
    finished: bool,
    run: Convert,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    if finished:
        run()
        folder = tmp_path / "out"
    else:
        folder = request.getfixturevalue("interrupted")
    before = contents(tmp_path / "out") if finished else None
    with pytest.raises(OutputError) as caught:
        run(**given)
    (fault,) = caught.value.faults
    assert named in fault.what
    assert ("overwrite=True" if finished else "restart=True") in fault.advice
    assert fault.where == str(folder)
    assert before is None or contents(folder) == before


@pytest.mark.parametrize("name", ["iter_2.pth", "vision/model.safetensors", "llm/tokenizer.json"])
@pytest.mark.parametrize("finished", [False, True])
def test_an_input_that_has_changed_is_named(
    name: str, finished: bool, run: Convert, request: pytest.FixtureRequest, inputs: Path
) -> None:
    run() if finished else request.getfixturevalue("interrupted")
    if name.endswith(".json"):
        (inputs / name).write_text((inputs / name).read_text() + "\n")
    else:
        change(inputs / name)
    with pytest.raises(OutputError) as caught:
        run()
    assert Path(name).name in caught.value.faults[0].what


def test_another_checkpoint_of_the_same_training_is_other_input(
    checkpoints: Path, run: Convert, tmp_path: Path
) -> None:
    """Their safetensors have the same names, sizes and headers, and may both be older than OUT."""
    from safetensors.torch import load_file, save_file

    one, other = tmp_path / "iter_1_xtuner", tmp_path / "iter_2_xtuner"
    shutil.copytree(checkpoints / CASE / "iter_2_xtuner", one)
    shutil.copytree(one, other)
    projector = load_file(other / "projector/model.safetensors")
    later = {name: tensor * 2 for name, tensor in projector.items()}
    save_file(later, other / "projector/model.safetensors", {"format": "pt"})
    run(checkpoint=one)
    assert run(checkpoint=one).already_converted
    with pytest.raises(OutputError, match=r"projector/model\.safetensors is not what it was"):
        run(checkpoint=other)


def test_going_on_keeps_what_is_finished(run: Convert, interrupted: Path) -> None:
    kept = {p.name: p.stat().st_ino for p in interrupted.glob("*.safetensors")}
    report = run(jobs=2, verify=False, max_memory="100MB")
    assert report.resumed and report.out is not None
    for name in report.resumed:
        assert (report.out / name).stat().st_ino == kept[name]


def test_restart_throws_away_what_was_finished(run: Convert, interrupted: Path) -> None:
    assert run(dtype="float16", restart=True).resumed == ()


@pytest.mark.parametrize("damage", ["config.json", "model-00001", "gone"])
def test_a_damaged_out_is_not_called_finished(damage: str, run: Convert, tmp_path: Path) -> None:
    run()
    shard = next((tmp_path / "out").glob("model-00001*"))
    if damage == "gone":
        shard.unlink()
    else:
        path = shard if damage == "model-00001" else tmp_path / "out" / damage
        path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(OutputError, match=r"is this conversion, but damaged: (config|model-00001)"):
        run()
    assert not run(overwrite=True).already_converted


def test_a_card_that_was_edited_is_left(run: Convert, tmp_path: Path) -> None:
    run()
    (tmp_path / "out/README.md").write_text("mine")
    (tmp_path / "out/notes.txt").write_text("mine too")
    assert run().already_converted
    assert (tmp_path / "out/README.md").read_text() == "mine"


def test_another_template_is_another_card(run: Convert, tmp_path: Path) -> None:
    template = tmp_path / "card.md"
    template.write_text("{{ usage }}")
    run(card_template=template)
    assert run(card_template=template).already_converted
    template.write_text("Mine. {{ usage }}")
    with pytest.raises(OutputError, match=r"README\.md is not what it was"):
        run(card_template=template)


def test_an_out_that_would_become_a_part_of_the_checkpoint(
    inputs: Path, checkpoints: Path, tmp_path: Path
) -> None:
    """The next conversion would take it for the trained tower."""
    folder = shutil.copytree(checkpoints / CASE / "iter_2_xtuner", tmp_path / "iter_2_xtuner")
    given = {"llm": inputs / "llm", "vision": inputs / "vision", "vision_tower_name": "openai/x"}
    with pytest.raises(OutputError, match="would be read as a part of the checkpoint"):
        convert(folder, folder / "visual_encoder", **given)
    assert not (folder / "visual_encoder").exists()
    assert convert(folder, folder / "llava-qwen", **given).out == folder / "llava-qwen"
