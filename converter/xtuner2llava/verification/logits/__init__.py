"""Whether the folder computes what the trained model computes.

Both models run in float32 on a fixed image and prompt, layer by layer, in the classes of the
installed transformers: the trained one in its own architecture, under its own names; the folder as
its config says. What no comparison of tensors can see shows here: a wrong rule whose shapes fit,
another rope_theta, another epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner2llava.errors import ConversionError
from xtuner2llava.options import VerifyOptions
from xtuner2llava.storage.json_file import Json
from xtuner2llava.verification.folder import ConvertedFolder
from xtuner2llava.verification.logits.compare import LOGITS, folder_model, logits_checks
from xtuner2llava.verification.logits.reference import read_reference, reference_checks
from xtuner2llava.verification.outcome import REFERENCE, Check

if TYPE_CHECKING:
    from xtuner2llava.planning.plan import Plan


def run_checks(
    out: ConvertedFolder,
    plan: Plan | None,
    options: VerifyOptions,
    figures: dict[str, Json],
    counter: Callable[[str], Callable[[int], None]],
) -> Iterator[Check]:
    """The checks of `--logits`, with the `plan` of the checkpoint, and of `--reference`.

    `figures` gets the numbers; `counter(stage)` counts bytes. Raises `UsageError` for a reference
    that has no logits.
    """
    if plan is not None and options.logits:
        try:
            trust = options.trust_remote_code
            yield from logits_checks(out, plan, trust, figures, counter("logits"))
        except ConversionError as error:
            yield Check.failed(LOGITS, error)
    if options.reference is not None:
        given = read_reference(Path(options.reference))
        try:
            folder = folder_model(out, None if plan is None else plan.checkpoint)
            yield from reference_checks(folder, given, figures, counter("reference"))
        except ConversionError as error:
            yield Check.failed(REFERENCE, error)
