"""What to do with a finished folder, as sentences for the user."""

from __future__ import annotations

from xtuner2llava.planning.plan import Plan


def next_steps(planned: Plan, out: str) -> tuple[str, ...]:
    """How to load it, and how to rename it where LLaVA would not; `out` is its name."""
    if planned.processor is not None:
        return (
            "Load it with transformers: LlavaForConditionalGeneration.from_pretrained and "
            "AutoProcessor.from_pretrained; README.md has the lines.",
        )
    name = planned.folder_name
    steps = []
    if not name.fits(out):
        reasons = [f"lacks '{word}'" for word in name.missing(out)]
        reasons += [f"contains '{word}'" for word in name.wrong(out)]
        steps.append(
            f"Rename the folder, for instance to {planned.suggested_name}: LLaVA chooses the class "
            f"by the folder's name, and '{out}' {' and '.join(reasons)}."
        )
    becomes = planned.mapping.becomes
    who = "LLaVA" if becomes in ("llama", "mistral") else "LLaVA-NeXT"
    steps.append(
        f"Load it with {who}: load_pretrained_model(path, None, folder_name); README.md has the "
        "lines."
    )
    return tuple(steps)
