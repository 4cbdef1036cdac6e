"""OUT appears as a whole or not at all, and nothing that is not ours is touched."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from xtuner2llava.errors import OutputError, PlanError, UsageError
from xtuner2llava.writing.folder import OutputFolder
from xtuner2llava.writing.target import Target


def publish(out: Path, data: bytes = b"new", **options: bool) -> Path:
    with OutputFolder(out, "f", **options) as folder:
        folder.write_bytes("config.json", data)
        folder.write_bytes("conversion.json", RECORD)
        return folder.publish()


RECORD = json.dumps(
    {"tool": {"name": "xtuner2llava"}, "shards": [{"file": "m"}], "files": {"config.json": {}}}
).encode()
WRITTEN = ["config.json", "conversion.json"]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "no parent"])
def test_publishing(there: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out" if there == "no parent" else tmp_path / "out"
    if there == "an empty folder":
        out.mkdir()
    assert publish(out) == out
    assert names(out) == WRITTEN
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_out_does_not_exist_before_it_is_published(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "f") as folder:
        folder.write_bytes("config.json", b"{}")
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial/config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("error", [PlanError("x"), KeyboardInterrupt(), None])
def test_leaving_early_removes_what_cannot_be_resumed(
    error: BaseException | None, tmp_path: Path
) -> None:
    def leave() -> None:
        with OutputFolder(tmp_path / "out", "f") as folder:
            folder.write_bytes("config.json", b"{}")
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            leave()
    else:
        leave()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_file_does_not_keep_a_plan_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(PlanError), OutputFolder(tmp_path / "out", "f") as folder:
        folder.write_bytes("a", b"1")
        folder.state.set_record("a", {"size": 1, "finished": True})
        raise PlanError("overflow")
    assert folder.kept is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"not empty, and has no conversion.json"):
            publish(out, overwrite=overwrite)
    assert names(tmp_path) == ["out", "out/mine"]


def test_a_file_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        publish(out, overwrite=True)
    assert out.read_text() == "x"


def test_the_root_is_no_output_folder() -> None:
    with pytest.raises(UsageError):
        OutputFolder("/", "f")


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, b"old")
    with pytest.raises(OutputError, match=r"(?s)another conversion wrote it.*--overwrite"):
        publish(out)
    publish(out, overwrite=True)
    assert names(tmp_path) == ["out", "out/config.json", "out/conversion.json"]
    assert (out / "config.json").read_bytes() == b"new"


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, b"old")
    with (
        pytest.raises(KeyboardInterrupt),
        OutputFolder(out, "f", overwrite=True) as folder,
    ):
        folder.write_bytes("config.json", b"new")
        raise KeyboardInterrupt
    assert (out / "config.json").read_bytes() == b"old"
    assert names(tmp_path) == ["out", "out/config.json", "out/conversion.json"]


@pytest.mark.parametrize("inside", ["llm", "llm/model.safetensors", "."])
def test_overwrite_does_not_remove_what_is_read(inside: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "llm").mkdir(parents=True)
    (out / "llm/model.safetensors").touch()
    with (
        pytest.raises(OutputError, match="which is read"),
        OutputFolder(out, "f", overwrite=True, protected=[out / inside]),
    ):
        pass
    assert names(out) == ["llm", "llm/model.safetensors"]


def test_what_an_interrupted_overwrite_left_is_not_removed(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    (tmp_path / "out.replaced").mkdir()
    with pytest.raises(OutputError, match="interrupted --overwrite"):
        publish(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.replaced").is_dir()


def test_a_complete_folder_that_cannot_be_renamed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    with pytest.raises(OutputError, match=r"complete, but cannot be renamed to this .busy."):
        monkeypatch.setattr(Path, "rename", refuse)
        publish(tmp_path / "out")
    assert names(tmp_path) == ["out.partial", *(f"out.partial/{name}" for name in WRITTEN)]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert publish(tmp_path / "out") == tmp_path / "disk"
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == WRITTEN


def test_a_second_conversion_into_one_out_is_told(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "f") as first:
        first.write_bytes("a", b"1")
        for restart in (False, True):
            with pytest.raises(OutputError, match="another conversion is writing"):
                publish(tmp_path / "out", restart=restart)
        assert (first.path / "a").read_bytes() == b"1"
        first.publish()
    assert names(tmp_path / "out") == ["a"]


def test_a_partial_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine").write_text("x")
    with pytest.raises(OutputError, match="no conversion left it there"):
        publish(tmp_path / "out")
    assert names(partial) == ["mine"]


def test_a_partial_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="no conversion left it there"):
        publish(tmp_path / "out")


@pytest.mark.parametrize("name", ["records", "attempts-1"])
def test_a_state_with_a_link_to_another_folder_is_left_alone(name: str, tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    state, others = tmp_path / "out.partial/.xtuner2llava", tmp_path / "thesis"
    others.mkdir()
    (others / "done.json").write_text("years")
    if name == "records":
        shutil.rmtree(state / name)
    (state / name).symlink_to(others)
    with pytest.raises(OutputError, match="is in the way"):
        publish(tmp_path / "out", restart=True)
    assert names(others) == ["done.json"]


def test_a_stale_partial_folder_of_ours_is_cleared(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out", "old")
    folder.__enter__()
    folder.write_bytes("stale", b"x")
    folder.write_bytes("sub/stale", b"x")
    folder.state.set_record("stale", {"size": 1, "finished": True})
    folder.state.unlock()  # As the kernel does when a process is killed.
    with OutputFolder(tmp_path / "out", "new", restart=True) as folder:
        assert folder.state.record("stale") is None
        assert names(folder.path) == [
            ".xtuner2llava",
            ".xtuner2llava/files",
            ".xtuner2llava/lock",
            ".xtuner2llava/plan.json",
        ]


def test_resume_keeps_finished_files_only(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out", "f")
    folder.__enter__()
    for name in ("done", "short", "begun", "sub/begun"):
        folder.write_bytes(name, b"123")
    folder.state.set_record("done", {"size": 3, "finished": True})
    folder.state.set_record("short", {"size": 4, "finished": True})
    folder.state.unlock()
    with OutputFolder(tmp_path / "out", "f") as folder:
        found = [folder.state.record(name) for name in ("done", "short", "begun")]
        assert found == [{"size": 3, "finished": True}, None, None]
        assert folder.state.finished() == ["done"]
        assert not (folder.path / "begun").exists()
        assert not (folder.path / "sub").exists()
        folder.write_bytes("done", b"again")  # No longer what was finished.
        assert folder.state.record("done") is None


def test_an_empty_partial_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    publish(tmp_path / "out")
    assert names(tmp_path / "out") == WRITTEN


@pytest.mark.parametrize("record", [b"", b"[]", b'{"size": "1"}', b'{"blake3": "00"}', b"\xff"])
def test_a_damaged_record_means_unfinished(record: bytes, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "f") as folder:
        folder.write_bytes("a", b"1")
        folder.state.set_record("a", {"size": 1, "finished": True})
        assert folder.state.record("a") == {"size": 1, "finished": True}
        (folder.path / ".xtuner2llava/records/a.json").write_bytes(record)
        assert folder.state.record("a") is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../x",
        "/x",
        "a//x",
        "a/b/c",
        "a/",
        "a\\b",
        "a\0b",
        ".xtuner2llava/x",
    ],
)
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "f") as folder:
        before = names(tmp_path)
        with pytest.raises(OutputError, match="is not a name for a file"):
            folder.write_bytes(name, b"x")
        assert names(tmp_path) == before


def leave_unfinished(out: Path, *, described: dict[str, str] | None = None) -> None:
    """What a killed run leaves: one file that is finished, one with progress, one without."""
    folder = OutputFolder(out, "f", described=described or {}).__enter__()
    for name in ("done", "half", "begun"):
        folder.write_bytes(name, b"123")
    folder.state.set_record("done", {"size": 3, "finished": True})
    folder.state.set_record("half", {"size": 2, "finished": False})
    folder.state.unlock()


def test_going_on_keeps_what_is_finished_and_what_has_progress(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    with OutputFolder(tmp_path / "out", "f") as folder:
        assert {path.name for path in folder.path.iterdir()} == {".xtuner2llava", "done", "half"}
        assert folder.state.finished() == ["done"]


def test_another_conversion_is_not_thrown_away_and_what_differs_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    leave_unfinished(out, described={"--dtype": "float16", "the input a.pth": "1", "same": "x"})
    here = {"--dtype": "bfloat16", "the input a.pth": "1", "same": "x"}
    for overwrite in (False, True):
        with (
            pytest.raises(
                OutputError, match=r"(?s)--dtype is float16 there, bfloat16 here.*--rest"
            ),
            OutputFolder(out, "other", described=here, overwrite=overwrite),
        ):
            pass
    changed = {"--dtype": "float16", "the input a.pth": "2", "same": "x"}
    with (
        pytest.raises(OutputError, match=r"options: the input a.pth is not what it was\n"),
        OutputFolder(out, "third", described=changed),
    ):
        pass
    assert (tmp_path / "out.partial/done").exists()
    with OutputFolder(out, "other", described=here, restart=True) as folder:
        assert names(folder.path) == [
            ".xtuner2llava", *(f".xtuner2llava/{n}" for n in ("files", "lock", "plan.json")),
        ]  # fmt: skip


def thesis(folder: Path) -> None:
    (folder / "thesis.tex").write_text("years")


def thesis_in_a_folder(folder: Path) -> None:
    (folder / "notes").mkdir()
    thesis(folder / "notes")


def link_to_a_folder(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


def empty_folder(folder: Path) -> None:
    (folder / "later").mkdir()


@pytest.mark.parametrize("add", [thesis, thesis_in_a_folder, link_to_a_folder, empty_folder])
@pytest.mark.parametrize("unfinished", [False, True])
def test_files_of_the_user_in_a_folder_of_ours_are_named_and_stay(
    add: Callable[[Path], None], unfinished: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = tmp_path / "out.partial" if unfinished else out
    leave_unfinished(out) if unfinished else publish(out)
    add(folder)
    before = names(tmp_path)
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"no conversion wrote: (thesis|notes|more/|later/)"):
            publish(out, overwrite=True, restart=restart)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "record",
    [
        b"", b"[]", b"{}", b'{"tool": {"name": "xtuner2llava"}}', b"[" * 100_000,
        RECORD.replace(b"xtuner2llava", b"another"), RECORD.replace(b'[{"file": "m"}]', b"[]"),
        RECORD.replace(b'{"config.json": {}}', b"5"), None,
    ],
)  # fmt: skip
def test_a_conversion_json_of_somebody_else_makes_no_folder_ours(
    record: bytes | None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if record is None:  # A link to a right one says nothing of this folder.
        (tmp_path / "right.json").write_bytes(RECORD)
        (out / "conversion.json").symlink_to(tmp_path / "right.json")
    else:
        (out / "conversion.json").write_bytes(record)
    with pytest.raises(OutputError, match=r"has no conversion.json of xtuner2llava"):
        publish(out, overwrite=True)
    assert names(out) == ["conversion.json"]


@pytest.mark.parametrize("name", ["../thesis/1", "/{}/thesis/1", "a/../../thesis/1", "a/b/../1"])
@pytest.mark.parametrize("kind", ["shard", "file"])
def test_a_record_with_names_that_leave_the_folder_removes_nothing(
    kind: str, name: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for folder in (out / "a" / "b", tmp_path / "thesis"):
        folder.mkdir(parents=True)
    (tmp_path / "thesis/1").write_text("years")
    shard, file = [name.format(tmp_path), "config.json"][:: 1 if kind == "shard" else -1]
    record = {"tool": {"name": "xtuner2llava"}, "shards": [{"file": shard}], "files": {file: {}}}
    (out / "conversion.json").write_text(json.dumps(record))
    before = names(tmp_path)
    with pytest.raises(OutputError, match=r"has no conversion.json of xtuner2llava"):
        publish(out, overwrite=True)
    assert names(tmp_path) == before


def test_a_link_to_a_folder_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    thesis(tmp_path / "home")
    (tmp_path / "out").symlink_to(tmp_path / "home")
    with pytest.raises(OutputError, match=r"has no conversion.json"):
        publish(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["home", "home/thesis.tex", "out"]


@pytest.mark.parametrize("name", ["thesis.tex", "lock/thesis.tex"])
def test_a_user_may_have_a_folder_of_our_state_s_name(name: str, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / ".xtuner2llava" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("years")
    with pytest.raises(OutputError, match=r"in the way|cannot be locked"):
        publish(tmp_path / "out", restart=True)
    assert mine.read_text() == "years"


def test_what_appears_in_out_while_it_is_replaced_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the removal: there, only the files of the record are removed."""
    out = tmp_path / "out"
    publish(out, b"old")
    real = Target.remove_replaced

    def meanwhile(self: Target) -> None:
        thesis(tmp_path / "out.replaced")
        real(self)

    monkeypatch.setattr(Target, "remove_replaced", meanwhile)
    with pytest.raises(OutputError, match=r"thesis.tex.*so this old folder stays; .* is complete"):
        publish(out, overwrite=True)
    assert (out / "config.json").read_bytes() == b"new"
    assert names(tmp_path / "out.replaced") == [*WRITTEN, "thesis.tex"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(tmp_path / "old", b"old").rename(tmp_path / "out.replaced")
    leave_unfinished(out)
    (tmp_path / "out.partial/.xtuner2llava").rename(tmp_path / "out.partial.state")
    publish(out, overwrite=True)
    assert (out / "config.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9000, 6600, 2400))
    with OutputFolder(tmp_path / "out", "f") as folder:
        folder.require_space(2400)
        with pytest.raises(OutputError) as caught:
            folder.require_space(2401)
    (fault,) = caught.value.faults
    assert fault.what == "2,401 bytes are still to be written, the disk has 2,400 bytes free"
    assert fault.advice == "Free 1 bytes there, or choose an OUT on another disk."
