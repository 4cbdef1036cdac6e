"""`push`: a converted folder to the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from xtuner2llava.hub.contents import RECORD_NAME, Contents, check_folder
from xtuner2llava.hub.destination import Destination, Pushed
from xtuner2llava.hub.upload import Upload
from xtuner2llava.mapping import Catalogue
from xtuner2llava.options import OnProgress
from xtuner2llava.sources.json_file import read_json, text
from xtuner2llava.writing.work import Work


def push_folder(
    folder: Path,
    destination: Destination,
    *,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Publishes `folder`, which `convert` wrote, after it has been checked against its record.

    `jobs` files are sent at once. Raises `VerificationError` before anything is sent, `HubError`
    if the Hub refuses; then the repository is what it was, and another call sends what is missing.
    """
    tell = on_progress or (lambda stage, done, total: None)
    contents = check_folder(folder, lambda done, total: tell("check", done, total))
    return push_contents(contents, destination, jobs=jobs, on_progress=on_progress)


def push_contents(
    contents: Contents,
    destination: Destination,
    *,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """As `push_folder`, for contents that are known to be right."""
    tell = on_progress or (lambda stage, done, total: None)
    folder = contents.folder
    with Upload(destination) as upload:
        for name in contents.others:
            upload.add(name, (folder / name).read_bytes())
        sizes = {name: contents.size(name) for name in contents.shards}
        work = Work(jobs, sum(sizes.values()), lambda done, total: tell("upload", done, total))
        work.run(
            lambda name: upload.send(folder / name, name, advance=work.advance),
            list(sizes),
        )
        pushed = upload.commit()
    return replace(pushed, notes=(*pushed.notes, *_notes(contents, pushed.repo_id)))


def _notes(contents: Contents, repo_id: str) -> list[str]:
    notes = []
    if contents.strange:
        names = ", ".join(contents.strange[:8])
        notes.append(f"Not published, as no conversion wrote it: {names}.")
    return [*notes, *name_notes(contents.folder, repo_id)]


def name_notes(folder: Path, repo_id: str) -> list[str]:
    """Whether LLaVA finds the right class under the repository's name, from the folder's record."""
    mapping = read_json(folder / RECORD_NAME).get("mapping")
    named = mapping if isinstance(mapping, dict) else {}
    formats = Catalogue.shipped().formats
    format_name = text(named, "format") or ""
    classes = formats[format_name].classes if format_name in [*formats] else {}
    target = classes.get(text(named, "becomes") or "")
    name = repo_id.rpartition("/")[2]
    if target is None or target.folder_name.fits(name):
        return []
    reasons = [f"lacks '{word}'" for word in target.folder_name.missing(name)]
    reasons += [f"contains '{word}'" for word in target.folder_name.wrong(name)]
    return [
        f"LLaVA chooses the class by the name, and '{name}' {' and '.join(reasons)}: give "
        "load_pretrained_model another model_name, as README.md does."
    ]
