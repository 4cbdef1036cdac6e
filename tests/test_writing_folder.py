"""OUT appears as a whole or not at all, and nothing that is not ours is touched."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from xtuner2llava.errors import CorruptFileError, OutputError, PlanError, UsageError
from xtuner2llava.tensors import SourceFile
from xtuner2llava.writing import OutputFolder


def publish(out: Path, data: bytes = b"new", **options: bool) -> Path:
    with OutputFolder(out, "f", **options) as folder:
        folder.write_bytes("config.json", data)
        return folder.publish()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "no parent"])
def test_publishing(there: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out" if there == "no parent" else tmp_path / "out"
    if there == "an empty folder":
        out.mkdir()
    assert publish(out) == out
    assert names(out) == ["config.json"]
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
        folder.mark_finished("a", {"size": 1, "blake3": "00"})
        raise PlanError("overflow")
    assert folder.kept is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"(?s)not empty.*--overwrite"):
            publish(out, resume=resume)
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
    (out / "extra").write_text("x")
    publish(out, overwrite=True)
    assert names(tmp_path) == ["out", "out/config.json"]
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
    assert names(tmp_path) == ["out", "out/config.json"]


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
    assert names(tmp_path) == ["out.partial", "out.partial/config.json"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert publish(tmp_path / "out") == tmp_path / "disk"
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["config.json"]


def test_a_second_conversion_into_one_out_is_told(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "f") as first:
        first.write_bytes("a", b"1")
        for resume in (False, True):
            with pytest.raises(OutputError, match="another conversion is writing"):
                publish(tmp_path / "out", resume=resume)
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


def test_a_stale_partial_folder_of_ours_is_cleared(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out", "old")
    folder.__enter__()
    folder.write_bytes("stale", b"x")
    folder.write_bytes("sub/stale", b"x")
    folder.mark_finished("stale", {"size": 1, "blake3": "00"})
    folder._release()  # As the kernel does when a process is killed.
    with OutputFolder(tmp_path / "out", "new") as folder:
        assert folder.finished("stale") is None
        assert names(folder.path) == [
            ".xtuner2llava",
            ".xtuner2llava/lock",
            ".xtuner2llava/plan.json",
        ]


def test_resume_keeps_finished_files_only(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out", "f")
    folder.__enter__()
    for name in ("done", "short", "begun", "sub/begun"):
        folder.write_bytes(name, b"123")
    folder.mark_finished("done", {"size": 3, "blake3": "aa"})
    folder.mark_finished("short", {"size": 4, "blake3": "bb"})
    folder._release()
    with OutputFolder(tmp_path / "out", "f", resume=True) as folder:
        found = [folder.finished(name) for name in ("done", "short", "begun")]
        assert found == [{"size": 3, "blake3": "aa"}, None, None]
        assert not (folder.path / "begun").exists()
        assert not (folder.path / "sub").exists()
        folder.write_bytes("done", b"again")  # No longer what was finished.
        assert folder.finished("done") is None


def test_resume_without_anything_to_resume_starts_anew(tmp_path: Path) -> None:
    publish(tmp_path / "out", resume=True)
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize("record", [b"", b"[]", b'{"size": "1"}', b'{"blake3": "00"}', b"\xff"])
def test_a_damaged_record_means_unfinished(record: bytes, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "f") as folder:
        folder.write_bytes("a", b"1")
        folder.mark_finished("a", {"size": 1, "blake3": "00"})
        assert folder.finished("a") == {"size": 1, "blake3": "00"}
        (folder.path / ".xtuner2llava/finished/a.json").write_bytes(record)
        assert folder.finished("a") is None


def test_copies_are_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_bytes(bytes(range(256)) * 3000)
    (tmp_path / "empty").touch()
    with OutputFolder(tmp_path / "out", "f") as folder:
        folder.copy_file("tokenizer.json", SourceFile.of(source))
        folder.copy_file("sub/empty", SourceFile.of(tmp_path / "empty"))
        out = folder.publish()
    assert names(out) == ["sub", "sub/empty", "tokenizer.json"]
    assert (out / "tokenizer.json").read_bytes() == source.read_bytes()
    assert (out / "sub/empty").read_bytes() == b""


def test_a_changed_source_is_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_bytes(b"1")
    known = SourceFile.of(source)
    source.write_bytes(b"22")
    with OutputFolder(tmp_path / "out", "f") as folder, pytest.raises(CorruptFileError):
        folder.copy_file("tokenizer.json", known)


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
        with pytest.raises(OutputError, match="is no name for a file"):
            folder.write_bytes(name, b"x")
        assert names(tmp_path) == before


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
