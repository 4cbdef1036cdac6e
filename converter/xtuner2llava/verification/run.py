"""`verify`: a converted folder, looked at by itself, against its checkpoint, and at work.

open     config, headers and the record of the conversion
look     weight files, config, tokenizer, names, checksums
against  every tensor recomputed from the checkpoint          recomputed/
logits   both models run on one picture and prompt            logits/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path

from xtuner2llava.errors import ConversionError, UsageError
from xtuner2llava.options import Options, PathOrText
from xtuner2llava.sources.json_file import Json
from xtuner2llava.verification.invariants import invariant_checks
from xtuner2llava.verification.leaks import leak_check
from xtuner2llava.verification.naming import naming_checks
from xtuner2llava.verification.out_folder import OutFolder, open_out
from xtuner2llava.verification.outcome import FAILED, SKIPPED, Check, Verification
from xtuner2llava.verification.record import record_checks
from xtuner2llava.verification.structure import structure_checks
from xtuner2llava.verification.tokenizer import tokenizer_checks

# Called with (stage, bytes done, bytes in all), from one thread at a time.
OnProgress = Callable[[str, int, int], None]


def verify(
    out: str | PathLike[str],
    *,
    against: PathOrText | None = None,
    logits: bool = False,
    trust_remote_code: bool = False,
    llm: PathOrText | None = None,
    vision: PathOrText | None = None,
    xtuner_config: PathOrText | None = None,
    mapping: PathOrText | None = None,
    format: str | None = None,
    model_type: str | None = None,
    dtype: str = "auto",
    include_vision_tower: bool = True,
    vision_tower_name: str | None = None,
    bos_token: str | None = None,
    max_shard_size: str = "5GB",
    lora_alpha: float | None = None,
    vision_lora_alpha: float | None = None,
    weights: str = "master",
    on_progress: OnProgress | None = None,
) -> Verification:
    """Looks at the folder `out` that `convert` wrote, and says of each thing if it is right.

    By itself: weight files against their index, their headers and the transformers class; config,
    tokenizer, names, checksums. With the checkpoint `against`: every tensor, recomputed by another
    path, bit for bit; the further options are then those that were given to `convert`. With
    `logits` also: both models at work, layer by layer, in the memory of one layer.
    `trust_remote_code` lets the base model's own Python run for that, and nothing else does.

    With dtype "auto", the dtype is what `conversion.json` says; give one to hold the folder to it.
    The folder says its format itself. Damage to `out` makes checks that failed. Raises
    `ConversionError` for a call that makes no sense, and for a checkpoint that cannot be read.
    """
    if logits and against is None:
        raise UsageError(
            "needs the checkpoint whose logits the folder should have",
            where="--logits",
            advice="Give it with --against CHECKPOINT.",
        )
    options = Options(
        llm=llm,
        vision=vision,
        xtuner_config=xtuner_config,
        mapping=mapping,
        dtype=dtype,
        include_vision_tower=include_vision_tower,
        vision_tower_name=vision_tower_name,
        bos_token=bos_token,
        max_shard_size=max_shard_size,
        lora_alpha=lora_alpha,
        vision_lora_alpha=vision_lora_alpha,
        weights=weights,
    )
    folder, checks = open_out(Path(out))
    figures: dict[str, Json] = {}
    if folder is not None:
        checks += _by_itself(folder, on_progress)
        checks += _as_asked(folder, format, model_type, vision_tower_name)
    if against is not None:
        broken = any(check.result == FAILED for check in checks if check.name in _NEEDED)
        if folder is None or broken:
            why = "the folder is damaged, see above"
            checks.append(Check("tensors against the checkpoint", SKIPPED, why))
        else:
            work = _Against(folder, str(against), options, figures, on_progress)
            checks += work.checks(logits, trust_remote_code)
    return Verification(Path(out), tuple(checks), figures)


# Without these being right, the tensors cannot be read.
_NEEDED = ("config.json", "safetensors headers")


def _by_itself(folder: OutFolder, on_progress: OnProgress | None) -> list[Check]:
    total = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    checks = [*structure_checks(folder), *invariant_checks(folder), *tokenizer_checks(folder)]
    checks += [*naming_checks(folder), leak_check(folder)]
    return [*checks, *record_checks(folder, _counter(on_progress, "checksums", total))]


def _as_asked(
    folder: OutFolder, format: str | None, model_type: str | None, tower: str | None
) -> Iterator[Check]:
    """Whether the folder is what the options say, as far as they say it."""
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
        options: Options,
        figures: dict[str, Json],
        on_progress: OnProgress | None,
    ) -> None:
        self._folder, self._checkpoint, self._options = folder, checkpoint, options
        self._figures, self._on_progress = figures, on_progress

    def checks(self, logits: bool, trust_remote_code: bool) -> Iterator[Check]:
        from xtuner2llava.verification.recomputed import Comparison, against_checks, expect

        expected = expect(self._checkpoint, self._options, self._folder)
        result = Comparison()
        total = sum(entry.stop - entry.start for entry in self._folder.tensors.values())
        advance = _counter(self._on_progress, "compare", total)
        yield from against_checks(self._folder, expected, result, advance)
        self._figures["tensors"] = result.to_dict()
        if not logits:
            return
        from xtuner2llava.verification.logits import logits_checks

        yield from _guarded(
            "logits against the trained model",
            logits_checks(
                self._folder,
                expected,
                result,
                trust_remote_code=trust_remote_code,
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
