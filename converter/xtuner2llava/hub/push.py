"""`push`, and publishing what a conversion has just written or writes shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, HubError, UsageError
from xtuner2llava.hub.errors import LOG_IN, hub_errors
from xtuner2llava.hub.folder import PublishableFolder, check_folder
from xtuner2llava.hub.upload import Destination, Pushed, Upload, open_upload
from xtuner2llava.mapping import Catalogue
from xtuner2llava.options import ConvertOptions, OnProgress
from xtuner2llava.storage.json_file import read_json, text
from xtuner2llava.writing import WrittenShard
from xtuner2llava.writing.out_record import RECORD_NAME
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
    files = check_folder(folder, lambda done, total: tell("check", done, total))
    return _publish(files, destination, jobs=jobs, on_progress=on_progress)


def _publish(
    files: PublishableFolder,
    destination: Destination,
    *,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """As `push_folder`, for files that are known to be right."""
    tell = on_progress or (lambda stage, done, total: None)
    folder = files.folder
    with open_upload(destination) as upload:
        for name in files.others:
            upload.add(name, (folder / name).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in files.shards}
        work = Work(jobs, sum(sizes.values()), lambda done, total: tell("upload", done, total))

        def send(name: str) -> None:
            upload.send(folder / name, name)
            work.advance(sizes[name])

        work.run(send, list(sizes))
        pushed = upload.commit()
    notes = [*pushed.notes, *_name_notes(folder, pushed.repo_id)]
    if files.unknown:
        names = ", ".join(files.unknown[:8])
        notes.append(f"Not published, as no conversion wrote it: {names}.")
    return replace(pushed, notes=tuple(notes))


def _name_notes(folder: Path, repo_id: str) -> list[str]:
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


def choose_destination(options: ConvertOptions) -> Destination | None:
    """Where a conversion is published; None if it is not. Raises `UsageError`."""
    if options.push_to_hub is not None:
        return Destination.of(options.push_to_hub, options)
    given = {
        "--private": options.private,
        "--revision": options.revision is not None,
        "--commit-message": options.commit_message is not None,
        "--low-disk": options.low_disk,
    }
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise UsageError(
            f"{' and '.join(names)} without a repository to publish to",
            where="--push-to-hub",
            advice="Give --push-to-hub owner/name too.",
        )
    return None


def check_access(destination: Destination) -> None:
    """Raises before hours of work if there is no valid token, or no such name can be."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with hub_errors(destination.repo_id):
        validate_repo_id(destination.repo_id)
        if get_token() is None:
            raise HubError("needs a token, and there is none", where="the Hub", advice=LOG_IN)
        HfApi().whoami()


def deliver_to(upload: Upload) -> Callable[[Path, WrittenShard, Callable[[int], None]], None]:
    """What sends each shard of `write_shards` away as soon as it is finished."""

    def deliver(path: Path, shard: WrittenShard, advance: Callable[[int], None]) -> None:
        upload.send(path, shard.filename)
        advance(shard.size)

    return deliver


def publish_small_files(upload: Upload, folder: Path) -> Pushed:
    """Makes the shards that were sent visible, together with all that lies in `folder` now."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            upload.add(path.name, path.read_bytes())
    return upload.commit()


def publish_converted(
    folder: Path,
    shards: tuple[str, ...],
    destination: Destination,
    *,
    jobs: int | None,
    on_progress: OnProgress | None,
) -> Pushed:
    """Publishes `folder`, which was just written; `shards` are the names of its weight files.

    An error says that `folder` is complete and how to go on.
    """
    others = tuple(sorted(path.name for path in folder.iterdir() if path.name not in shards))
    try:
        files = PublishableFolder(folder, shards, others, ())
        return _publish(files, destination, jobs=jobs, on_progress=on_progress)
    except ConversionError as error:
        rest = Fault(
            str(folder),
            "is complete, but not published",
            f"Go on with `xtuner2llava push {folder} {destination.repo_id}`.",
        )
        raise type(error).from_faults([*error.faults, rest]) from error
