"""The small files that describe the output, without a path or a name of this machine.

`conversion.json` says where it came from, and so whether an OUT that is there is this conversion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from os import PathLike
from pathlib import Path, PurePath

from blake3 import blake3

from xtuner2llava import __version__
from xtuner2llava.errors import OutputError
from xtuner2llava.metadata.card import model_card
from xtuner2llava.metadata.front_matter import CARD_NAME
from xtuner2llava.options import ConvertOptions, Options, decided, defaults
from xtuner2llava.planning.chat_template import prompt_text
from xtuner2llava.planning.config import json_bytes
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.redaction import redact_name, redactor
from xtuner2llava.sources.part import Part
from xtuner2llava.storage.fingerprint import Fingerprint
from xtuner2llava.storage.json_file import Json, items, table
from xtuner2llava.tensors.files import SourceFile
from xtuner2llava.writing.out_record import RECORD_NAME, TOOL, differences, read_record
from xtuner2llava.writing.writer import Written

# 2: BLAKE3 where 1 had SHA-256, and small files as objects, not as bare digests.
SCHEMA = 2


def with_metadata(plan: Plan, options: ConvertOptions, template: str | None) -> Plan:
    """`plan` with all files of the output; `with_closed_record` adds what writing says.

    `template` is the user's card.
    """
    card = model_card(plan, options, template).encode("utf-8", "backslashreplace")
    plan = replace(plan, files={**plan.files, CARD_NAME: card})
    return replace(plan, files={**plan.files, RECORD_NAME: _open_record(plan, options)})


def _open_record(plan: Plan, options: Options) -> bytes:
    """`conversion.json` as far as it is known before anything is written."""
    checkpoint, config, prompt = plan.checkpoint, plan.checkpoint.training_config, plan.chat.prompt
    redact = redactor(plan, options)
    return json_bytes(
        {
            "schema": SCHEMA,
            "tool": {"name": TOOL, "version": __version__},
            "checkpoint": {
                "layout": checkpoint.artifact.layout,
                "iteration": checkpoint.artifact.iteration,
                "files": _files(checkpoint.artifact.files),
            },
            "parts": {name: _part(part, redact) for name, part in checkpoint.parts.items()},
            "base_files": _files(checkpoint.base_files),
            "mapping": {
                "family": plan.mapping.family,
                "becomes": plan.mapping.target_class,
                "format": plan.mapping.format,
                "files": [{"name": f.name, "sha256": f.sha256} for f in plan.mapping.files],
            },
            **plan.fidelity.to_dict(),
            "dtype": plan.dtype,
            "options": {
                name: redact_name(str(value)) if isinstance(value, str | PathLike) else value
                for name, value in decided(options).items()
            },
            "chat": {
                "template": plan.chat.template,
                "prompt": prompt_text(prompt, "{question}") if prompt else None,
                "stop_words": list(plan.chat.stop_words),
            },
            "shards": [],
            "files": {
                name: {"blake3": blake3(data).hexdigest()} for name, data in plan.files.items()
            },
            "dropped": plan.to_dict()["dropped"],
            "nonfinite": [],
            "notes": [*map(redact, plan.notes)],
            "xtuner_config": config
            and {
                name: redact_name(value) if isinstance(value, str) else value
                for name, value in config.used.items()
            },
        }
    )


def with_closed_record(files: Mapping[str, bytes], written: Written) -> dict[str, bytes]:
    """`files` with what only writing says in the record: the shards, and NaN that was there."""
    values = json.loads(files[RECORD_NAME])
    values["shards"] = [
        {"file": shard.filename, "bytes": shard.size, "blake3": shard.blake3}
        for shard in written.shards
    ]
    values["nonfinite"] = [
        {"name": each.name, "nan": each.nan, "infinite": each.infinite}
        for each in written.nonfinite
    ]
    return {**files, RECORD_NAME: json_bytes(values)}


def identity(plan: Plan) -> tuple[str, dict[str, str]]:
    """A hash that differs whenever files of OUT would, and what decides them, as texts by name."""
    described = describe(json.loads(plan.files[RECORD_NAME]), sources(plan))
    made = [f"{p.name} {p.component} {','.join(p.sources)} {p.rule}" for p in plan.tensors]
    decisive = sorted(f"{key} {value}" for key, value in outcome(described).items())
    # Paths may have bytes that are not UTF-8.
    text = "\n".join([*made, *decisive]).encode("utf-8", "backslashreplace").decode()
    return plan.shards.fingerprint(text), described


def sources(plan: Plan) -> set[SourceFile]:
    """The files that tensors are read from."""
    return {piece.file for planned in plan.tensors for piece in planned.tensor.extents()}


def describe(record: Mapping[str, Json], times: Collection[SourceFile] = ()) -> dict[str, str]:
    """What a `conversion.json` says of what decides the bytes, each by what it is called.

    README.md is not among it unless it is made from the user's template: it may be edited, and says
    whether the output was verified. With the `times` of inputs, it holds for this machine only.
    """

    def told(key: str) -> str:
        return json.dumps(record.get(key), sort_keys=True)

    options, small = table(record, "options"), table(record, "files")
    if "--card-template" not in options:
        small = {name: value for name, value in small.items() if name != CARD_NAME}
    inputs: dict[str, list[str]] = {}
    marks = [
        *(
            (each.get("name"), f"{each.get('bytes')} {each.get('digest')}")
            for place, key in ((table(record, "checkpoint"), "files"), (record, "base_files"))
            for each in _tables(place, key)
        ),
        *(
            (f.path.name, f"{f.path} {f.size} {f.mtime_ns}")
            for f in sorted(times, key=attrgetter("path"))
        ),
    ]
    for name, mark in marks:
        inputs.setdefault(f"the input {name}", []).append(mark)
    rest = ("parts", "mapping", "dtype", "dropped", "notes", "xtuner_config")
    return {
        "the version of xtuner2llava": told("tool"),
        **{name: str(value) for name, value in {**defaults(), **options}.items()},
        **{name: ", ".join(listed) for name, listed in inputs.items()},
        **{f"{key} in conversion.json": told(key) for key in rest},
        **{name: json.dumps(value, sort_keys=True) for name, value in small.items()},
    }


def outcome(described: Mapping[str, str]) -> dict[str, str]:
    """What counts of `describe`: not how options are spelled, but what follows from them."""
    return {k: v for k, v in described.items() if not k.startswith("--") or k == "--weights"}


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A folder that holds a conversion: its files with their sizes, and its closed record."""

    files: Mapping[str, int]
    record: Mapping[str, Json]

    @property
    def blake3(self) -> dict[str, str]:
        """Those of the shards, as recorded."""
        return {
            str(each["file"]): str(each.get("blake3"))
            for each in _tables(self.record, "shards")
            if "file" in each
        }

    @property
    def nonfinite(self) -> tuple[tuple[str, int, int], ...]:
        """Tensors with NaN or infinite values, and how many of each."""
        return tuple(
            (name, nan, infinite)
            for each in _tables(self.record, "nonfinite")
            if isinstance(name := each.get("name"), str)
            and isinstance(nan := each.get("nan"), int)
            and isinstance(infinite := each.get("infinite"), int)
        )


def finished_output(out: Path, plan: Plan) -> FinishedOutput | None:
    """The conversion in `out` if it is the planned one; None if `out` holds no conversion.

    Names, sizes and small files are checked; shards are not read. Raises `OutputError` for another
    conversion, with what differs, and for a damaged one.
    """
    record = read_record(out)
    if record is None:
        return None
    shards = _tables(record, "shards")
    sizes = {str(each["file"]): each.get("bytes") for each in shards if "file" in each}
    there, here = describe(record), describe(json.loads(plan.files[RECORD_NAME]))
    what = "" if outcome(there) == outcome(here) else differences(there, here)
    if not what and sizes != {shard.filename: shard.size for shard in plan.shards.shards}:
        what = differences(there, here) or "its shards are different"
    if not what:
        written = (out / RECORD_NAME).stat().st_mtime_ns
        newer = sorted(file.path.name for file in sources(plan) if file.mtime_ns > written)
        what = f"{newer[0]} was changed after that" if newer else ""
    what = what and f"was converted from other input or with other options: {what}"
    if not what and (damage := "; ".join(_damage(out, plan))):
        what = f"is this conversion, but damaged: {damage}"
    if what:
        advice = "Choose another OUT, or replace it with --overwrite."
        raise OutputError(what, where=str(out), advice=advice)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
    return FinishedOutput(files, record)


def _damage(out: Path, plan: Plan) -> Iterator[str]:
    """What is missing or has changed; README.md may have been edited."""
    sizes = {shard.filename: shard.size for shard in plan.shards.shards}
    for name in (*sizes, *plan.files):
        path = out / name
        if not path.is_file():
            yield f"{name} is missing"
        elif name in sizes and path.stat().st_size != sizes[name]:
            yield f"{name} has {path.stat().st_size:,} bytes, expected {sizes[name]:,}"
        elif name not in (*sizes, CARD_NAME, RECORD_NAME) and (
            path.stat().st_size != len(plan.files[name]) or path.read_bytes() != plan.files[name]
        ):
            yield f"{name} has changed"


def _tables(values: Mapping[str, Json], key: str) -> list[dict[str, Json]]:
    """The objects in the list under `key` of a record, which may be damaged."""
    return [each for each in items(values, key) if isinstance(each, dict)]


def _part(part: Part, redact: Callable[[str], str]) -> dict[str, Json]:
    record: dict[str, Json] = {
        "weights": redact(part.origin),
        "trained": part.trained,
        "base": redact_name(part.name) if part.name is not None else None,
    }
    if part.adapter is not None and part.adapter.settings is not None:
        used = part.adapter.settings
        record["lora"] = {
            "ranks": list(part.adapter.ranks),
            "alpha": used.alpha,
            "alpha_pattern": dict(used.alpha_pattern),
            "use_rslora": used.use_rslora,
            "use_dora": used.use_dora,
            "recorded_in": PurePath(used.where).name,
        }
    return record


def _files(files: Sequence[Fingerprint]) -> list[Json]:
    return [{"name": f.name, "bytes": f.size, "digest": f.digest} for f in files]
