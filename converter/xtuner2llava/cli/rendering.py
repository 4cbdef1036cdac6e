"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.cli.terminal import columns, one_line, table
from xtuner2llava.errors import listed
from xtuner2llava.mapping.names import fold
from xtuner2llava.metadata.front_matter import CARD_NAME
from xtuner2llava.writing.out_record import RECORD_NAME

if TYPE_CHECKING:
    from xtuner2llava.hub.upload import Pushed
    from xtuner2llava.inspection.inspection import Inspection, TargetFormat
    from xtuner2llava.metadata.report import Report
    from xtuner2llava.planning.plan import Plan, PlannedTensor
    from xtuner2llava.verification.outcome import Verification

_WIDTH = 110  # characters, where the output is not a terminal
_POWERS = (10**12, 10**9, 10**6, 10**3)


def size(count: float) -> str:
    """A number of bytes, in decimal units as the Hub and disks count them."""
    return _scaled(count, (" TB", " GB", " MB", " kB"), " B")


def number(count: int) -> str:
    """A number of parameters, such as 7.24B."""
    return _scaled(count, ("T", "B", "M", "k"), "")


def _scaled(count: float, units: Sequence[str], unit: str) -> str:
    scaled = ((count / power, name) for power, name in zip(_POWERS, units, strict=True))
    return next((f"{n:.2f}{name}" for n, name in scaled if n >= 1), f"{count:.0f}{unit}")


def render_plan(plan: Plan, *, tensors: bool = False) -> str:
    """The plan: its parts and what is done with them; with `tensors`, each kind of tensor."""
    shards = [(s.filename, str(len(s.entries)), size(s.size)) for s in plan.shards.shards]
    artifact = plan.checkpoint.artifact
    text = [
        one_line(f"{artifact.layout}: {artifact.path}"),
        f"{plan.mapping.family} → {plan.mapping.format}: {plan.architecture}, {plan.fidelity}, "
        f"dtype {plan.dtype}",
        "",
        table(list(_parts(plan)), ("part", "tensors", "bytes", "from")),
        "",
    ]
    if tensors:
        header = ("tensor", "count", "type", "how", "rule")
        text += [table(list(_kinds(plan)), header), ""]
    text += [
        table(shards, ("file", "tensors", "bytes")),
        f"and {', '.join([*plan.files, CARD_NAME, RECORD_NAME])}",
        *_dropped(plan),
        *_notes(plan.notes),
    ]
    return "\n".join(text)


def _parts(plan: Plan) -> Iterable[tuple[str, str, str, str]]:
    """A row for each part, and below it a row for all tensors that are made in the same way."""
    parts = plan.checkpoint.parts
    groups: dict[str, dict[str, list[PlannedTensor]]] = {}
    for planned in plan.tensors:
        how = "copied" if planned.how == "copy" else planned.how
        if planned.how == "compute":
            how = "merged with LoRA" if "LoRA" in parts[planned.component].origin else "computed"
        groups.setdefault(planned.component, {}).setdefault(how, []).append(planned)
    for component, by_how in groups.items():
        yield (
            component,
            *_amount([each for group in by_how.values() for each in group]),
            parts[component].origin,
        )
        for how, group in by_how.items():
            yield f"  {how}", *_amount(group), _files(group)


def _amount(group: Sequence[PlannedTensor]) -> tuple[str, str]:
    return str(len(group)), size(sum(planned.tensor.nbytes for planned in group))


def _files(group: Sequence[PlannedTensor]) -> str:
    """The files that the tensors are read from, each with the folder that it lies in."""
    paths = dict.fromkeys(
        piece.file.path for planned in group for piece in planned.tensor.extents()
    )
    names = ["/".join(path.parts[-2:]) for path in paths]
    if len(names) > 2:
        return f"{names[0]} and {len(names) - 1} more files"
    return " and ".join(names)


def _kinds(plan: Plan) -> Iterable[tuple[str, ...]]:
    """A row for all layers of a kind of tensor."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for planned in plan.tensors:
        tensor = planned.tensor
        key = (f"{tensor.dtype.name} {list(tensor.shape)}", planned.how, planned.rule)
        kinds.setdefault(key, []).append(planned.name)
    for key, names in kinds.items():
        for folded in fold(names):
            yield folded.text, str(folded.count), *key


def render_inspection(inspection: Inspection, name: str) -> str:
    """What an input is, and what it can become."""
    rows = [
        (
            part,
            summary.origin,
            str(summary.tensors),
            number(summary.parameters),
            size(summary.nbytes),
            ", ".join(summary.dtypes),
        )
        for part, summary in inspection.parts.items()
    ]
    bases = [
        (name, base.recorded or "-", base.folder or "not available")
        for name, base in inspection.bases.items()
    ]
    when = f", iteration {inspection.iteration}" if inspection.iteration is not None else ""
    text = [
        one_line(f"{name}: {inspection.layout}{when}"),
        "",
        table(rows, ("part", "weights", "tensors", "parameters", "stored", "dtype")),
        "",
        table(bases, ("base model", "recorded", "read from")),
        "",
    ]
    if inspection.family is not None:
        text += [f"family {inspection.family}", ""]
    text += _targets(inspection.targets)
    text += _notes(inspection.notes)
    text += _notes(inspection.advice)
    if inspection.lines:
        text += ["", "Add to the config:", *(f"  {line}" for line in inspection.lines)]
    return "\n".join(text)


def render_report(report: Report) -> str:
    """What was done, and what to do next."""
    total = sum(report.seconds.values())
    checked = "verified bit for bit" if report.verified else "not verified"
    if report.already_converted:
        checked = "already converted: nothing was written"
    shards = len(report.plan.shards.shards)
    place = report.out if report.pushed is None or report.out else report.pushed.link
    text = [
        one_line(
            f"{place}: {report.plan.architecture}, {size(report.nbytes)} in {shards} "
            f"{'shard' if shards == 1 else 'shards'}, {total:.1f} s, {checked}"
        )
    ]
    if report.kept_bytes:
        text.append(f"Kept from the interrupted run: {size(report.kept_bytes)} of the shards")
    if report.already_converted and report.pushed is None:
        text.append(
            "Names, sizes and small files are right; "
            f"`xtuner2llava verify {one_line(str(report.out))}` reads all."
        )
    for name, nan, infinite in report.nonfinite:
        text.append(
            f"Warning: {one_line(name)} has {nan} NaN and {infinite} infinite values, as the input."
        )
    text += [f"Warning: {one_line(warning)}" for warning in report.warnings]
    text += _notes(report.plan.notes)
    if report.pushed is not None:
        text += ["", render_pushed(report.pushed)]
    text += ["", "Next:", *(f"  {one_line(step)}" for step in report.next_steps)]
    return "\n".join(text)


def render_pushed(pushed: Pushed) -> str:
    """Where a model was published."""
    text = [
        f"{pushed.link}: {len(pushed.files)} files, {size(pushed.nbytes)}, commit "
        f"{pushed.commit[:12]} on {pushed.revision}"
    ]
    if pushed.removed:
        text.append(f"Weights of an earlier model were removed: {', '.join(pushed.removed)}")
    return "\n".join([*text, *(f"Note: {one_line(note)}" for note in pushed.notes)])


def render_verification(verification: Verification) -> str:
    """One row for each check, its detail wrapped, and the verdict."""
    rows = [(check.name, check.result, check.detail) for check in verification.checks]
    text = table(rows, ("check", "result", "detail"), width=columns() or _WIDTH)
    return "\n".join([one_line(f"{verification.out}:"), "", text, "", verification.verdict])


def tree(folder: Path) -> str:
    """The files of `folder` with their sizes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [(str(path.relative_to(folder)), size(path.stat().st_size)) for path in files]
    return f"{folder}/\n" + table(rows, ("file", "bytes"))


def _targets(targets: Iterable[TargetFormat]) -> Iterable[str]:
    """What each format can become; formats of which the same is true are named together."""
    formats: dict[tuple[str, ...], list[str]] = {}
    for target in targets:
        faults = (text.replace("\n", "\n    ") for text in listed(target.faults))
        remarks = (*map(one_line, target.caveats), *faults)
        formats.setdefault((str(target), *remarks), []).append(target.format)
    for (verdict, *said), names in formats.items():
        yield f"{', '.join(names)}: {verdict}"
        yield from (f"  - {remark}" for remark in said)


def _dropped(plan: Plan) -> Iterable[str]:
    reasons: dict[str, list[str]] = {}
    for component, dropped in plan.dropped:
        reasons.setdefault(dropped.because, []).append(f"{component}.{dropped.name}")
    for reason, names in reasons.items():
        kinds = ", ".join(folded.text for folded in fold(names))
        yield one_line(f"left out: {kinds}: {reason}")


def _notes(notes: Sequence[str]) -> list[str]:
    return ["", *(f"Note: {one_line(note)}" for note in notes)] if notes else []
