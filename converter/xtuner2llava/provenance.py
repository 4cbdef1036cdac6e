"""`conversion.json`: where the output came from, without a path or name of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blake3 import blake3

from xtuner2llava.planning.plan import Plan
from xtuner2llava.published import published_name, published_text
from xtuner2llava.sources import Fingerprint, Part
from xtuner2llava.sources.contents import LLM, PROJECTOR, VISUAL_ENCODER
from xtuner2llava.sources.json_file import Json

# 2: BLAKE3 where 1 had SHA-256, and small files as objects, not as bare digests.
SCHEMA = 2


def provenance(
    plan: Plan,
    version: str,
    shards: Sequence[tuple[str, int, str]],
    files: Mapping[str, bytes],
    nonfinite: Sequence[tuple[str, int, int]],
) -> dict[str, Json]:
    """The content of `conversion.json`.

    `shards` are (file name, bytes, BLAKE3); `files` the small files as written; `nonfinite` the
    tensors with NaN or infinite values, which the checkpoint already had: (name, NaN, infinite).
    """
    checkpoint = plan.checkpoint
    parts = {
        LLM: checkpoint.llm,
        VISUAL_ENCODER: checkpoint.visual_encoder,
        PROJECTOR: checkpoint.projector,
    }
    dropped: list[Json] = [
        {"component": component, "name": d.name, "because": d.because}
        for component, d in plan.dropped
    ]
    shard_list: list[Json] = [
        {"file": name, "bytes": size, "blake3": digest} for name, size, digest in shards
    ]
    return {
        "schema": SCHEMA,
        "tool": {"name": "xtuner2llava", "version": version},
        "checkpoint": {
            "layout": checkpoint.contents.layout,
            "iteration": checkpoint.contents.iteration,
            "files": _files(checkpoint.contents.files),
        },
        "parts": {name: _part(part) for name, part in parts.items()},
        "base_files": _files(checkpoint.base_files),
        "mapping": {
            "family": plan.mapping.family,
            "becomes": plan.mapping.becomes,
            "format": plan.mapping.format,
            "files": [{"name": f.name, "sha256": f.sha256} for f in plan.mapping.files],
        },
        **plan.verdict.to_dict(),
        "dtype": plan.dtype,
        "chat": {"template": plan.chat.template, "stop_words": list(plan.chat.stop_words)},
        "shards": shard_list,
        "files": {n: {"blake3": blake3(data).hexdigest()} for n, data in sorted(files.items())},
        "dropped": dropped,
        "nonfinite": [{"name": n, "nan": nan, "infinite": inf} for n, nan, inf in nonfinite],
        "notes": [published_text(note) for note in plan.notes],
        "xtuner_config": _recipe(plan),
    }


def plan_identity(plan: Plan, version: str) -> str:
    """Text that differs whenever other bytes would be written: what `--resume` compares."""
    lines = [version, plan.dtype, *(f"{f.name} {f.sha256}" for f in plan.mapping.files)]
    checkpoint = plan.checkpoint
    for file in (*checkpoint.contents.files, *checkpoint.base_files):
        lines.append(f"{file.name} {file.size} {file.digest}")
    # A header says nothing of the data behind it, so the time of the last change must do.
    sources = {piece.file for planned in plan.tensors for piece in planned.tensor.extents()}
    lines += sorted(f"{file.path.name} {file.mtime_ns}" for file in sources)
    lines += [checkpoint.llm.origin, checkpoint.visual_encoder.origin]
    lines += [f"{p.name} {p.component} {','.join(p.sources)} {p.rule}" for p in plan.tensors]
    return "\n".join(lines)


def _part(part: Part) -> dict[str, Json]:
    record: dict[str, Json] = {
        "weights": published_text(part.origin),
        "trained": part.trained,
        "base": published_name(part.name) if part.name is not None else None,
    }
    if part.adapter is not None and part.adapter.settings is not None:
        used = part.adapter.settings
        record["lora"] = {
            "ranks": list(part.adapter.ranks),
            "alpha": used.alpha,
            "alpha_pattern": dict(used.alpha_pattern),
            "use_rslora": used.use_rslora,
            "use_dora": used.use_dora,
            "recorded_in": published_text(used.where),
        }
    return record


def _files(files: Sequence[Fingerprint]) -> list[Json]:
    return [{"name": f.name, "bytes": f.size, "digest": f.digest} for f in files]


def _recipe(plan: Plan) -> Json:
    """What was read from the XTuner config, its paths made publishable."""
    recipe = plan.checkpoint.recipe
    if recipe is None:
        return None
    return {
        used.name: published_name(used.value) if isinstance(used.value, str) else used.value
        for used in recipe.used
    }
