"""`push`, and publishing what a conversion has just written or writes shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from xtuner2llava.errors import ConversionError, Fault, HubError, UsageError
from xtuner2llava.hub.errors import LOG_IN, hub_errors
from xtuner2llava.hub.upload import Destination, Pushed, Upload, open_upload
from xtuner2llava.options import ConvertOptions, PushOptions
from xtuner2llava.verification.publishing import publishable_files
from xtuner2llava.writing import WrittenShard
from xtuner2llava.writing.jobs import Work


def push_folder(folder: Path, destination: Destination, options: PushOptions) -> Pushed:
    """Publishes `folder`, which `convert` wrote, after it has been checked against its record.

    Raises `VerificationError` before anything is sent, `HubError`
    if the Hub refuses; then the repository is what it was, and another call sends what is missing.
    """
    name = destination.repo_id.rpartition("/")[2]
    files = publishable_files(folder, name, partial(options.on_progress or _silent, "check"))
    pushed = _publish(folder, files.shards, files.others, destination, options)
    return replace(pushed, notes=(*pushed.notes, *files.notes))


def _publish(
    folder: Path,
    shards: Sequence[str],
    others: Sequence[str],
    destination: Destination,
    options: PushOptions,
) -> Pushed:
    with open_upload(destination) as upload:
        for name in others:
            upload.add(name, (folder / name).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in shards}
        on_progress = partial(options.on_progress or _silent, "upload")
        work = Work(options.jobs, sum(sizes.values()), on_progress)

        def send(name: str) -> None:
            upload.send(folder / name, name)
            work.advance(sizes[name])

        work.run(send, list(sizes))
        return upload.commit()


def _silent(stage: str, done: int, total: int) -> None:
    """Where no progress is asked for."""


def choose_destination(options: ConvertOptions) -> Destination | None:
    """Where a conversion is published; None if it is not.

    Raises `UsageError`, and `HubError` where nothing can be published there.
    """
    if options.push_to_hub is not None:
        destination = Destination.of(options.push_to_hub, options)
        _check_access(destination)
        return destination
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


def _check_access(destination: Destination) -> None:
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
    folder: Path, shards: tuple[str, ...], destination: Destination, options: PushOptions
) -> Pushed:
    """Publishes `folder`, which was just written; `shards` are the names of its weight files.

    An error says that `folder` is complete and how to go on.
    """
    others = tuple(sorted(path.name for path in folder.iterdir() if path.name not in shards))
    try:
        return _publish(folder, shards, others, destination, options)
    except ConversionError as error:
        rest = Fault(
            str(folder),
            "is complete, but not published",
            f"Go on with `xtuner2llava push {folder} {destination.repo_id}`.",
        )
        raise type(error).from_faults([*error.faults, rest]) from error
