"""What to do with a finished folder, as sentences for the user."""

from __future__ import annotations

from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.programs import PROGRAMS


def folder_name_warnings(planned: Plan, out: str) -> tuple[str, ...]:
    """How to rename the folder where LLaVA would load another class; `out` is its name."""
    reasons = planned.folder_name.reasons(out)
    if planned.processor is not None or not reasons:
        return ()
    return (
        f"Rename the folder, for instance to {planned.suggested_name}: LLaVA chooses the class "
        f"by the folder's name, and '{out}' {reasons}.",
    )


def next_steps(planned: Plan) -> tuple[str, ...]:
    """How to load it."""
    if planned.processor is not None:
        return (
            "Load it with transformers: LlavaForConditionalGeneration.from_pretrained and "
            "AutoProcessor.from_pretrained; README.md has the lines.",
        )
    sglang = PROGRAMS["sglang"]
    if planned.config["model_type"] == sglang.model_type and sglang.takes(
        planned.mapping.target_class
    ):
        return ("Serve it with SGLang: python -m sglang.launch_server --model-path OUT",)
    is_next = not PROGRAMS["llava"].takes(planned.mapping.target_class)
    who = PROGRAMS["llava-next" if is_next else "llava"].title
    return (
        f"Load it with {who}: load_pretrained_model(path, None, folder_name); README.md has the "
        "lines.",
    )
