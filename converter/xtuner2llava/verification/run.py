"""`verify`: a converted folder, looked at by itself, against its checkpoint, and at work.

open     config, headers and the record of the conversion
look     weight files, config, tokenizer, names, checksums
against  every tensor recomputed from the checkpoint          recomputed/
logits   both models run on one picture and prompt            logits/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from os import fspath
from pathlib import Path

from xtuner2llava.errors import ConversionError, UsageError
from xtuner2llava.options import OnProgress, PathOrText, VerifyOptions
from xtuner2llava.sources.json_file import Json
from xtuner2llava.verification.invariants import invariant_checks
from xtuner2llava.verification.leaks import leak_check
from xtuner2llava.verification.naming import naming_checks
from xtuner2llava.verification.out_folder import OutFolder, open_out
from xtuner2llava.verification.outcome import FAILED, SKIPPED, Check, Verification
from xtuner2llava.verification.record import record_checks
from xtuner2llava.verification.structure import structure_checks
from xtuner2llava.verification.tokenizer import tokenizer_checks


def verify_folder(out: PathOrText, options: VerifyOptions) -> Verification:
    """What is right and wrong with the folder `out`, see `api.verify`."""
    if options.logits and options.against is None:
        raise UsageError(
            "needs the checkpoint whose logits the folder should have",
            where="--logits",
            advice="Give it with --against CHECKPOINT.",
        )
    on_progress, against = options.on_progress, options.against
    folder, checks = open_out(Path(out))
    figures: dict[str, Json] = {}
    if folder is not None:
        checks += _by_itself(folder, on_progress)
        checks += _as_asked(folder, options)
    if against is not None:
        broken = any(check.result == FAILED for check in checks if check.name in _NEEDED)
        if folder is None or broken:
            why = "the folder is damaged, see above"
            checks.append(Check("tensors against the checkpoint", SKIPPED, why))
        else:
            work = _Against(folder, fspath(against), options, figures)
            checks += work.checks()
    return Verification(Path(out), tuple(checks), figures)


# Without these being right, the tensors cannot be read.
_NEEDED = ("config.json", "safetensors headers")


def _by_itself(folder: OutFolder, on_progress: OnProgress | None) -> list[Check]:
    total = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    checks = [*structure_checks(folder), *invariant_checks(folder), *tokenizer_checks(folder)]
    checks += [*naming_checks(folder), leak_check(folder)]
    return [*checks, *record_checks(folder, _counter(on_progress, "checksums", total))]


def _as_asked(folder: OutFolder, options: VerifyOptions) -> Iterator[Check]:
    """Whether the folder is what the options say, as far as they say it."""
    format, model_type = options.format, options.model_type
    tower = options.vision_tower_name
    faults = []
    if format is not None and format != folder.layout.format:
        faults.append(f"it is of format {folder.layout.format}, --format is {format}")
    said = folder.layout.config.get("model_type")
    if model_type is not None and folder.layout.format == "llava":
        plain = said == "llava"
        if plain != (model_type == "llava"):
            faults.append(f"its model_type is {said!r}, --model-type is {model_type}")
    named = folder.layout.config.get("mm_vision_tower")
    if tower is not None and folder.layout.format == "llava" and named != tower:
        faults.append(f"its mm_vision_tower is {named!r}, --vision-tower-name is {tower}")
    if faults:
        yield Check.of("as asked for", faults, "")


class _Against:
    """The work with a checkpoint."""

    def __init__(
        self,
        folder: OutFolder,
        checkpoint: str,
        options: VerifyOptions,
        figures: dict[str, Json],
    ) -> None:
        self._folder, self._checkpoint, self._options = folder, checkpoint, options
        self._figures, self._on_progress = figures, options.on_progress

    def checks(self) -> Iterator[Check]:
        from xtuner2llava.verification.recomputed import Comparison, against_checks, expect

        expected = expect(self._checkpoint, self._options, self._folder)
        result = Comparison()
        total = sum(entry.stop - entry.start for entry in self._folder.tensors.values())
        advance = _counter(self._on_progress, "compare", total)
        yield from against_checks(self._folder, expected, result, advance)
        self._figures["tensors"] = result.to_dict()
        if not self._options.logits:
            return
        from xtuner2llava.verification.logits import logits_checks

        yield from _guarded(
            "logits against the trained model",
            logits_checks(
                self._folder,
                expected,
                result,
                trust_remote_code=self._options.trust_remote_code,
                figures=self._figures,
                advance=_counter(self._on_progress, "logits", 0),
            ),
        )


def _guarded(name: str, checks: Iterable[Check]) -> Iterator[Check]:
    """`checks`, and one that failed where they end in an error."""
    try:
        yield from checks
    except ConversionError as error:
        yield Check.failed(name, error)


def _counter(on_progress: OnProgress | None, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(stage, done, max(total, done))

    return advance
