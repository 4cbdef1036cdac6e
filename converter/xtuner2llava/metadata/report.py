"""What a conversion did, as data, and what to do with the finished folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.mapping.format import model_name
from xtuner2llava.metadata.record import FinishedOutput
from xtuner2llava.metadata.stages import Stages
from xtuner2llava.options import PROGRAMS, ConvertOptions
from xtuner2llava.planning.plan import Plan
from xtuner2llava.storage.json_file import Json
from xtuner2llava.writing.writer import Written

if TYPE_CHECKING:
    from xtuner2llava.hub.upload import Pushed


@dataclass(frozen=True, slots=True)
class Report:
    """A finished conversion.

    `files` are all files of `out` with their sizes in bytes, `blake3` those of the shards,
    `seconds` the wall time of each stage, `nonfinite` the tensors whose NaN or infinite values the
    checkpoint already had (name, NaN, infinite), `warnings` and `next_steps` sentences for the
    user. `out` is None where the shards were published and not kept; `pushed` says where to.

    `resumed` are the shards that an interrupted run had finished, `kept_bytes` the bytes of shards
    that it had written. `already_converted` says that `out` was finished before, that its names,
    sizes and small files were checked, and that nothing was written; `verified` is about this run.
    """

    out: Path | None
    plan: Plan
    files: Mapping[str, int]
    blake3: Mapping[str, str]
    seconds: Mapping[str, float]
    verified: bool
    resumed: tuple[str, ...]
    nonfinite: tuple[tuple[str, int, int], ...]
    warnings: tuple[str, ...]
    next_steps: tuple[str, ...]
    pushed: Pushed | None = None
    already_converted: bool = False
    kept_bytes: int = 0

    @classmethod
    def of(
        cls,
        plan: Plan,
        out: Path,
        options: ConvertOptions,
        finished: FinishedOutput,
        written: Written | None,
        pushed: Pushed | None,
        stages: Stages,
    ) -> Report:
        """The report on the output `finished`; nothing `written` says that it was there before."""
        shards = () if written is None else written.shards
        name = model_name(out) if pushed is None else pushed.repo_id.rpartition("/")[2]
        reasons = plan.folder_name.reasons(name) if plan.processor is None else ""
        rename = (
            f"Rename the folder, for instance to {plan.suggested_name}: LLaVA chooses the class by "
            f"the folder's name, and '{name}' {reasons}."
        )
        return cls(
            out=None if options.low_disk and written is not None else out,
            plan=plan,
            files=dict(sorted(finished.files.items())),
            blake3=dict(finished.blake3),
            seconds=stages.seconds,
            verified=options.verify and written is not None,
            resumed=tuple(shard.filename for shard in shards if shard.kept),
            kept_bytes=sum(shard.kept_bytes for shard in shards),
            nonfinite=finished.nonfinite,
            warnings=(rename,) if reasons else (),
            next_steps=next_steps(
                plan, str(out) if pushed is None else pushed.repo_id, options.for_
            ),
            pushed=pushed,
            already_converted=written is None,
        )

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Json]:
        """The same as JSON, with what the plan says."""
        return {
            "out": None if self.out is None else str(self.out),
            "files": dict(self.files),
            "bytes": self.nbytes,
            "blake3": dict(self.blake3),
            "seconds": dict(self.seconds),
            "already_converted": self.already_converted,
            "verified": self.verified,
            "resumed": list(self.resumed),
            "kept_bytes": self.kept_bytes,
            "nonfinite": [{"name": n, "nan": nan, "infinite": inf} for n, nan, inf in
                          self.nonfinite],
            "warnings": list(self.warnings),
            "next_steps": list(self.next_steps),
            "pushed": None if self.pushed is None else self.pushed.to_dict(),
            "plan": self.plan.to_dict(),
        }  # fmt: skip


def next_steps(plan: Plan, place: str, program: str | None = None) -> tuple[str, ...]:
    """How to load what is at `place`, with `program` or else the first that can."""
    becomes, kind = plan.mapping.target_class, plan.config["model_type"]
    servers = ("sglang",) if kind == "llava" and plan.processor is None else ()
    able = (name for name in (*servers, "llava", "llava-next") if PROGRAMS[name].takes(becomes))
    named = PROGRAMS[program or next(able, "llava-next")]
    if named.serve:
        return (f"Serve it with {named.title}: {named.serve} {shlex.quote(place)}",)
    if plan.processor is not None:
        return (
            "Load it with transformers: LlavaForConditionalGeneration.from_pretrained and "
            "AutoProcessor.from_pretrained; README.md has the lines.",
        )
    return (
        f"Load it with {named.title}: load_pretrained_model(path, None, folder_name); README.md "
        "has the lines.",
    )
