"""`conversion.json`: where the output came from, without a path or name of this machine."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import PurePath

from blake3 import blake3

from xtuner2llava.metadata.card import CARD_NAME
from xtuner2llava.metadata.version import version
from xtuner2llava.options import Options, decided, defaults
from xtuner2llava.planning.chat_template import prompt_text
from xtuner2llava.planning.config import json_bytes
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.redaction import redact_name, redact_text
from xtuner2llava.sources import Fingerprint, Part
from xtuner2llava.sources.artifact import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.storage.json_file import Json
from xtuner2llava.tensors import SourceFile
from xtuner2llava.writing import Written
from xtuner2llava.writing.out_record import RECORD_NAME, TOOL

# 2: BLAKE3 where 1 had SHA-256, and small files as objects, not as bare digests.
SCHEMA = 2


def open_record(plan: Plan, options: Options) -> bytes:
    """`conversion.json` as far as it is known before anything is written."""
    checkpoint = plan.checkpoint
    parts = {
        LLM: checkpoint.llm,
        VISUAL_ENCODER: checkpoint.visual_encoder,
        PROJECTOR: checkpoint.projector,
    }
    return json_bytes(
        {
            "schema": SCHEMA,
            "tool": {"name": TOOL, "version": version()},
            "checkpoint": {
                "layout": checkpoint.artifact.layout,
                "iteration": checkpoint.artifact.iteration,
                "files": _files(checkpoint.artifact.files),
            },
            "parts": {name: _part(part) for name, part in parts.items()},
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
                "prompt": prompt_text(plan.chat.prompt, "{question}") if plan.chat.prompt else None,
                "stop_words": list(plan.chat.stop_words),
            },
            "shards": [],
            "files": {
                name: {"blake3": blake3(data).hexdigest()} for name, data in plan.files.items()
            },
            "dropped": [
                {"component": component, "name": d.name, "because": d.because}
                for component, d in plan.dropped
            ],
            "nonfinite": [],
            "notes": [redact_text(note) for note in plan.notes],
            "xtuner_config": _training_config(plan),
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
    return plan.shards.fingerprint("\n".join([*made, *decisive])), described


def sources(plan: Plan) -> set[SourceFile]:
    """The files that tensors are read from."""
    return {piece.file for planned in plan.tensors for piece in planned.tensor.extents()}


def describe(record: Mapping[str, Json], times: Collection[SourceFile] = ()) -> dict[str, str]:
    """What a `conversion.json` says of what decides the bytes, each by what it is called.

    README.md is not among it unless it is made from the user's template: it may be edited, and says
    whether the output was verified. With the `times` of inputs, it holds for this machine only.
    """
    found = {"the version of xtuner2llava": _text(record, "tool")}
    chosen = record.get("options")
    options = chosen if isinstance(chosen, dict) else {}
    checkpoint = record.get("checkpoint")
    inputs: dict[str, list[str]] = {}
    for listed in (_items(checkpoint, "files"), record.get("base_files")):
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict):
                mark = f"{entry.get('bytes')} {entry.get('digest')}"
                inputs.setdefault(f"the input {entry.get('name')}", []).append(mark)
    for file in sorted(times, key=lambda file: file.path):
        mark = f"{file.path} {file.size} {file.mtime_ns}"
        inputs.setdefault(f"the input {file.path.name}", []).append(mark)
    files = record.get("files")
    small = {name: json.dumps(d, sort_keys=True) for name, d in files.items()} if isinstance(
        files, dict) else {}  # fmt: skip
    if "--card-template" not in options:
        small.pop(CARD_NAME, None)
    rest = ("parts", "mapping", "dtype", "dropped", "notes", "xtuner_config")
    return {
        **found,
        **{name: str(value) for name, value in {**defaults(), **options}.items()},
        **{name: ", ".join(marks) for name, marks in inputs.items()},
        **{f"{key} in conversion.json": _text(record, key) for key in rest},
        **small,
    }


def outcome(described: Mapping[str, str]) -> dict[str, str]:
    """What counts of `describe`: not how options are spelled, but what follows from them."""
    return {k: v for k, v in described.items() if not k.startswith("--") or k == "--weights"}


def _items(value: Json, key: str) -> Json:
    return value.get(key) if isinstance(value, dict) else None


def _text(record: Mapping[str, Json], key: str) -> str:
    return json.dumps(record.get(key), sort_keys=True)


def _part(part: Part) -> dict[str, Json]:
    record: dict[str, Json] = {
        "weights": redact_text(part.origin),
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


def _training_config(plan: Plan) -> Json:
    """What was read from the XTuner config, its paths made publishable."""
    training_config = plan.checkpoint.training_config
    if training_config is None:
        return None
    return {
        used.name: redact_name(used.value) if isinstance(used.value, str) else used.value
        for used in training_config.used
    }
