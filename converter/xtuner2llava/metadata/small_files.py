"""The files of OUT that are not weights, as bytes: everything but the card and conversion.json."""

from __future__ import annotations

from pathlib import Path

from xtuner2llava.errors import UsageError
from xtuner2llava.metadata.redaction import published_config
from xtuner2llava.options import PathOrText
from xtuner2llava.planning.llava_config import json_bytes
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.published import published_json
from xtuner2llava.sources import Checkpoint
from xtuner2llava.storage.small_file import read_small
from xtuner2llava.writing import INDEX_NAME
from xtuner2llava.writing.disk import disk_errors

# Of a tokenizer's or processor's file; the largest vocabularies have a tenth of it.
_MAX_COPIED_BYTES = 256 << 20


def small_files(planned: Plan) -> dict[str, bytes]:
    """Configs, the index, and the files of tokenizer and processor, by name."""
    files = {
        "config.json": json_bytes(planned.config),
        "generation_config.json": json_bytes(planned.generation_config),
    }
    if planned.shards.index is not None:
        files[INDEX_NAME] = planned.shards.index
    return files | _files_of_bases(planned)


def _files_of_bases(planned: Plan) -> dict[str, bytes]:
    """Files of the base models, as they are or edited, without places on somebody's machine."""
    files = {path.name: read_small(path, _MAX_COPIED_BYTES) for path in planned.files}
    files |= {name: make() for name, make in planned.made_files.items()}
    return {
        name: published_json(data) if name.endswith("_config.json") else data
        for name, data in files.items()
    }


def xtuner_config_file(opened: Checkpoint, given: PathOrText | None) -> bytes:
    """The XTuner config as it may be published."""
    found = opened.artifact.config
    if given is not None:
        with disk_errors(Path(given), "cannot be read"):
            found = Path(given).read_text(encoding="utf-8-sig"), str(given)
    if found is None:
        raise UsageError(
            "there is no XTuner config to include",
            where="--include-xtuner-config",
            advice="Give it with --xtuner-config.",
        )
    return published_config(*found).encode("utf-8")
