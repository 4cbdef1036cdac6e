"""A plan with what the output says of itself: model card, record and XTuner config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from xtuner2llava.errors import UsageError
from xtuner2llava.metadata.card import CARD_NAME, model_card
from xtuner2llava.metadata.card_template import CardTemplate
from xtuner2llava.metadata.record import open_record
from xtuner2llava.options import ConvertOptions
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.redaction import redact_config
from xtuner2llava.writing.disk import disk_errors
from xtuner2llava.writing.out_record import RECORD_NAME


def with_metadata(plan: Plan, options: ConvertOptions, template: CardTemplate | None) -> Plan:
    """`plan` with all files of the output; `with_closed_record` adds what writing says.

    Raises `UsageError` where an XTuner config is to be included and there is none.
    """
    files = dict(plan.files)
    if options.include_xtuner_config:
        files["xtuner_config.py"] = _xtuner_config(plan, options)
    files[CARD_NAME] = model_card(plan, options, template).encode("utf-8")
    plan = replace(plan, files=files)
    return replace(plan, files={**files, RECORD_NAME: open_record(plan, options)})


def _xtuner_config(plan: Plan, options: ConvertOptions) -> bytes:
    """The XTuner config as it may be published."""
    found, given = plan.checkpoint.artifact.config, options.xtuner_config
    if given is not None:
        with disk_errors(Path(given), "cannot be read"):
            found = Path(given).read_text(encoding="utf-8-sig"), str(given)
    if found is None:
        raise UsageError(
            "there is no XTuner config to include",
            where="--include-xtuner-config",
            advice="Give it with --xtuner-config.",
        )
    return redact_config(*found).encode("utf-8")
